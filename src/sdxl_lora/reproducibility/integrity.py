"""Checks that the local copy of a folder or Hub repository still has the content of its revision."""

import hashlib
from pathlib import Path

from sdxl_lora.reproducibility.checklist import Check, failed, passed, warned
from sdxl_lora.storage.repository import file_digest, folder_digest, is_local_folder

_SHOWN_CHARACTERS = 19  # of a revision: `sha256:` and twelve digits


def check_pin(name: str, repository: str, revision: str, copy: Path | None) -> Check:
    """Check that a folder has its pinned digest, or that each file from the Hub has its published hash.

    Args:
        name: name of the check.
        copy: local copy of the repository; None: missing or incomplete.
    """
    pinned = f"{repository} at {revision[:_SHOWN_CHARACTERS]}"
    if copy is None:
        return warned(
            name, f"{pinned} is missing or incomplete", "the first stage that needs it downloads it"
        )
    if is_local_folder(repository):
        if folder_digest(copy) != revision:
            return failed(
                name,
                f"{repository} does not match its revision {revision[:_SHOWN_CHARACTERS]}",
                f"`git checkout {repository}`",
            )
        return passed(name, pinned)
    if damaged := damaged_files(copy):
        return failed(name, f"damaged: {', '.join(damaged)}", "delete these files from the Hub's cache")
    return passed(name, f"{pinned}: every file has its published hash")


def damaged_files(snapshot: Path) -> list[str]:
    """Return the files of a snapshot in the Hub's cache whose content has changed since the download.

    Snapshots are symbolic links to files that are named after their content: by SHA-256 if the Hub keeps
    them in LFS, as weights, else by git's SHA-1 of a blob.
    """
    return [
        path.relative_to(snapshot).as_posix()
        for path in sorted(snapshot.rglob("*"))
        if path.is_symlink() and not _is_blob(path)
    ]


def _is_blob(link: Path) -> bool:
    """Return whether a file of the Hub's cache has the hash that it is named after."""
    name = link.resolve().name
    if not link.is_file():
        return False
    if len(name) == hashlib.sha256().digest_size * 2:
        return file_digest(link) == name
    content = link.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == name
