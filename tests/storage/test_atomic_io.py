import errno
import os
from pathlib import Path

import pytest

from sdxl_lora.runtime.stage import run_stage
from sdxl_lora.storage.atomic_io import (
    GIB,
    PARTIAL_GLOB,
    atomic_write,
    require_disk_space,
    require_writable,
    write_bytes,
    write_text,
)


def test_file_takes_its_place_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        assert partial.suffix == path.suffix
        assert partial.match(PARTIAL_GLOB)
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_durable_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    synced: list[tuple[Path, bool]] = []

    def fsync(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_bytes(path, b"whole")
    assert synced == []
    path.unlink()
    write_bytes(path, b"whole", durable=True)
    (partial, named), folder = synced
    assert partial.match(PARTIAL_GLOB)
    assert not named
    assert folder == (tmp_path, True)


def write_half(path: Path, error: BaseException) -> None:
    with atomic_write(path) as partial:
        partial.write_text("half")
        raise error


def failure(number: int) -> OSError:
    """As the system reports it of a file that is open already."""
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize("error", [failure(errno.ENOSPC), KeyboardInterrupt()])
def test_failure_leaves_what_was_there_and_no_half(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(type(error)):
        write_half(path, error)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "dvc gc"), (errno.EROFS, "write access"), (errno.EACCES, "write access")],
)
def test_error_names_file_cause_and_remedy(tmp_path: Path, number: int, remedy: str) -> None:
    path = tmp_path / "file.txt"
    with pytest.raises(OSError, match=rf"{path} cannot be written \({os.strerror(number)}\): .*{remedy}"):
        write_half(path, failure(number))


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="source"), atomic_write(tmp_path / "file.txt"):
        raise FileNotFoundError("source not found")


def test_stage_says_the_remedy_of_errors_that_nobody_explained(tmp_path: Path) -> None:
    def main() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    with pytest.raises(SystemExit, match=rf"{tmp_path} cannot be written .*: free some space"):
        run_stage(main)


def test_folder_that_can_be_written_to_stays_empty(tmp_path: Path) -> None:
    require_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    write_text(tmp_path / "file", "")
    with pytest.raises(OSError, match="file"):
        require_writable(tmp_path / "file")


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"needs 1048576.00 GiB and the disk has .* GiB free: free some space"):
        require_disk_space(tmp_path / "not" / "there" / "yet", 2**20 * GIB)
    require_disk_space(tmp_path, 1)
