"""Atomic file writes, checks of disk space, and errors that say what to do about a full or read-only disk."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError, safe_open

GIB = 2**30
PARTIAL_GLOB = ".*-*"
"""Glob of the temporary files that a killed process leaves behind."""
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04")  # a pickle, and the ZIP archive of one that PyTorch writes
_FREE_SPACE = (
    "free some space (`dvc gc --workspace` deletes old results), then run again. "
    "If dvc.lock is empty: `git checkout dvc.lock`"
)
_ALLOW_WRITING = "give this user write access, or run in a writable copy of the project"
_REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EROFS: _ALLOW_WRITING,
    errno.EACCES: _ALLOW_WRITING,
    errno.EPERM: _ALLOW_WRITING,
}


@contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` at the end, or delete it after an error.

    Readers therefore see the previous file or the complete new one, never a part of it.

    Args:
        durable: flush the file to the disk before the rename, so that a power failure cannot leave a part of
            it either. Costs a wait for the disk.

    Raises:
        OSError: `path` cannot be written; names `path`, the cause and the remedy.
    """
    # In the same folder, because a rename is atomic only within one file system. The process id keeps two
    # processes that write the same file apart.
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            if durable:
                _sync(partial)
            partial.replace(path)
            if durable:
                _sync(path.parent)  # the new name is stored in the folder, not in the file
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until the content of a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file atomically. Raises as `atomic_write`."""
    with atomic_write(path, durable=durable) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically. Raises as `atomic_write`."""
    write_bytes(path, text.encode())


def require_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raise OSError unless `needed_bytes` are free on the disk of `folder`, which need not exist yet.

    Checked before the work starts, because DVC truncates dvc.lock to 0 bytes when the disk is full.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OSError(
            f"{folder}/ needs {needed_bytes / GIB:.2f} GiB and the disk has {free / GIB:.2f} GiB free: "
            f"{_FREE_SPACE}"
        )


def require_writable(folder: Path) -> None:
    """Raise OSError unless files can be created in `folder`, before the work for them begins.

    The error names `folder`, the cause and the remedy.
    """
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Replace errors of a full or read-only disk by an OSError that names `path` and the remedy.

    Needed because an OSError from an open file has no file name, and SafetensorError is not an OSError.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}): {_FREE_SPACE}") from error
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        raise with_remedy(error, path) from error


def require_safetensors(path: Path) -> None:
    """Raise ValueError unless `path` is a valid safetensors file; the error says so if it is a pickle."""
    try:
        with safe_open(path, "np"):  # "pt" would load torch
            pass
    except SafetensorError as error:
        with path.open("rb") as file:
            is_pickle = file.read(4).startswith(_PICKLE_STARTS)
        if is_pickle:
            reason = "is a pickle, which can run any code when it is loaded, not a safetensors file"
        else:
            reason = f"is not a valid safetensors file ({error})"
        raise ValueError(f"{path} {reason}: download or generate it again") from error


def with_remedy(error: OSError, path: Path | None = None) -> OSError:
    """Return `error` with a remedy added, or unchanged if there is none for it.

    Args:
        path: the file that was to be written; None: the one that the error names, if any.
    """
    if error.errno not in _REMEDIES:
        return error
    place = path or error.filename or "a file"
    return OSError(f"{place} cannot be written ({error.strerror}): {_REMEDIES[error.errno]}")
