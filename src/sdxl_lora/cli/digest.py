"""`sdxl-lora digest`: what pins a local folder in params.yaml."""

from pathlib import Path

from sdxl_lora.storage.repository import folder_digest


def run_digest(folder: Path) -> None:
    """Print the digest of a folder's content.

    Raises:
        NotADirectoryError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder: name the folder of a data set or model")
    print(folder_digest(folder))
