"""Bad input, as a user meets it: stages and commands as processes of their own."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdxl_lora.cli.recipe import select
from sdxl_lora.cli.ui import HOST
from sdxl_lora.config import load_params
from sdxl_lora.storage.repository import folder_digest, open_folder
from tests.support.command import COMMAND
from tests.support.patience import patience

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project with the demo recipe selected and no results."""
    for name in ("src", "stages", "recipes"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "demo" / "dataset", tmp_path / "demo" / "dataset")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    select("demo")


def edit(old: str, new: str) -> None:
    path = Path("params.yaml")
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def attempt(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=patience(30), check=False
    )


def error_of(*command: str) -> str:
    """What a command that fails as it should says."""
    result = attempt(*command)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_every_faulty_key_is_named() -> None:
    edit("  caption_column: text", "  captoin_column: text")
    edit("  min_words: 2", "  min_words: two")
    message = error_of(sys.executable, "-m", "stages.download_dataset")
    assert message.startswith("download_dataset: params.yaml does not fit the schema")
    assert "download.captoin_column: unknown key; did you mean `caption_column`?" in message
    assert "captions.min_words: Input should be a valid integer" in message


def test_missing_data_set_folder_names_the_key() -> None:
    shutil.rmtree("demo/dataset")
    message = error_of(sys.executable, "-m", "stages.download_dataset")
    assert "download.repository: folder ./demo/dataset not found" in message


def test_changed_data_set_folder_is_refused_with_its_digest() -> None:
    pinned = load_params().download.revision
    Path("demo/dataset/metadata.jsonl").write_text("changed")
    with pytest.raises(ValueError, match="does not match its revision") as caught:
        open_folder("./demo/dataset", pinned, "download.repository")
    assert folder_digest(Path("demo/dataset")) in str(caught.value)


def test_failed_download_leaves_the_earlier_results() -> None:
    Path("data/raw").mkdir(parents=True)
    Path("data/raw/captions.jsonl").write_text("earlier")
    next(Path("demo/dataset/images").iterdir()).unlink()
    error_of(sys.executable, "-m", "stages.download_dataset")
    assert Path("data/raw/captions.jsonl").read_text() == "earlier"


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build may find a GPU")
def test_recipe_for_a_gpu_says_without_one_what_it_needs() -> None:
    select("sdxl-naruto-16gb")
    message = error_of(sys.executable, "-m", "stages.train_lora")
    assert "training.vram_gib is 13.8: this recipe needs a CUDA GPU" in message
    assert "make recipe NAME=demo" in message
    assert not Path("mlflow.db").exists()


def test_port_in_use_names_another() -> None:
    Path("mlflow.db").touch()
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        message = error_of(COMMAND, "ui", "--port", str(port))
    assert f"port {port} on {HOST} cannot be used" in message
    assert f"`sdxl-lora ui --port {port + 1}`" in message


def test_page_without_a_run_says_how_to_make_one() -> None:
    assert "`make demo`" in error_of(COMMAND, "ui", "--port", "0")


def test_summary_without_results_names_the_stage_to_run() -> None:
    assert "dvc repro evaluate_lora" in error_of(COMMAND, "summary")
