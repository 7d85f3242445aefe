"""A GPU that two jobs want, a clock that jumps, a DVC remote that is gone."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from sdxl_lora import paths
from sdxl_lora.adapters.lora_file import saved_lora
from sdxl_lora.cli import ui
from sdxl_lora.runtime.device import exclusive_gpu
from sdxl_lora.runtime.dvc_execution import current_execution
from sdxl_lora.storage.repository import file_digest
from sdxl_lora.tracking.connection import connect
from sdxl_lora.tracking.pipeline_run import track_run
from stages import train_lora
from tests.support.fault import REPOSITORY, Fault, at_step, contents, news
from tests.support.project import Project, create_project
from tests.support.tracking_faults import STEPS, steps_shown, training_project, undisturbed_adapter
from tests.support.tracking_servers import free_port

GPU = "GPU-of-a-test"
HOUR = 3600
real_time = time.time
SECOND_JOB = """
import logging
from sdxl_lora.runtime.device import exclusive_gpu
logging.basicConfig(format="%(message)s")
with exclusive_gpu("GPU-of-a-test"):
    print("mine", flush=True)
"""


def gpu_faults(folder: Path) -> Iterator[Fault]:
    """A second job on a GPU while this process has it, and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(folder))
        patch.setenv("TMPDIR", str(folder))
        command = [sys.executable, "-c", SECOND_JOB]
        with exclusive_gpu(GPU):
            second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            assert second.stdout is not None
            assert second.stderr is not None
            said = second.stderr.readline().strip()
            time.sleep(0.5)
            lost = [] if second.poll() is None else ["the GPU's memory: both have it"]
        with second:
            lost += [] if second.stdout.read() == "mine\n" else ["the second job"]
        yield Fault("A second job requests a GPU that is in use", said, lost, "waiting until it ends")


def clock_faults(folder: Path) -> Iterator[Fault]:
    """An hour back or on in the middle of training, for all who ask the time, or when the machine started."""
    undisturbed = undisturbed_adapter()
    for name, jump in {"back": -HOUR, "forward": HOUR}.items():
        with training_project(folder / name) as (params, patch):
            execution = current_execution()
            with at_step(STEPS // 2, patch, partial(set_clock, patch, jump)), news() as said:
                train_lora.main()
            assert abs(time.time() - real_time()) > HOUR / 2, "the clock did not jump"
            connect()  # would mark the run as killed, were its process taken for another
            track_run(params)
            client = connect().client
            found = {
                "the adapter": file_digest(saved_lora(paths.LORA)) == undisturbed,
                "points of the curve": steps_shown(client) == list(range(1, STEPS + 1)),
                "the execution": current_execution() == execution and execution.is_alive(),
                "the stage's time": 0 <= execution.records()["train_lora"].seconds < HOUR / 2,
            }
            lost = [thing for thing, kept in found.items() if not kept]
            news_ = [line for line in said if not line.startswith("MLflow run")]
            yield Fault(f"The clock jumps an hour {name}", "; ".join(news_) or "nothing", lost, "^nothing$")


def set_clock(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Changes what Python and psutil make of the machine's clock."""
    start_of_machine = psutil.boot_time()
    patch.setattr(time, "time", lambda: real_time() + seconds)
    patch.setattr("psutil._pslinux.boot_time", lambda: start_of_machine + seconds)


def remote_faults(folder: Path) -> Iterator[Fault]:
    """A remote that nobody answers at, for the first stage of the pipeline."""
    project = one_stage(folder / "project")
    project.dvc("remote", "modify", "--local", "local", "url", f"http://{ui.HOST}:{free_port()}/store")
    project.dvc("repro")
    before = contents(project.root / "data/raw")
    result = project.attempt("dvc", "push")
    assert result.returncode != 0
    cause = re.search("Cannot connect to host [0-9.]+", result.stdout)
    said = f"{cause and cause[0]}; {result.stdout.splitlines()[-1]}"
    project.dvc("remote", "modify", "--local", "local", "url", str(folder / "remote"))
    project.dvc("push")
    shutil.rmtree(project.root / "data")
    shutil.rmtree(project.root / ".dvc/cache")
    project.dvc("pull")
    after = contents(project.root / "data/raw")
    lost = [name for name, digest in before.items() if after.get(name) != digest]
    yield Fault("The DVC remote cannot be reached", said, lost, "^Cannot connect .* failed to upload$")


def one_stage(root: Path) -> Project:
    """The pipeline's first stage with toy work, in a repository of its own."""

    def keep_the_first(stages: dict[str, Any]) -> None:
        for name in list(stages)[1:]:
            del stages[name]
        stages["download_dataset"]["cmd"] = "python toy_stages.py download_dataset"

    root.mkdir()
    shutil.copy(REPOSITORY / "tests/support/toy_stages.py", root)
    params = yaml.safe_load((REPOSITORY / "recipes/demo.yaml").read_text(encoding="utf-8"))
    return create_project(root, params, change_stages=keep_the_first)
