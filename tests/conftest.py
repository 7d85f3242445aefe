"""Tests that need a GPU are skipped where there is none; those that need a Hub get one of their own."""

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

# Before torch is imported. Spinning threads starve a busy machine; so do several workers with all cores each.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from huggingface_hub import constants
from hypothesis import settings

from tests.support.hub import Hub, serving_hub
from tests.support.interpreter import KERNEL_DEVICES, torch_device
from tests.support.patience import TEST_SECONDS, patience

LONG = {"pipeline", "reproducibility", "stages"}
"""Folders of tests that run programs of the project for seconds to minutes."""

settings.register_profile("busy machine", deadline=None)  # else an example fails that takes 200 ms
settings.load_profile("busy machine")


def pytest_configure(config: pytest.Config) -> None:
    """Limit each test's time, unless the command line does: pytest-timeout reads the option after this."""
    if config.option.timeout is None:
        config.option.timeout = patience(TEST_SECONDS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files first: with several workers the last ones would leave all but one without work.
    items.sort(key=lambda item: item.path.parent.name not in LONG)
    if seed := os.environ.get("SDXL_LORA_TEST_ORDER"):
        items[:] = in_random_order(items, seed)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def in_random_order(items: list[pytest.Item], seed: str) -> list[pytest.Item]:
    """Shuffle the files, and the tests of each: a file's tests stay together, as they share fixtures."""
    random = Random(seed)
    by_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.path, []).append(item)
    files = list(by_file.values())
    random.shuffle(files)
    for tests in files:
        random.shuffle(tests)
    return [item for tests in files for item in tests]


@pytest.fixture(params=["cpu", *KERNEL_DEVICES])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """What runs a test's operators: PyTorch on a CPU, or our kernels."""
    return torch_device(request.param, monkeypatch)


@pytest.fixture(params=KERNEL_DEVICES)
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """What runs our kernels."""
    return torch_device(request.param, monkeypatch)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub that the Hub's client asks in this process, with an empty cache."""
    with serving_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        yield server
