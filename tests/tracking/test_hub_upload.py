"""Publishing by the Hub's real client, in a process of its own, to a Hub on the loopback."""

import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from sdxl_lora import paths
from sdxl_lora.adapters.lineage import PREFIX, training_digest
from sdxl_lora.storage.safetensors_io import write_tensors
from tests.support.command import COMMAND
from tests.support.hub import Hub, serving_hub
from tests.support.patience import patience
from tests.support.tracked import write_gates
from tests.support.upload_hub import TOKEN, UploadHandler, Uploads

NAME = "someone/an-adapter"
CARD = "---\nlibrary_name: diffusers\n---\n# An adapter\n"
TIMEOUT = patience(20)  # seconds


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(tmp_path / "hub")


@pytest.fixture
def hub(uploads: Uploads) -> Iterator[Hub]:
    with serving_hub(partial(UploadHandler, uploads)) as server:
        yield server


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project with an adapter that passed its gates, exported."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    lock = {"stages": {"train_lora": {"deps": [], "params": {}, "outs": [{"path": "data/lora", "md5": "a"}]}}}
    paths.LOCK.write_text(yaml.safe_dump(lock))
    (paths.EXPORT / "images").mkdir(parents=True)
    paths.REPORTS.mkdir()
    write_gates(None)
    export()
    paths.CARD.write_text(CARD)
    for number in range(2):
        (paths.EXPORT / f"images/{number}.png").write_bytes(bytes([number]) * 100)


def export() -> None:
    facts = {f"{PREFIX}dvc.train_lora": training_digest(paths.LOCK)}
    write_tensors(paths.EXPORTED_WEIGHTS, {"weight": torch.ones(3)}, facts)


def publish(
    hub: Hub, *options: str, token: str = TOKEN, **environment: str
) -> subprocess.CompletedProcess[str]:
    """As a user does, with a token in the environment, and without Xet, which the server does not speak."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(Path.cwd() / "hf"),
    }
    command = [COMMAND, "push", NAME, *options]
    result = subprocess.run(
        command,
        env={**known, **own, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert token not in result.stdout + result.stderr
    return result


def test_repository_holds_what_was_exported_and_is_private(hub: Hub, uploads: Uploads) -> None:
    result = publish(hub)
    assert result.returncode == 0, result.stderr
    published = hub.repositories["models", NAME]
    exported = {p.relative_to(paths.EXPORT).as_posix(): p.read_bytes() for p in paths.EXPORT.rglob("*.*")}
    assert published.files == exported
    assert uploads.private == {NAME: True}
    assert len(uploads.large) == 3  # weights and images
    assert result.stdout == f"pushed: {hub.endpoint}/{NAME}/commit/{published.commit}\n"


def test_publishing_again_replaces_files_and_removes_old_images(hub: Hub, uploads: Uploads) -> None:
    assert publish(hub, "--public").returncode == 0
    assert uploads.private == {NAME: False}
    (paths.EXPORT / "images/1.png").unlink()
    paths.CARD.write_text(f"{CARD}Better.\n")
    result = publish(hub)
    assert result.returncode == 0, result.stderr
    files = hub.repositories["models", NAME].files
    assert set(files) == {paths.EXPORTED_WEIGHTS.name, "README.md", "images/0.png"}
    assert files["README.md"].endswith(b"Better.\n")


def test_adapter_that_fails_a_gate_is_published_by_force_alone(hub: Hub) -> None:
    write_gates("copied.adapter is 1, should be at most 0.1")
    refused = publish(hub)
    assert refused.returncode == 1
    assert refused.stderr.endswith("nothing was pushed:\n  copied.adapter is 1, should be at most 0.1\n")
    assert hub.requests == []
    assert publish(hub, "--force").returncode == 0
    assert ("models", NAME) in hub.repositories


def test_adapter_of_another_training_is_refused(hub: Hub) -> None:
    lock = yaml.safe_load(paths.LOCK.read_text())
    lock["stages"]["train_lora"]["outs"][0]["md5"] = "b"
    paths.LOCK.write_text(json.dumps(lock))
    refused = publish(hub)
    assert refused.returncode == 1
    assert "another adapter than dvc.lock" in refused.stderr
    assert hub.requests == []


def test_what_was_not_exported_names_the_stage_to_run(hub: Hub) -> None:
    paths.CARD.unlink()
    assert "dvc repro export_lora" in publish(hub).stderr


def test_refused_token_and_unreachable_hub_are_told_in_a_line(hub: Hub) -> None:
    refused = publish(hub, token="hf_another")
    assert "status 401: `hf auth login`" in refused.stderr
    closed = publish(hub, HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be reached (ConnectError)" in closed.stderr
    for result in (refused, closed):
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
