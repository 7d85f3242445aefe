"""Stage train_lora stopped before its end: what it did stays, and the result is as if nothing had been."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from sdxl_lora import paths
from sdxl_lora.adapters.lora_file import saved_lora
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.storage.report_io import read_numbers
from sdxl_lora.tracking.connection import connect
from sdxl_lora.training.loop import EXIT_STOPPED
from stages import train_lora
from tests.support.fault import at_step
from tests.support.patience import patience
from tests.support.project import create_project
from tests.support.training_project import REPOSITORY, enter_project, free_port, write_params

SECONDS = patience(60)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Nine steps, text encoders that freeze after five, averaging; no checkpoint but where it is stopped."""
    recipe = enter_project(tmp_path, monkeypatch)
    recipe["model"]["text_encoders"] = "trained_then_frozen"
    recipe["training"].update(steps=9, text_encoder_steps=5, preview_every=3, checkpoint_minutes=None)
    return recipe


def results() -> dict[str, Any]:
    """All that the stage writes, but for times; then deleted, as DVC does before it runs the stage again."""
    curve = pd.read_csv(paths.LOSS_CURVE).drop(columns="seconds")
    report = read_numbers(paths.TRAINING_REPORT, "train_lora")
    found = {
        "adapter": saved_lora(paths.LORA).read_bytes(),
        "previews": {path.name: path.read_bytes() for path in paths.PREVIEWS.iterdir()},
        "curve": curve.to_dict("list"),
        "report": {key: report[key] for key in ("steps", "final_loss", "trainable_parameters")},
    }
    delete_outputs()
    return found


def delete_outputs() -> None:
    for folder in (paths.LORA, paths.PREVIEWS):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (paths.LOSS_CURVE, paths.TRAINING_REPORT):
        file.unlink(missing_ok=True)


def checkpoints() -> list[int]:
    """Steps of the checkpoints that there are."""
    return sorted(int(path.name.split("-")[1]) for path in paths.CHECKPOINTS.rglob("step-*.safetensors"))


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_training_stopped_again_and_again_goes_on_to_the_same_results(
    recipe: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "sdxl_lora")
    write_params(recipe)
    train_lora.main()
    uninterrupted = results()
    assert checkpoints() == []

    write_params(recipe, deadline_minutes=1e-6)
    with pytest.raises(SystemExit) as exit_:
        train_lora.main()
    assert exit_.value.code == EXIT_STOPPED
    assert checkpoints() == [1]
    assert "training.deadline_minutes: stopped after step 1 of 9" in caplog.text
    write_params(recipe, deadline_minutes=None, log_every=4)  # what cannot change the adapter may be changed

    for number, step in ((signal.SIGTERM, 3), (signal.SIGINT, 6)):
        delete_outputs()
        signalled = at_step(step, monkeypatch, partial(os.kill, os.getpid(), number))
        with signalled, pytest.raises(SystemExit) as exit_:
            train_lora.main()
        assert exit_.value.code == EXIT_STOPPED
        assert step <= checkpoints()[-1] <= step + 1
        assert f"{number.name}: stopped after step {checkpoints()[-1]} of 9" in caplog.text
        assert not list(paths.LORA.iterdir())
        assert [run.info.status for run in connect().client.search_runs([connect().experiment_id])] == [
            "KILLED"
        ]

    delete_outputs()
    write_params(recipe, log_every=2)
    last = checkpoints()[-1]
    train_lora.main()
    assert f"resuming after step {last} of 9" in caplog.text
    assert results() == uninterrupted
    assert list(paths.CHECKPOINTS.rglob("*.safetensors")) == []


