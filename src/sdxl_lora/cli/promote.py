"""`sdxl-lora promote`: the adapter of the last run becomes the champion in MLflow's registry."""

from sdxl_lora.tracking.registry import ALIAS, promote


def run_promote() -> None:
    """Promote the adapter and print its name in the registry. Raises as `promote`."""
    version = promote()
    print(f"{version.name} version {version.version} is now {ALIAS}: models:/{version.name}@{ALIAS}")
