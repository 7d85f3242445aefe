"""Whether what lies here of a folder or of a Hub repository is still what its revision pins."""

import hashlib
from pathlib import Path

from sdxl_lora.reproducibility.checklist import Check, failed, passed, warned
from sdxl_lora.storage.repository import file_digest, folder_digest, is_local_folder

_SHOWN_CHARACTERS = 19  # characters of a revision: `sha256:` and twelve of its digest


def check_pin(name: str, repository: str, revision: str, copy: Path | None) -> Check:
    """Whether a folder has the digest that it is pinned to, and every file from the Hub is what the Hub sent.

    Args:
        name: of the check.
        copy: where the repository lies here; None: it does not, or not all of it.
    """
    pinned = f"{repository} at {revision[:_SHOWN_CHARACTERS]}"
    if copy is None:
        return warned(name, f"{pinned} is not here, or incomplete", "the first stage to need it downloads it")
    if is_local_folder(repository):
        if folder_digest(copy) != revision:
            return failed(
                name,
                f"{repository} is not what {revision[:_SHOWN_CHARACTERS]} pins",
                f"`git checkout {repository}`",
            )
        return passed(name, pinned)
    if damaged := damaged_files(copy):
        return failed(name, f"damaged: {', '.join(damaged)}", "delete these files from the Hub's cache")
    return passed(name, f"{pinned}: every file has the hash that it was published with")


def damaged_files(snapshot: Path) -> list[str]:
    """Files of a Hub repository's local copy that are not what the Hub sent.

    Its cache names a file's content by SHA-256 if the Hub keeps it in LFS, as it does weights, else by git's
    SHA-1 of a blob.
    """
    return [
        path.relative_to(snapshot).as_posix()
        for path in sorted(snapshot.rglob("*"))
        if path.is_symlink() and not _is_blob(path)
    ]


def _is_blob(link: Path) -> bool:
    """Whether a file of the Hub's cache has the content that its blob is named after."""
    name = link.resolve().name
    if not link.is_file():
        return False
    if len(name) == hashlib.sha256().digest_size * 2:
        return file_digest(link) == name
    content = link.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == name