def test_training_goes_on_where_no_checkpoint_can_be_written(
    recipe: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """There is a file in the place of the folder."""
    recipe["model"]["text_encoders"] = "frozen"
    changes = {"steps": 3, "text_encoder_steps": None, "preview_every": 3, "checkpoint_minutes": 0.0}
    write_params(recipe, **changes)
    paths.CHECKPOINTS.parent.mkdir(parents=True)
    paths.CHECKPOINTS.write_text("not a folder")
    train_lora.main()
    assert caplog.text.count("training continues") == 4  # one a step, one before the preview
    assert saved_lora(paths.LORA).is_file()


def test_step_without_a_finite_loss_leaves_all_that_it_was_made_from(recipe: dict[str, Any]) -> None:
    write_params(recipe, learning_rate=1e30, batch_size=4, micro_batch_size=2)
    with pytest.raises(FloatingPointError, match=r"at step \d, on the images .*Its inputs are in ") as error:
        train_lora.main()
    folder = Path(str(error.value).split(" in ")[-1].rstrip("/"))
    assert folder.parent == paths.FAILED_STEPS
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["report"]["step"] == int(folder.name.split("-")[1])
    inputs = load_file(folder / "inputs.safetensors")
    dataset = EncodedDataset(paths.ENCODED, "train")
    rows = {example.id: row for row, example in enumerate(dataset.examples)}
    batch = dataset.batch([rows[example["id"]] for example in report["examples"]])
    assert len(batch) == 4
    for row, number in ((slice(0, 2), 0), (slice(2, 4), 1)):
        assert inputs[f"{number}.latents_mean"].equal(batch.latents_mean[row])
        assert inputs[f"{number}.token_ids"].equal(batch.token_ids[row])
        assert {f"{number}.noise", f"{number}.timesteps", f"{number}.caption_mask"} <= set(inputs)
    assert all(example["image"] in str(error.value) for example in report["examples"])


@pytest.mark.slow
def test_dvc_repro_goes_on_where_it_was_killed(recipe: dict[str, Any], tmp_path: Path) -> None:
    """By SIGKILL. A new DVC command is a new MLflow run, and shows the whole of the training."""
    recipe["training"].update(checkpoint_minutes=0.0, log_every=1)
    root = tmp_path / "project"
    root.mkdir()
    (root / "demo").symlink_to(REPOSITORY / "demo")
    project = create_project(root, recipe)
    shutil.copytree(paths.ENCODED, root / paths.ENCODED)
    (root / paths.REPORTS).mkdir()
    command = ("dvc", "repro", "--single-item", "train_lora")

    def kill_training() -> None:
        wait_for((root / paths.PREVIEWS / "step-000003.png").is_file)
        wait_for(lambda: any((root / paths.CHECKPOINTS).rglob("step-00000004-*")))
        for process in psutil.process_iter(["cmdline", "cwd"]):
            if "stages.train_lora" in (process.info["cmdline"] or ()) and process.info["cwd"] == str(root):
                process.kill()

    killer = Thread(target=kill_training)
    killer.start()
    assert project.attempt(*command).returncode != 0
    killer.join()
    assert not (root / paths.PREVIEWS / "step-000006.png").exists()
    assert re.search(r"resuming after step [345] of 9", project.run(*command))
    previews = [path.name for path in sorted((root / paths.PREVIEWS).iterdir())]
    assert previews == ["step-000003.png", "step-000006.png", "step-000009.png"]
    assert (root / paths.LORA).is_dir()
    assert not list((root / paths.CHECKPOINTS).rglob("*.safetensors"))
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sdxl-lora").experiment_id
    new, *old = client.search_runs([experiment], order_by=["attributes.start_time DESC"])
    assert [run.info.status for run in old] in ([], ["KILLED"])  # killed before MLflow knew, or after
    history = client.get_metric_history(new.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, 10))


@pytest.mark.slow
def test_two_processes_stop_in_the_same_step_and_go_on_together(recipe: dict[str, Any]) -> None:
    """The second one alone is told to stop; the first one saves what both have done."""
    recipe["training"].update(steps=20, text_encoder_steps=10, batch_size=2, micro_batch_size=1)
    write_params(recipe, preview_every=4)
    assert launch().wait(SECONDS) == 0
    uninterrupted = results()
    process = launch()
    wait_for((paths.PREVIEWS / "step-000004.png").is_file)
    workers = [
        child for child in psutil.Process(process.pid).children() if "stages.train_lora" in child.cmdline()
    ]
    second = next(worker for worker in workers if worker.environ()["RANK"] == "1")
    second.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) != 0
    (step,) = checkpoints()
    assert 4 <= step < 20
    delete_outputs()
    assert launch().wait(SECONDS) == 0
    assert results() == uninterrupted


def launch() -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'src'}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen([sys.executable, *launcher, "-m", "stages.train_lora"], env=environment)
