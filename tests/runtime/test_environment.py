import json
import os
import socket
from pathlib import Path

import pytest
import torch

from sdxl_lora.runtime.environment import NUMERICAL_LIBRARIES, describe_environment, installed_version


def test_environment_says_what_can_change_a_result() -> None:
    facts = describe_environment(torch.device("cpu"), attention="sdpa", deterministic=True)
    assert facts["libraries"]["torch"] == torch.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["cpu"]["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert (facts["gpu"], facts["attention"], facts["deterministic"]) == (None, "sdpa", True)


@pytest.mark.gpu
def test_environment_names_card_and_driver() -> None:
    card = describe_environment(torch.device("cuda", 0))["gpu"]
    assert card["model"] == torch.cuda.get_device_name(0)
    assert card["driver"].partition(".")[0].isdigit()


def test_environment_names_no_machine_user_or_place() -> None:
    text = json.dumps(describe_environment(torch.device("cpu")))
    for private in (
        socket.gethostname(),
        str(Path.home()),
        str(Path.cwd()),
        os.environ.get("USER") or "/home",
    ):
        assert private not in text


def test_only_settings_that_choose_kernels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert describe_environment(torch.device("cpu"))["variables"] == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def test_libraries_are_those_that_pip_knows() -> None:
    optional = {"triton", "xformers"}
    assert {name for name in NUMERICAL_LIBRARIES if installed_version(name) is None} <= optional
