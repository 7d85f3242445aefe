"""Repositories of the Hub: downloaded, found again in its client's cache, and what to do about errors."""

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

from sdxl_lora.storage.atomic_io import require_disk_space

_BYTES_ON_DISK = "huggingface_hub.snapshot_download"  # the client's name for the bar that is drawn
_BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
_REFUSED_STATUSES = (401, 403)
RepositoryType = Literal["model", "dataset"]


def download_snapshot(
    repository: str, revision: str, key: str, patterns: Sequence[str], kind: RepositoryType
) -> Path:
    """The local copy of a repository, with a progress bar on stderr while it is downloaded.

    Args:
        revision: commit, tag or branch.
        key: params key that names the repository, for error messages.
        patterns: files to download, as globs.

    Raises:
        FileNotFoundError: no such repository or revision.
        ConnectionError: the Hub cannot be reached and the files are not in its cache.
        PermissionError: the repository is gated, or the access token is refused.
        OSError: the disk has too little space.
        ValueError: the name is none.
    """
    needed_bytes = download_size(repository, revision, key, patterns, kind)
    require_disk_space(Path(constants.HF_HUB_CACHE), needed_bytes)
    with (
        _explain_hub_errors(repository, revision, key),
        _download_bar(repository, hidden=needed_bytes == 0) as bar,
    ):
        return Path(_snapshot(repository, revision, patterns, kind, tqdm_class=bar))


def cached_snapshot(
    repository: str, revision: str, patterns: Sequence[str], kind: RepositoryType
) -> Path | None:
    """What `download_snapshot` would find without a network, unchecked; None if it is not all here."""
    with suppress(HFValidationError, LocalEntryNotFoundError):
        return Path(_snapshot(repository, revision, patterns, kind, local_files_only=True))
    return None


def download_size(
    repository: str, revision: str, key: str, patterns: Sequence[str], kind: RepositoryType
) -> int:
    """Bytes that `download_snapshot` would download from the Hub now; 0 if the Hub cannot be asked.

    Raises as `download_snapshot`, but where the Hub is out of reach: only the download itself knows whether
    the cache has all that is needed.
    """
    with (
        _explain_hub_errors(repository, revision, key),
        suppress(DryRunError),
        _download_bar(repository, hidden=True) as bar,
    ):
        files = _snapshot(repository, revision, patterns, kind, dry_run=True, tqdm_class=bar)
        return sum(file.file_size or 0 for file in files if file.will_download)
    return 0


def _snapshot(
    repository: str, revision: str, patterns: Sequence[str], kind: RepositoryType, **options: Any
) -> Any:
    """The Hub client's snapshot of these files: their folder or, with `dry_run`, what each would cost."""
    return snapshot_download(
        repository, revision=revision, repo_type=kind, allow_patterns=list(patterns), **options
    )


@contextmanager
def _download_bar(title: str, hidden: bool) -> Iterator[type[tqdm]]:
    """The class of progress bars that the Hub's client is to make while it downloads `title` in the block.

    It makes one for the files, one for bytes on the network and one for bytes on the disk, whose total grows
    as files begin. Only the last is drawn, as `title`, with the time that is left. The client closes none.
    """
    bars: list[tqdm] = []

    class DownloadBar(tqdm):
        def __init__(self, *values: Any, name: str = "", **options: Any) -> None:
            ours = {"desc": title, "bar_format": _BAR_FORMAT, "disable": hidden or name != _BYTES_ON_DISK}
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


def resolve_hub_revision(repository: str, revision: str, key: str, kind: RepositoryType) -> str:
    """The commit that a Hub revision stands for now, or did when last asked if the Hub is out of reach.

    Raises as `download_snapshot`; a revision that is a commit is returned as it is, unchecked.
    """
    with _explain_hub_errors(repository, revision, key):
        return HfApi().resolve_revision(repository, repo_type=kind, revision=revision).resolved


@contextmanager
def _explain_hub_errors(repository: str, revision: str, key: str) -> Iterator[None]:
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
        raise _unreachable(error, place) from error


def _unreachable(error: Exception, place: str) -> OSError:
    """What to tell a user when the Hub gave nothing and the cache has nothing."""
    cause = error.__cause__ or error
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        if status in _REFUSED_STATUSES:
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
