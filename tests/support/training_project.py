"""A project in the current folder that is ready for train_lora: the demo's model, eight encoded examples."""

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxl_lora import paths
from sdxl_lora.config import load_params
from tests.support.encoded import write_encoded_dataset
from tests.support.patience import patience

REPOSITORY = Path(__file__).parents[2]


def enter_project(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Makes the project and goes there; returns the demo recipe, cut to three steps, to be written."""
    (folder / "demo").symlink_to(REPOSITORY / "demo")
    recipe: dict[str, Any] = yaml.safe_load((REPOSITORY / "recipes/demo.yaml").read_text(encoding="utf-8"))
    recipe["training"].update(steps=3, batch_size=2, warmup_steps=1, log_every=2, preview_every=None)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    monkeypatch.setenv("SDXL_LORA_DEVICE", "cpu")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("sdxl_lora.tracking.live_run.PATIENCE_SECONDS", patience(5))
    paths.DATA.mkdir()
    write_encoded_dataset(paths.ENCODED, load_params(REPOSITORY / "recipes/demo.yaml").model)
    paths.REPORTS.mkdir()
    return recipe


def write_params(recipe: dict[str, Any], **training: Any) -> None:
    """Writes the recipe as params.yaml, with these keys of `training` changed for good."""
    recipe["training"].update(training)
    paths.PARAMS.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
