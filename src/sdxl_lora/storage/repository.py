"""Where models and data sets come from: a Hub repository at a revision, or a local folder at a digest.

A folder is pinned by the digest of its content, so that a changed file cannot pass for the one that an
earlier result was made from. `sdxl-lora digest ./folder` prints it.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sdxl_lora.storage.atomic_io import require_safetensors
from sdxl_lora.storage.hub_client import RepositoryType, cached_snapshot, download_snapshot

DIGEST_PREFIX = "sha256:"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def is_local_folder(repository: str) -> bool:
    """Whether `repository` names a folder rather than a Hub repository, which never starts so."""
    return repository.startswith(("./", "../", "/"))


def public_name(repository: str) -> str:
    """A repository's name; of a folder outside the project only its own, since its path is private."""
    return Path(repository).name if is_local_folder(repository) and repository.startswith("/") else repository


def folder_digest(folder: Path) -> str:
    """`sha256:` and the hash of a folder's files: their paths and contents, hidden files apart."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            digest.update(f"{file_digest(path)}  {relative.as_posix()}\n".encode())
    return DIGEST_PREFIX + digest.hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_folder(folder: str, revision: str, key: str) -> Path:
    """A local folder, once its content is what `revision` says.

    Args:
        key: params key of `folder`, for error messages; its digest's key ends in `revision`.

    Raises:
        FileNotFoundError: there is no such folder.
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
            f"{key}: the content of {folder} is not what its revision pins.\n"
            f"  pinned: {revision}\n  found:  {digest}\n"
            f"If the change is meant, set the revision beside {key} to the digest found "
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
    """The local copy of a folder or of a Hub repository, downloaded into the Hub's cache if need be.

    A download shows a progress bar, on stderr.

    Args:
        revision: commit, tag or branch; for a folder its digest.
        key: params key that names the repository, for error messages.
        patterns: files to download, as globs. There must be one for every pattern of safetensors: no other
            kind of weights is ever read.

    Raises:
        FileNotFoundError: no such folder, repository or revision, or it has no safetensors.
        ConnectionError: the Hub cannot be reached and the files are not in its cache.
        PermissionError: the repository is gated, or the access token is refused.
        OSError: the disk has too little space.
        ValueError: the folder's content has another digest, or the name is none.
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
    """Refuses a folder without safetensors, or with something else under their name.

    Raises:
        FileNotFoundError: nothing matches `pattern`; names the pickles that lie there instead.
        ValueError: what matches is no safetensors file.
    """
    weights = sorted(folder.glob(pattern))
    if not weights:
        beside = (folder / pattern).parent.glob("*")
        pickles = sorted(path.name for path in beside if path.suffix in _PICKLES)
        found = f"{pattern}, but {', '.join(pickles)}" if pickles else pattern
        raise FileNotFoundError(
            f"{place} has no {found}. Only safetensors are read: weights in pickle ({', '.join(_PICKLES)}) "
            "can run any code. Choose a repository, revision or variant that has them"
        )
    for path in weights:
        require_safetensors(path)


def find_local_copy(
    repository: str, revision: str, patterns: Sequence[str] = ("*",), kind: RepositoryType = "model"
) -> Path | None:
    """What `open_repository` would open without a network; None if it is not here, or incomplete.

    Its content is not checked.
    """
    if is_local_folder(repository):
        return Path(repository) if Path(repository).is_dir() else None
    return cached_snapshot(repository, revision, patterns, kind)
