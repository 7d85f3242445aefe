"""Proposals of `make plan`, by following them as a user would: by what they say to write into params."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from sdxl_lora.config import Params, load_params
from sdxl_lora.memory.inference_forecast import fits, trace_encoding, trace_sampling
from sdxl_lora.memory.planner import Planner
from sdxl_lora.memory.savings import lower, minimum_memory_with
from sdxl_lora.memory.training_forecast import TrainingSpec
from sdxl_lora.models.architecture import read_architecture
from sdxl_lora.storage.atomic_io import GIB

Rows = list[tuple[str, str, float]]
STEP = 0.1  # GiB, of the figures


@pytest.fixture(scope="module")
def params() -> Params:
    """The demo with larger pictures and batches, so that there is something to save."""
    params = load_params(Path("recipes/demo.yaml"))
    changes = {
        "model": {"text_encoders": "trained"},
        "training": {"precision": "fp16", "batch_size": 1, "preview_every": 5},
        "sampling": {"resolution": 1024, "batch_size": 8},
        "encoding": {"resolution": 1024, "batch_size": 4, "vae_tile": None},
    }
    sections = {name: getattr(params, name).model_copy(update=keys) for name, keys in changes.items()}
    return params.model_copy(update=sections)


def work_of(params: Params) -> TrainingSpec:
    shapes, side = read_architecture(params.model), params.encoding.resolution // 8
    trained = params.model.text_encoders != "frozen"
    return TrainingSpec(shapes, trained, params.lora, params.training, torch.Size((1, 4, side, side)))


@pytest.fixture(scope="module")
def rows(params: Params) -> Rows:
    return list(minimum_memory_with(params, work_of(params), {"train", "sample", "encode"}))


def followed(params: Params, name: str) -> Params:
    """Params with what a row says written into them."""
    if name == "as it is":
        return params
    key, value = name.split()
    section, key = key.split(".")
    changed = getattr(params, section).model_copy(update={key: yaml.safe_load(value)})
    return params.model_copy(update={section: changed})


def goes_through(params: Params, phase: str) -> Callable[[float], bool]:
    """Whether a phase does, with so many GiB."""
    work = work_of(params)
    match phase:
        case "train":
            planner = Planner(work)
            return lambda gib: planner.fastest(gib * GIB) is not None
        case "sample":
            trace = trace_sampling(work.shapes, params)
        case _:
            trace = trace_encoding(work.shapes, params)
    return lambda gib: fits(trace, gib * GIB)


def test_each_change_needs_what_its_row_says(params: Params, rows: Rows) -> None:
    single = [row for row in rows if row[1] != "all of these"]
    assert len(single) >= 3 + 4 + 2
    for phase, name, least in single:
        does = goes_through(followed(params, name), phase)
        assert does(least), (phase, name)
        assert not does(least - STEP), (phase, name)


def test_no_change_needs_more_and_all_need_the_least(rows: Rows) -> None:
    for phase in ("train", "sample", "encode"):
        first, *others = [(name, least) for own, name, least in rows if own == phase]
        assert first[0] == "as it is"
        assert others[-1][0] == "all of these"
        assert all(others[-1][1] <= least <= first[1] for _, least in others)
        assert others[-1][1] < first[1]


def test_phases_that_nobody_asks_for_are_left_out(params: Params) -> None:
    assert {phase for phase, _, _ in minimum_memory_with(params, work_of(params), {"encode"})} == {"encode"}


@pytest.mark.parametrize(("resolution", "expected"), [(1024, 768), (512, 384), (128, 64), (64, 0)])
def test_lower_resolution_is_on_the_grid(resolution: int, expected: int) -> None:
    assert lower(resolution) == expected
