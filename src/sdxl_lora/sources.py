"""Where models and data sets come from: a Hub repository at a revision, or a local folder at a digest.

A folder is pinned by the digest of its content, so that a changed file cannot pass for the one that an
earlier result was made from. `python -m sdxl_lora.sources ./folder` says it.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import httpx2
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils.tqdm import tqdm

from sdxl_lora.files import require_safetensors
from sdxl_lora.hardware import require_disk_space

DIGEST_PREFIX = "sha256:"
BYTES_ON_DISK = "huggingface_hub.snapshot_download"  # the client's name for the bar that is drawn
BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
REFUSED = (401, 403)
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

RepositoryType = Literal["model", "dataset"]


def is_folder(repository: str) -> bool:
    """Whether `repository` names a folder rather than a Hub repository, which never starts so."""
    return repository.startswith(("./", "../", "/"))


def public_name(repository: str) -> str:
    """A repository's name; of a folder outside the project only its own, since its path is private."""
    return Path(repository).name if is_folder(repository) and repository.startswith("/") else repository


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
            f"(`python -m sdxl_lora.sources {folder}` says it again)."
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
    if is_folder(repository):
        folder = open_folder(repository, revision, key)
    else:
        needed_bytes = download_size(repository, revision, key, patterns, kind)
        require_disk_space(Path(constants.HF_HUB_CACHE), needed_bytes)
        with (
            explained_hub_errors(repository, revision, key),
            download_bar(repository, hidden=needed_bytes == 0) as bar,
        ):
            snapshot = snapshot_download(
                repository,
                revision=revision,
                repo_type=kind,
                allow_patterns=list(patterns),
                tqdm_class=bar,
            )
        folder = Path(snapshot)
    for pattern in patterns:
        if pattern.endswith(".safetensors"):
            require_weights(folder, pattern, f"{key}: {repository}")
    return folder


def require_weights(folder: Path, pattern: str, place: str) -> None:
    """Refuses a folder without safetensors, or with something else under their name.

    Raises:
        FileNotFoundError: nothing matches `pattern`; names the pickles that lie there instead.
        ValueError: what matches is no safetensors file.
    """
    weights = sorted(folder.glob(pattern))
    if not weights:
        beside = (folder / pattern).parent.glob("*")
        pickles = sorted(path.name for path in beside if path.suffix in PICKLES)
        found = f"{pattern}, but {', '.join(pickles)}" if pickles else pattern
        raise FileNotFoundError(
            f"{place} has no {found}. Only safetensors are read: weights in pickle ({', '.join(PICKLES)}) "
            "can run any code. Choose a repository, revision or variant that has them"
        )
    for path in weights:
        require_safetensors(path)


def local_copy(
    repository: str, revision: str, patterns: Sequence[str] = ("*",), kind: RepositoryType = "model"
) -> Path | None:
    """What `open_repository` would open without a network; None if it is not here, or incomplete.

    Its content is not checked.
    """
    if is_folder(repository):
        return Path(repository) if Path(repository).is_dir() else None
    try:
        found = snapshot_download(
            repository,
            revision=revision,
            repo_type=kind,
            allow_patterns=list(patterns),
            local_files_only=True,
        )
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return Path(found)


def download_size(
    repository: str, revision: str, key: str, patterns: Sequence[str], kind: RepositoryType
) -> int:
    """Bytes that `open_repository` would download from the Hub now; 0 if the Hub cannot be asked.

    Raises as `open_repository`, but where the Hub is out of reach: only the download itself knows whether
    the cache has all that is needed.
    """
    with (
        explained_hub_errors(repository, revision, key),
        suppress(DryRunError),
        download_bar(repository, hidden=True) as bar,
    ):
        files = snapshot_download(
            repository,
            revision=revision,
            repo_type=kind,
            allow_patterns=list(patterns),
            dry_run=True,
            tqdm_class=bar,
        )
        return sum(file.file_size or 0 for file in files if file.will_download)
    return 0


@contextmanager
def download_bar(title: str, hidden: bool) -> Iterator[type[tqdm]]:
    """The class of progress bars that the Hub's client is to make while it downloads `title` in the block.

    It makes one for the files, one for bytes on the network and one for bytes on the disk, whose total grows
    as files begin. Only the last is drawn, as `title`, with the time that is left. The client closes none.
    """
    bars: list[tqdm] = []

    class DownloadBar(tqdm):
        def __init__(self, *values: Any, name: str = "", **options: Any) -> None:
            ours = {"desc": title, "bar_format": BAR_FORMAT, "disable": hidden or name != BYTES_ON_DISK}
            super(tqdm, self).__init__(*values, **{**options, **ours})  # past the client's own switch
            bars.append(self)

        def set_description(self, _: str | None = None, refresh: bool | None = True) -> None:
            """Keeps the title: the client's own words change as it goes."""
            super().set_description(title, refresh)

    try:
        yield DownloadBar
    finally:
        for bar in bars:
            bar.close()


def resolve_commit(repository: str, revision: str, key: str, kind: RepositoryType) -> str:
    """The commit that a Hub revision stands for now, or did when last asked if the Hub is out of reach.

    Raises as `open_repository`; a revision that is a commit is returned as it is, unchecked.
    """
    with explained_hub_errors(repository, revision, key):
        return HfApi().resolve_revision(repository, repo_type=kind, revision=revision).resolved


@contextmanager
def explained_hub_errors(repository: str, revision: str, key: str) -> Iterator[None]:
    """Turns the Hub client's errors into ones that name the params key, its value and the remedy.

    Other OSErrors, such as a full disk, pass as they are.
    """
    place = f"{key}: {repository} at revision {revision}"
    try:
        yield
    except HFValidationError as error:
        raise ValueError(
            f"{key}: {repository!r} is no name on the Hub, which is `owner/name`. "
            "A local folder is written with a leading ./ or /"
        ) from error
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
    except (
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionResolutionError,
        HfHubHTTPError,
        httpx2.TransportError,
    ) as error:
        raise unreachable(error, place) from error


def unreachable(error: Exception, place: str) -> OSError:
    """What to tell a user when the Hub gave nothing and the cache has nothing."""
    cause = error.__cause__ or error
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        if status in REFUSED:
            return PermissionError(
                f"{place}: the Hub refuses access (status {status}); "
                "`hf auth login` with a token that may read it"
            )
        reason = f"answers with status {status}"
    else:
        reason = f"cannot be reached ({type(cause).__name__})"
    return ConnectionError(
        f"{place}: the Hub {reason} and the files are not in its cache. "
        "Check the network (HF_ENDPOINT, HF_HUB_OFFLINE), or select the recipe that needs none: "
        "`make recipe NAME=demo`"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sdxl_lora.sources",
        description="Prints the digest of a folder's content: the value of the `revision` key beside a "
        "`repository`, `base`, `vae` or `clip_model` of params.yaml that names a local folder.",
    )
    parser.add_argument("folder", type=Path, help="a data set or a model; hidden files do not count")
    folder = parser.parse_args().folder
    if not folder.is_dir():
        parser.error(f"{folder} is not a folder")
    sys.stdout.write(f"{folder_digest(folder)}\n")


if __name__ == "__main__":
    main()
