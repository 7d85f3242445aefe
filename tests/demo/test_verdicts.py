"""Adapters made to fail: whether the evaluation of the embedded model notices."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from sdxl_lora import paths
from sdxl_lora.evaluation.gates import read_gate_failures
from stages import clean_captions, download_dataset, encode_dataset, evaluate_lora, sample_images, train_lora

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The demo's, made small, in a project of its own."""
    (tmp_path / "demo").symlink_to(Path("demo").resolve())
    recipe: dict[str, Any] = yaml.safe_load(Path("recipes/demo.yaml").read_text(encoding="utf-8"))
    recipe["training"].update(warmup_steps=2, preview_every=None, ema_decay=None)
    recipe["sampling"].update(
        prompts=recipe["sampling"]["prompts"][:6],
        training_captions=0,
        held_out_captions=0,
        strengths=[0.0, 1.0],
        num_inference_steps=10,
    )
    recipe["evaluation"].update(timesteps=[100, 500], noises=1, max_examples=8, resamples=200)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("SDXL_LORA_DEVICE", "cpu")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return recipe


def write(recipe: dict[str, Any]) -> None:
    paths.PARAMS.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def prepare_data(recipe: dict[str, Any]) -> list[str]:
    """Runs the stages before training; the captions that will be trained on."""
    write(recipe)
    for stage in (download_dataset, clean_captions, encode_dataset):
        stage.main()
    rows = [json.loads(line) for line in paths.ENCODED_INDEX.read_text(encoding="utf-8").splitlines()]
    return [row["caption"] for row in rows if row["split"] == "train"]


def train_and_judge() -> dict[str, Any]:
    for stage in (train_lora, sample_images, evaluate_lora):
        stage.main()
    metrics: dict[str, Any] = json.loads(paths.METRICS.read_text(encoding="utf-8"))
    return metrics


def test_adapter_trained_at_a_hundred_times_the_rate_fails_its_gates(recipe: dict[str, Any]) -> None:
    recipe["download"]["max_examples"] = 60
    recipe["training"].update(steps=30, learning_rate=100 * recipe["training"]["learning_rate"])
    prepare_data(recipe)
    gates = train_and_judge()["gates"]
    assert gates["all"] == 0
    assert [name for name, passed in gates.items() if passed] == ["copied"]  # what it draws is like nothing
    assert len(read_gate_failures(paths.GATES)) == 5


def test_adapter_that_knows_six_pictures_by_heart_is_caught_copying(recipe: dict[str, Any]) -> None:
    """Asked for what it was trained on, it draws each picture again; the base model draws its own.

    Asked for what it was not trained on, it copies nothing.
    """
    recipe["download"]["max_examples"] = 80
    recipe["encoding"]["held_out"] = 0.9
    recipe["training"].update(steps=100, learning_rate=0.003, schedule="constant", caption_dropout=0.0)
    captions = prepare_data(recipe)
    assert len(captions) == 6
    recipe["sampling"].update(prompts=captions, held_out_captions=2)
    write(recipe)
    metrics = train_and_judge()
    assert metrics["copied"]["adapter"] == 1.0
    assert metrics["held_out_captions"]["copied"]["adapter"] == 0.0
    assert metrics["gates"]["copied"] == metrics["gates"]["all"] == 0
    copies = pd.read_csv(paths.COPIES)
    copies = copies[copies["origin"] == "free"]
    adapter, base = copies[copies["strength"] == 1], copies[copies["strength"] == 0]
    assert adapter["training_image"].nunique() == 6
    assert adapter["similarity"].min() > 0.95
    assert base["similarity"].max() < 0.9
    assert read_gate_failures(paths.GATES)["copied"] == "copied.adapter is 1, should be at most 0.2"
