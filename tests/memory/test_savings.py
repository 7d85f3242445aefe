"""Hints of `make plan`, by following them as a user would: by writing what they say into params."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sdxl_lora.config import Params, load_params
from sdxl_lora.memory.inference_forecast import forecast_inference, trace_encoding, trace_sampling
from sdxl_lora.memory.planner import Planner
from sdxl_lora.memory.savings import _lower, minimum_memory_with
from sdxl_lora.memory.training_trace import TrainingSpec
from sdxl_lora.models.architecture import read_architecture

PHASES = ("train", "sample", "encode")


def changed(params: Params, changes: dict[str, dict[str, Any]]) -> Params:
    sections = {name: getattr(params, name).model_copy(update=keys) for name, keys in changes.items()}
    return params.model_copy(update=sections)


def followed(params: Params, setting: str) -> Params:
    """Params with a hint written into them."""
    name, value = setting.split()
    section, key = name.split(".")
    return changed(params, {section: {key: yaml.safe_load(value)}})


@pytest.fixture(scope="module")
def params() -> Params:
    """The demo with larger images and batches, so that every hint applies."""
    training = {"batch_size": 4, "micro_batch_size": 4, "checkpointing": "none", "preview_every": 5}
    changes: dict[str, dict[str, Any]] = {
        "model": {"text_encoders": "trained"},
        "training": {"precision": "fp16", **training},
        "sampling": {"resolution": 1024, "batch_size": 8},
        "encoding": {"resolution": 1024, "batch_size": 4, "vae_tile": None},
    }
    return changed(load_params(Path("recipes/demo.yaml")), changes)


def peak(params: Params, phase: str) -> int:
    """Bytes of a phase at its peak."""
    shapes, side = read_architecture(params.model), params.encoding.resolution // 8
    if phase == "train":
        trained, size = params.model.text_encoders != "frozen", torch.Size((1, 4, side, side))
        return (
            Planner(TrainingSpec(shapes, trained, params.lora, params.training, size))
            .smallest()
            .forecast.total
        )
    trace = trace_sampling(shapes, params) if phase == "sample" else trace_encoding(shapes, params)
    return forecast_inference(trace).total


@pytest.mark.parametrize(("phase", "count"), [("train", 6), ("sample", 2), ("encode", 2)])
def test_each_hint_lowers_the_memory_of_its_phase(params: Params, phase: str, count: int) -> None:
    settings = [setting for name, setting in minimum_memory_with(params, PHASES) if name == phase]
    assert len(settings) == count
    before = peak(params, phase)
    for setting in settings:
        assert peak(followed(params, setting), phase) < before, setting


@pytest.mark.parametrize("phase", PHASES)
def test_hint_that_was_followed_is_not_given_again(params: Params, phase: str) -> None:
    settings = [setting for _, setting in minimum_memory_with(params, {phase})]
    for setting in settings:
        if "resolution" not in setting:  # there is a lower one still
            params = followed(params, setting)
    (left,) = [setting for _, setting in minimum_memory_with(params, {phase})] or [""]
    assert left == next((setting for setting in settings if "resolution" in setting), "")


def test_phases_that_are_not_asked_for_are_left_out(params: Params) -> None:
    assert {phase for phase, _ in minimum_memory_with(params, {"encode"})} == {"encode"}


@pytest.mark.parametrize(("resolution", "expected"), [(1024, 768), (512, 384), (128, 64), (64, 0)])
def test_lower_resolution_is_on_the_grid(resolution: int, expected: int) -> None:
    assert _lower(resolution) == expected
