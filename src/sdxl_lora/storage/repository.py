"""Sources of models and data sets: a Hub repository pinned to a revision, or a local folder to a digest.

The digest of a folder covers its content, so that a changed file is noticed when a run is repeated.
`sdxl-lora digest ./folder` prints it.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sdxl_lora.storage.atomic_io import require_safetensors
from sdxl_lora.storage.hub_client import RepositoryType, cached_snapshot, download_snapshot

DIGEST_PREFIX = "sha256:"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def is_local_folder(repository: str) -> bool:
    """Return whether `repository` is a folder: Hub repository ids never start with `./`, `../` or `/`."""
    return repository.startswith(("./", "../", "/"))


def public_name(repository: str) -> str:
    """Return a repository's name without a private path: an absolute folder is cut to its last part."""
    return Path(repository).name if is_local_folder(repository) and repository.startswith("/") else repository


def folder_digest(folder: Path) -> str:
    """Return `sha256:` and the hash of the paths and contents of a folder's files, except hidden ones."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            digest.update(f"{file_digest(path)}  {relative.as_posix()}\n".encode())
    return DIGEST_PREFIX + digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_folder(folder: str, revision: str, key: str) -> Path:
    """Return the path of a local folder whose digest is `revision`.

    Args:
        key: params key of `folder`, for error messages.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: its content has another digest.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{key}: folder {folder} not found; correct {key}, or `git checkout {folder}`"
        )
    digest = folder_digest(path)
    if digest != revision:
        raise ValueError(
            f"{key}: the content of {folder} does not match its revision.\n"
            f"  pinned: {revision}\n  found:  {digest}\n"
            f"If the change is intended, set the revision of {key} to the digest found "
            f"(`sdxl-lora digest {folder}` prints it)."
        )
    return path


def open_repository(
    repository: str,
    revision: str,
    key: str,
    patterns: Sequence[str] = ("*",),
    kind: RepositoryType = "model",
) -> Path:
    """Return the local copy of a folder or of a Hub repository, after downloading what the cache lacks.

    A download shows progress bars on stderr.

    Args:
        revision: commit, tag or branch; for a folder its digest.
        key: params key that names the repository, for error messages.
        patterns: files to download, as globs. Each pattern for safetensors must match a file: no other
            format of weights is ever read.

    Raises:
        FileNotFoundError: the folder, repository or revision does not exist, or has no safetensors.
        ConnectionError: the Hub cannot be reached and the files are not in the cache.
        PermissionError: the repository is gated, or the access token is refused.
        OSError: the disk has too little space.
        ValueError: the folder's content has another digest, or `repository` is not a repository id.
    """
    if is_local_folder(repository):
        folder = open_folder(repository, revision, key)
    else:
        folder = download_snapshot(repository, revision, key, patterns, kind)
    for pattern in patterns:
        if pattern.endswith(".safetensors"):
            _require_weights(folder, pattern, f"{key}: {repository}")
    return folder


def _require_weights(folder: Path, pattern: str, place: str) -> None:
    """Raise unless `folder` has safetensors files that match `pattern`, and all of them are valid.

    Raises:
        FileNotFoundError: nothing matches `pattern`; names the pickles that are there instead.
        ValueError: a file that matches is not a safetensors file.
    """
    weights = sorted(folder.glob(pattern))
    if not weights:
        present = (folder / pattern).parent.glob("*")
        pickles = sorted(path.name for path in present if path.suffix in _PICKLES)
        found = f"{pattern}, but {', '.join(pickles)}" if pickles else pattern
        raise FileNotFoundError(
            f"{place} has no {found}. Only safetensors are read: pickled weights ({', '.join(_PICKLES)}) "
            "can run any code. Choose a repository, revision or variant with safetensors"
        )
    for path in weights:
        require_safetensors(path)


def find_local_copy(
    repository: str, revision: str, patterns: Sequence[str] = ("*",), kind: RepositoryType = "model"
) -> Path | None:
    """Return the local copy without asking the Hub or checking its content; None if missing or incomplete."""
    if is_local_folder(repository):
        return Path(repository) if Path(repository).is_dir() else None
    return cached_snapshot(repository, revision, patterns, kind)
