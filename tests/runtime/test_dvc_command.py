"""DVC's command line and remote, by the real DVC."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
from dvc.exceptions import DvcException

from sdxl_lora.runtime.dvc_command import (
    cache_folder,
    cached_folder_digests,
    dvc_environment,
    run_dvc,
    write_to_remote,
)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project without a remote, as the working folder."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_text("[core]\n    no_scm = True\n", encoding="utf-8")
    return root


def test_commands_use_the_projects_library_and_forget_the_dvc_around_them(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", "/elsewhere")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    environment = dvc_environment(project)
    assert "DVC_ROOT" not in environment
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(project / "src"), str(project), "/mine"]
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_digests_of_a_tracked_folder_come_from_the_cache(project: Path) -> None:
    (project / "folder").mkdir()
    for name in ("a", "b"):
        (project / "folder" / name).write_text(name, encoding="utf-8")
    assert run_dvc(project, "add", "folder").returncode == 0
    digest = (project / "folder.dvc").read_text(encoding="utf-8").split("md5: ")[1].split()[0]
    assert cached_folder_digests(digest) == {hashlib.md5(name.encode()).hexdigest() for name in ("a", "b")}
    assert cached_folder_digests("0" * 32 + ".dir") is None


def test_cache_may_lie_elsewhere(project: Path, tmp_path: Path) -> None:
    listing = tmp_path / "shared/files/md5/12/3.dir"
    listing.parent.mkdir(parents=True)
    listing.write_text(json.dumps([{"md5": "1", "relpath": "a"}]), encoding="utf-8")
    settings = f"[core]\n    no_scm = True\n[cache]\n    dir = {tmp_path}/shared\n"
    (project / ".dvc/config").write_text(settings, encoding="utf-8")
    assert cache_folder(project) == tmp_path / "shared"
    assert cached_folder_digests("123.dir") == {"1"}


def test_folder_outside_a_project_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cache_folder(Path()) is None
    assert cached_folder_digests("123.dir") is None


def test_remote_is_written_and_left_empty(project: Path, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    settings = f"[core]\n    no_scm = True\n    remote = local\n['remote \"local\"']\n    url = {remote}\n"
    (project / ".dvc/config").write_text(settings, encoding="utf-8")
    assert write_to_remote(project) == "local"
    assert list(remote.iterdir()) == []
    remote.rmdir()
    remote.write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(OSError, match="remote"):
        write_to_remote(project)


def test_project_without_a_remote_is_told(project: Path) -> None:
    with pytest.raises(DvcException):
        write_to_remote(project)
