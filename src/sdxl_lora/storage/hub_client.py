"""Downloads from the Hugging Face Hub, look-ups in its client's cache, and errors that name the remedy."""

import logging
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
from huggingface_hub.utils.tqdm import disable_progress_bars
from tqdm.auto import tqdm

from sdxl_lora.storage.atomic_io import GIB, require_disk_space

_REFUSED_STATUSES = (401, 403)
RepositoryType = Literal["model", "dataset"]

logger = logging.getLogger(__name__)


def download_snapshot(
    repository: str, revision: str, key: str, patterns: Sequence[str], kind: RepositoryType
) -> Path:
    """Return the local copy of a Hub repository; download what is missing, with progress bars on stderr.

    Args:
        revision: commit, tag or branch.
        key: params key that names the repository, for error messages.
        patterns: files to download, as globs.

    Raises:
        FileNotFoundError: the repository or revision does not exist.
        ConnectionError: the Hub cannot be reached and the files are not in the cache.
        PermissionError: the repository is gated, or the access token is refused.
        OSError: the disk has too little space.
        ValueError: `repository` is not a Hub repository id.
    """
    needed_bytes = download_size(repository, revision, key, patterns, kind)
    require_disk_space(Path(constants.HF_HUB_CACHE), needed_bytes)
    if needed_bytes:
        logger.info("downloading %s (%.2f GiB)", repository, needed_bytes / GIB)
    # The client's own bars, but as plain tqdm, which ignores HF_HUB_DISABLE_PROGRESS_BARS. Stages set that
    # variable because transformers obeys it, too, and would show a bar for each model that it loads.
    bars = {"tqdm_class": tqdm} if needed_bytes else {}
    with _explain_hub_errors(repository, revision, key):
        return Path(_snapshot(repository, revision, patterns, kind, **bars))


def cached_snapshot(
    repository: str, revision: str, patterns: Sequence[str], kind: RepositoryType
) -> Path | None:
    """Return the cached copy without asking the Hub or checking its content; None if it is incomplete."""
    with suppress(HFValidationError, LocalEntryNotFoundError):
        return Path(_snapshot(repository, revision, patterns, kind, local_files_only=True))
    return None


def download_size(
    repository: str, revision: str, key: str, patterns: Sequence[str], kind: RepositoryType
) -> int:
    """Return the number of bytes that `download_snapshot` would download now; 0 if the Hub cannot be reached.

    Raises as `download_snapshot`, except if the Hub cannot be reached: only the download itself knows
    whether the cache has all files.
    """
    with _explain_hub_errors(repository, revision, key), suppress(DryRunError):
        files = _snapshot(repository, revision, patterns, kind, dry_run=True)
        return sum(file.file_size or 0 for file in files if file.will_download)
    return 0


def _snapshot(
    repository: str, revision: str, patterns: Sequence[str], kind: RepositoryType, **options: Any
) -> Any:
    """Call the Hub client; return the snapshot's folder or, with `dry_run`, what each file would cost.

    Shows no bars but those of the option `tqdm_class`.
    """
    with disable_progress_bars():
        return snapshot_download(
            repository, revision=revision, repo_type=kind, allow_patterns=list(patterns), **options
        )


def resolve_hub_revision(repository: str, revision: str, key: str, kind: RepositoryType) -> str:
    """Return the commit that a Hub revision means now, or meant when last asked if the Hub is out of reach.

    A revision that is a commit is returned unchecked. Raises as `download_snapshot`.
    """
    with _explain_hub_errors(repository, revision, key):
        return HfApi().resolve_revision(repository, repo_type=kind, revision=revision).resolved


@contextmanager
def _explain_hub_errors(repository: str, revision: str, key: str) -> Iterator[None]:
    """Replace the Hub client's errors by ones that name the params key, its value and the remedy.

    Other OSErrors, such as a full disk, pass unchanged.
    """
    place = f"{key}: {repository} at revision {revision}"
    try:
        yield
    except HFValidationError as error:
        raise ValueError(
            f"{key}: {repository!r} is not a Hub repository id (expected `owner/name`). "
            "Write a local folder with a leading ./ or /"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{place}: no such revision on the Hub; set the revision of {key} to a commit, tag or branch"
        ) from error
    except GatedRepoError as error:
        raise PermissionError(
            f"{place}: the repository is gated; accept its terms on the Hub, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{place}: no such repository, or a private one; correct {key}, or `hf auth login`. "
            f"Write a local folder as ./{repository}"
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
    """Return the error for files that neither the Hub nor the cache provides."""
    cause = error.__cause__ or error
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        if status in _REFUSED_STATUSES:
            return PermissionError(
                f"{place}: the Hub refuses access (status {status}); "
                "`hf auth login` with a token that has read access"
            )
        reason = f"answers with status {status}"
    else:
        reason = f"cannot be reached ({type(cause).__name__})"
    return ConnectionError(
        f"{place}: the Hub {reason} and the files are not in its cache. "
        "Check the network (HF_ENDPOINT, HF_HUB_OFFLINE), or select the recipe that needs no network: "
        "`make recipe NAME=demo`"
    )
