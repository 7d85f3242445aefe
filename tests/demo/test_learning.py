"""The demo in a minute: its stages on the embedded model and pictures, with few steps, must learn the style.

Each margin is half of what the worst of three seeds learned (docs/experiments.md, 2026-11-24).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxl_lora import paths
from sdxl_lora.storage.report_io import read_numbers
from stages import clean_captions, download_dataset, encode_dataset, evaluate_lora, sample_images, train_lora

REPOSITORY = Path(__file__).parents[2]
STAGES = (download_dataset, clean_captions, encode_dataset, train_lora, sample_images, evaluate_lora)
SHORTER: dict[str, dict[str, Any]] = {
    "training": {"steps": 60, "warmup_steps": 5, "ema_decay": None, "preview_every": None},
    "sampling": {
        "prompts": [
            "red apple, fluent 3d style",
            "dog face, fluent 3d style",
            "pizza, fluent 3d style",
            "rocket, fluent 3d style",
            "red heart, fluent 3d style",
            "house, fluent 3d style",
        ],
        "strengths": [0.0, 1.0],
        "num_inference_steps": 12,
    },
    "evaluation": {"timesteps": [100, 500], "noises": 1},
}


def run_demo(folder: Path, seed: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs the stages in `folder`; the metrics."""
    (folder / "demo").symlink_to(REPOSITORY / "demo")
    params = yaml.safe_load((REPOSITORY / "recipes/demo.yaml").read_text(encoding="utf-8"))
    for section, changes in SHORTER.items():
        params[section].update(changes)
    patch.chdir(folder)
    patch.setenv("DVC_ROOT", str(folder))
    patch.setenv("SDXL_LORA_DEVICE", "cpu")
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    paths.PARAMS.write_text(yaml.safe_dump({**params, "seed": seed}), encoding="utf-8")
    for stage in STAGES:
        stage.main()
    return read_numbers(paths.METRICS, "evaluate_lora")


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        yield run_demo(tmp_path_factory.mktemp("demo"), 0, patch)


def test_held_out_loss_falls(metrics: dict[str, Any]) -> None:
    losses = metrics["held_out_loss"]
    assert losses["adapter"] < 0.72 * losses["base"]


def test_style_is_learned(metrics: dict[str, Any]) -> None:
    style = metrics["style_probability"]
    assert style["base"] < 0.15
    assert style["adapter"] > style["base"] + 0.44


def test_pictures_still_show_what_was_asked_for(metrics: dict[str, Any]) -> None:
    assert metrics["retrieval_at_1"]["base"] == 1
    assert metrics["retrieval_at_1"]["adapter"] >= 5 / 6
