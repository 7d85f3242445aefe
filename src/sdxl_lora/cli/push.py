"""`sdxl-lora push`: the exported adapter on the Hub."""

from sdxl_lora.tracking.hub_upload import upload_adapter


def run_push(repository: str, public: bool, force: bool) -> None:
    """Upload the adapter and print the address of its commit. Raises as `upload_adapter`."""
    print(f"pushed: {upload_adapter(repository, public, force)}")
