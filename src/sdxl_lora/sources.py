"""Where models and data sets come from: a Hub repository at a revision, or a local folder at a digest.

A folder is pinned by the digest of its content, so that a changed file cannot pass for the one that an earlier
result was made from.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

DIGEST_PREFIX = "sha256:"


def is_folder(repository: str) -> bool:
    """Whether `repository` names a folder rather than a Hub repository, which never starts so."""
    return repository.startswith(("./", "../", "/"))


def folder_digest(folder: Path) -> str:
    """`sha256:` and the hash of a folder's files: their paths and contents, hidden files apart."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{content}  {relative.as_posix()}\n".encode())
    return DIGEST_PREFIX + digest.hexdigest()


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
            f"If the change is meant, set the revision beside {key} to the digest found."
        )
    return path


def open_repository(repository: str, revision: str, key: str, patterns: Sequence[str] | None = None) -> Path:
    """The local copy of a folder or of a Hub model repository, downloaded into the Hub's cache if need be.

    Args:
        revision: commit, tag or branch; for a folder its digest.
        key: params key that names the repository, for error messages.
        patterns: files to download, as globs; None: all.

    Raises:
        FileNotFoundError: no such folder, repository or revision.
        ConnectionError: the Hub cannot be reached and the files are not in its cache.
        PermissionError: the repository is private or gated.
        ValueError: the folder's content has another digest.
    """
    if is_folder(repository):
        return open_folder(repository, revision, key)
    with explained_hub_errors(repository, revision, key):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns or ["*"])))


def resolve_commit(repository: str, revision: str, key: str) -> str:
    """The commit that a Hub data set's revision stands for now. Raises as `open_repository`."""
    with explained_hub_errors(repository, revision, key):
        commit = HfApi().dataset_info(repository, revision=revision).sha
    assert commit is not None
    return commit


@contextmanager
def explained_hub_errors(repository: str, revision: str, key: str) -> Iterator[None]:
    """Turns the Hub client's errors into ones that name the params key, its value and the remedy."""
    place = f"{key}: {repository} at revision {revision}"
    try:
        yield
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{place}: no such revision on the Hub; set the revision beside {key} to a commit, tag or branch"
        ) from error
    except GatedRepoError as error:
        raise PermissionError(
            f"{place}: access must be granted; accept its terms on the Hub, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{place}: no such repository, or a private one; correct {key}, or `hf auth login`. "
            f"A local folder is written ./{repository}"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"{place}: the Hub cannot be reached ({type(error).__name__}) and the files are not in its cache. "
            "Check the network (HF_ENDPOINT, HF_HUB_OFFLINE), or select the recipe that needs none: "
            "`make recipe NAME=demo`"
        ) from error
