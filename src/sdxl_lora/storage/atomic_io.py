"""Files that are written whole or not at all; what to say if one cannot be written, or must not be read."""

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
"""Names, as a glob, of files that killed processes were writing whole."""
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04")  # a pickle, and the ZIP archive of one that PyTorch writes
_FREE_SPACE = (
    "free some (`dvc gc --workspace` drops old results), then run again. "
    "If dvc.lock is empty: `git checkout dvc.lock`"
)
_ALLOW_WRITING = "let this user write there, or run in a copy of the project that may be written to"
_REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EROFS: _ALLOW_WRITING,
    errno.EACCES: _ALLOW_WRITING,
    errno.EPERM: _ALLOW_WRITING,
}


@contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place if the block ends well, and goes if not.

    Args:
        durable: all of it is on the disk before it takes its place, so that a power failure cannot leave half
            of it there either. Costs a wait for the disk.

    Raises:
        OSError: it cannot be written; names `path`, the cause and the remedy.
    """
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            if durable:
                _sync(partial)
            partial.replace(path)
            if durable:
                _sync(path.parent)  # which holds the name
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Raises as `atomic_write`."""
    with atomic_write(path, durable=durable) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Raises as `atomic_write`."""
    write_bytes(path, text.encode())


def require_disk_space(folder: Path, needed_bytes: int) -> None:
    """Refuses to start writing what will not fit: a full disk truncates dvc.lock to 0 bytes.

    Raises:
        OSError: less than `needed_bytes` are free where `folder` lies.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OSError(
            f"{folder}/ needs {needed_bytes / GIB:.2f} GiB and the disk has {free / GIB:.2f} GiB free: "
            f"{_FREE_SPACE}"
        )


def require_writable(folder: Path) -> None:
    """Refuses a folder that a result could not be written to, before the work for it begins.

    Raises:
        OSError: names `folder`, the cause and the remedy.
    """
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turns the errors of a disk that is full or may not be written to into ones that say what to do.

    The system's own name no file if it was open already; safetensors' are no OSErrors.
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
    """Refuses a file that is not what its name says, a pickle before all.

    Raises:
        ValueError: names `path`, and what to do.
    """
    try:
        with safe_open(path, "np"):  # "pt" would load torch
            pass
    except SafetensorError as error:
        with path.open("rb") as file:
            is_pickle = file.read(4).startswith(_PICKLE_STARTS)
        reason = "a pickle, which can run any code as it is loaded" if is_pickle else f"damaged ({error})"
        raise ValueError(
            f"{path} is no safetensors file but {reason}: take it anew from its source"
        ) from error


def with_remedy(error: OSError, path: Path | None = None) -> OSError:
    """`error` with its remedy, if there is one for it.

    Args:
        path: what was to be written; None: only the error itself may know.
    """
    if error.errno not in _REMEDIES:
        return error
    place = path or error.filename or "a file"
    return OSError(f"{place} cannot be written ({error.strerror}): {_REMEDIES[error.errno]}")
