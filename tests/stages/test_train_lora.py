import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdxl_lora import paths
from sdxl_lora.adapters.lora_file import saved_lora
from sdxl_lora.storage.report_io import read_numbers, write_numbers
from sdxl_lora.training.previews import Previewer
from stages import train_lora
from tests.support.patience import patience
from tests.support.training_project import REPOSITORY, enter_project, free_port, write_params


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return enter_project(tmp_path, monkeypatch)


@pytest.mark.parametrize("preview_every", [None, 2], ids=["no previews", "previews"])
def test_every_output_that_dvc_expects_is_written(recipe: dict[str, Any], preview_every: int | None) -> None:
    write_params(recipe, preview_every=preview_every)
    train_lora.main()
    assert saved_lora(paths.LORA).stat().st_size > 0
    assert read_numbers(paths.TRAINING_REPORT, "train_lora")["steps"] == 3
    assert pd.read_csv(paths.LOSS_CURVE)["step"].tolist() == [2, 3]
    previews = [path.name for path in paths.PREVIEWS.iterdir()]
    assert previews == (["step-000002.png"] if preview_every else [])


def test_failed_preview_leaves_a_checkpoint_and_the_same_adapter(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_params(recipe, preview_every=2)
    train_lora.main()
    expected = saved_lora(paths.LORA).read_bytes()
    for folder in (paths.LORA, paths.PREVIEWS):
        shutil.rmtree(folder)
    checkpoints: list[Path] = []

    def fail(_: Previewer) -> None:
        checkpoints.extend(paths.CHECKPOINTS.glob("**/step-*.safetensors"))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Previewer, "generate", fail)
    train_lora.main()
    assert [path.name[:13] for path in checkpoints] == ["step-00000002"]
    assert saved_lora(paths.LORA).read_bytes() == expected
    assert list(paths.PREVIEWS.iterdir()) == []
    assert "no preview step-000002.png (CUDA out of memory): training continues" in caplog.text


def test_run_made_again_chooses_as_recorded_or_warns(
    recipe: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    write_params(recipe)
    plan = {"micro_batch_size": 1, "checkpointing": 3}
    paths.RECORDED_TRAINING.parent.mkdir(parents=True)
    write_numbers(paths.RECORDED_TRAINING, {"attention": "cudnn", "plan": plan})
    train_lora.main()
    report = read_numbers(paths.TRAINING_REPORT, "train_lora")
    assert report["attention"] == read_numbers(paths.TRAINING_ENVIRONMENT, "")["attention"] == "sdpa"
    assert report["plan"] == {**plan, "recomputed": ANY}
    (warning,) = [message for message in caplog.messages if "recorded" in message]
    assert "training.attention cudnn" in warning


@pytest.mark.parametrize(
    ("passes", "text_encoders", "text_encoder_steps"),
    [
        (2, "trained_then_frozen", 1),
        pytest.param(1, "frozen", None, marks=pytest.mark.slow),
        pytest.param(2, "frozen", None, marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_what_one_does_with_twice_the_batch(
    recipe: dict[str, Any], passes: int, text_encoders: str, text_encoder_steps: int | None
) -> None:
    recipe["model"]["text_encoders"] = text_encoders
    recipe["training"]["text_encoder_steps"] = text_encoder_steps
    # AdamW makes a whole step of a sign that rounding decides: at a rate of 1e-6 such a step changes no loss.
    rates = {"learning_rate": 1e-6, "text_encoder_learning_rate": 1e-6}
    write_params(recipe, batch_size=4 * passes, micro_batch_size=4, optimizer="adamw", log_every=1, **rates)
    train_lora.main()
    alone, curve = load_file(saved_lora(paths.LORA)), pd.read_csv(paths.LOSS_CURVE)
    write_params(recipe, batch_size=2 * passes, micro_batch_size=2)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command = [sys.executable, *launch, "-m", "stages.train_lora"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=patience(60))
    together = load_file(saved_lora(paths.LORA))
    found = pd.read_csv(paths.LOSS_CURVE)
    for column in ("loss", "grad_norm"):
        # fp32 sums in another order: sqrt(100 layers) sqrt(1,000 products) 2^-24.
        assert found[column].tolist() == pytest.approx(curve[column].tolist(), rel=2e-5)
    assert set(together) == set(alone)
    # B starts at 0: it is all that was trained. Rounding decides the sign of the 2e-5 of its gradients that
    # are nearest to 0, and puts their weights off by twice their way: by 2 sqrt(2e-5) = 0.9 % of the norm.
    up = [name for name in alone if "lora_B" in name]
    difference = torch.cat([(together[name] - alone[name]).flatten() for name in up]).norm()
    assert difference / torch.cat([alone[name].flatten() for name in up]).norm() < 1e-2


def test_second_process_trains_the_same_adapter_to_the_bit(recipe: dict[str, Any]) -> None:
    write_params(recipe)
    first, second = adapter_of_a_process(), adapter_of_a_process()
    assert all(tensor.any() for tensor in first.values())  # B starts at zero
    assert all(torch.equal(first[name], second[name]) for name in first)


def adapter_of_a_process() -> dict[str, Tensor]:
    """What `python -m stages.train_lora` saves: the demo's 8-bit Adam and averaged weights, two threads."""
    waiting = {
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
    }  # threads that spin starve a busy machine
    environment = {**os.environ, **waiting, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'src'}"}
    command = [sys.executable, "-m", "stages.train_lora"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=patience(60))
    return load_file(saved_lora(paths.LORA))
