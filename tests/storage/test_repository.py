"""Repositories from a Hub on the loopback, and from folders."""

import gc
import re
import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from sdxl_lora.storage.hub_client import download_size, resolve_hub_revision
from sdxl_lora.storage.repository import find_local_copy, folder_digest, open_folder, open_repository
from tests.support.hub import Hub

KEY = "model.base"
NO_TENSORS = b"\2\0\0\0\0\0\0\0{}"
FILES = {"config.json": b"{}", "unet/weights.safetensors": NO_TENSORS, "unet/weights.bin": b"pickle"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the repository owner/model holds."""
    for name, content in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "model"


def open_model(*patterns: str, revision: str = "main") -> Path:
    return open_repository("owner/model", revision, KEY, patterns or ("*.json", "unet/*.safetensors"))


def test_only_the_files_asked_for_are_downloaded(hub: Hub, folder: Path) -> None:
    hub.add("owner/model", folder)
    snapshot = open_model()
    assert (snapshot / "unet/weights.safetensors").read_bytes() == FILES["unet/weights.safetensors"]
    assert sorted(hub.downloads()) == ["owner/model/config.json", "owner/model/unet/weights.safetensors"]


def test_second_opening_downloads_nothing(hub: Hub, folder: Path) -> None:
    hub.add("owner/model", folder)
    first = open_model()
    hub.requests.clear()
    assert open_model() == first
    assert hub.downloads() == []


def test_download_shows_its_bytes_and_the_time_left(
    hub: Hub, folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hub.add("owner/model", folder)
    with caplog.at_level("INFO", "sdxl_lora"):
        open_model()
    assert caplog.messages == ["downloading owner/model (0.00 GiB)"]
    gc.collect()  # the client draws its bar of bytes for the last time when it is deleted
    bars = capfd.readouterr().err
    assert re.search(r"Fetching 2 files: 100%.* 2/2 \[\d\d:\d\d<00:00, ", bars)
    assert re.search(r"100%.* 12\.0B / +12\.0B", bars)


def test_opening_from_the_cache_shows_nothing(
    hub: Hub, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.add("owner/model", folder)
    open_model()
    gc.collect()  # the client closes two of its bars when they are deleted
    capfd.readouterr()
    open_model()
    gc.collect()
    assert capfd.readouterr().err == ""


def test_full_disk_is_told_before_anything_is_downloaded(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("owner/model", folder)
    usage = shutil.disk_usage(folder)._replace(free=9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="GiB free"):
        open_model()
    assert hub.downloads() == []


def test_pinned_commit_opens_without_the_hub(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add("owner/model", folder).commit
    snapshot = open_model(revision=commit)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert open_model(revision=commit) == snapshot


def test_branch_resolves_to_its_commit(hub: Hub, folder: Path) -> None:
    repository = hub.add("owner/model", folder)
    assert resolve_hub_revision("owner/model", "main", KEY, "model") == repository.commit


def test_size_counts_what_is_not_in_the_cache_yet(hub: Hub, folder: Path) -> None:
    hub.add("owner/model", folder)
    patterns = ("*.json", "unet/*.safetensors")
    assert download_size("owner/model", "main", KEY, patterns, "model") == 2 + len(NO_TENSORS)
    open_model()
    assert download_size("owner/model", "main", KEY, patterns, "model") == 0


def test_repository_of_pickles_alone_is_refused_and_none_is_downloaded(hub: Hub, folder: Path) -> None:
    (folder / "unet/weights.safetensors").unlink()
    hub.add("owner/model", folder)
    with pytest.raises(FileNotFoundError, match=r"model\.base: .*Only safetensors are read"):
        open_model()
    assert "owner/model/unet/weights.bin" not in hub.downloads()


def test_unknown_revision_names_the_key_and_the_revision(hub: Hub, folder: Path) -> None:
    hub.add("owner/model", folder)
    with pytest.raises(FileNotFoundError, match=r"model\.base: owner/model at revision v9: no such revision"):
        open_model(revision="v9")


def test_unknown_repository_is_said_to_be_so(hub: Hub) -> None:
    assert hub.repositories == {}
    with pytest.raises(FileNotFoundError, match=r"no such repository.*\./owner/model"):
        open_model()


def test_gated_repository_says_what_to_accept(hub: Hub, folder: Path) -> None:
    hub.add("owner/model", folder)
    hub.fail("owner/model", 403, "GatedRepo", "Access to model owner/model is restricted")
    with pytest.raises(PermissionError, match=r"accept its terms.*hf auth login"):
        open_model()


def test_refused_token_says_to_log_in(hub: Hub, folder: Path) -> None:
    hub.add("owner/model", folder)
    hub.fail("owner/model", 403)
    with pytest.raises(PermissionError, match=r"refuses access \(status 403\).*hf auth login"):
        open_model()


def test_hub_that_fails_gives_its_status(hub: Hub, folder: Path) -> None:
    hub.add("owner/model", folder)
    hub.fail("owner/model", 500)
    with pytest.raises(ConnectionError, match=r"the Hub answers with status 500"):
        open_model()


def test_no_network_names_the_recipe_that_needs_none(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    assert closed != hub.endpoint
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    with pytest.raises(ConnectionError, match=r"cannot be reached.*make recipe NAME=demo"):
        open_model()


def test_name_that_the_hub_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="is not a Hub repository id"):
        open_repository("a/b/c", "main", KEY)


def test_folder_is_opened_by_its_digest_alone(folder: Path) -> None:
    assert open_repository(str(folder), folder_digest(folder), KEY) == folder
    with pytest.raises(ValueError, match="does not match its revision"):
        open_folder(str(folder), "sha256:0", KEY)


def test_digest_tells_names_and_contents_apart_and_skips_hidden_files(folder: Path) -> None:
    digest = folder_digest(folder)
    (folder / ".cache").mkdir()
    (folder / ".cache/index").write_text("x")
    assert folder_digest(folder) == digest
    (folder / "config.json").rename(folder / "other.json")
    renamed = folder_digest(folder)
    assert renamed != digest
    (folder / "other.json").write_text("[]")
    assert folder_digest(folder) not in (digest, renamed)


def test_local_copy_is_found_without_asking_the_hub(hub: Hub, folder: Path) -> None:
    repository = hub.add("owner/model", folder)
    patterns = ("*.json", "unet/*.safetensors")
    assert find_local_copy("owner/model", repository.commit, patterns) is None
    snapshot = open_model(revision=repository.commit)
    hub.requests.clear()
    assert find_local_copy("owner/model", repository.commit, patterns) == snapshot
    assert find_local_copy("owner/model", repository.commit, ("unet/*",)) is None, "the download left one out"
    assert find_local_copy("owner/model", "0" * 40) is None
    assert find_local_copy(str(folder), "sha256:0") == folder
    assert find_local_copy(str(folder / "none"), "sha256:0") is None
    assert hub.requests == []
