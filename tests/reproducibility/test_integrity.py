"""Local copies against their pins: a folder, and what a Hub on the loopback sent."""

import hashlib
from pathlib import Path

import pytest

from sdxl_lora.reproducibility.integrity import check_pin, damaged_files
from sdxl_lora.storage.repository import folder_digest, open_repository
from tests.support.hub import Hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the repository owner/data holds."""
    path = tmp_path / "data"
    path.mkdir()
    (path / "metadata.jsonl").write_text("{}")
    (path / "0.png").write_bytes(b"picture")
    return path


@pytest.mark.parametrize("name", ["metadata.jsonl", "0.png"])
def test_file_of_the_hubs_cache_that_is_not_what_was_sent_is_named(hub: Hub, folder: Path, name: str) -> None:
    commit = hub.add("owner/data", folder, "datasets").commit
    copy = open_repository("owner/data", commit, "download.repository", kind="dataset")
    assert check_pin("data", "owner/data", commit, copy).status == "pass"
    for damage in (lambda path: path.write_bytes(b"other"), Path.unlink):
        damage((copy / name).resolve())
        check = check_pin("data", "owner/data", commit, copy)
        assert (check.status, check.detail) == ("fail", f"damaged: {name}")
        assert "Hub's cache" in check.remedy, "git has no copy of it"


def test_weights_in_the_cache_are_known_by_their_sha256(tmp_path: Path) -> None:
    """As the Hub names what it keeps in LFS; the server above keeps nothing there."""
    blob = tmp_path / "blobs" / hashlib.sha256(b"weights").hexdigest()
    link = tmp_path / "snapshots/c0ffee/unet/model.safetensors"
    for folder in (blob.parent, link.parent):
        folder.mkdir(parents=True)
    blob.write_bytes(b"weights")
    link.symlink_to(blob)
    assert damaged_files(tmp_path / "snapshots/c0ffee") == []
    blob.write_bytes(b"Weights")
    assert damaged_files(tmp_path / "snapshots/c0ffee") == ["unet/model.safetensors"]


def test_folder_is_held_against_its_digest(folder: Path) -> None:
    pin = folder_digest(folder)
    assert check_pin("data", str(folder), pin, folder).status == "pass"
    (folder / "metadata.jsonl").write_text("[]")
    check = check_pin("data", str(folder), pin, folder)
    assert (check.status, check.remedy) == ("fail", f"`git checkout {folder}`")


def test_what_is_not_here_is_no_failure() -> None:
    check = check_pin("data", "owner/data", "c0ffee", None)
    assert (check.status, check.detail) == ("warn", "owner/data at c0ffee is missing or incomplete")
