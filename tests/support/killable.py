"""A training in a process of its own, which can be killed at any time and started again."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import astuple, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from sdxl_lora.adapters.lora import add_adapters, save_lora
from sdxl_lora.adapters.lora_file import saved_lora
from sdxl_lora.config import LoraConfig, ModelConfig, TrainingConfig
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.runtime.device import deterministic_kernels
from sdxl_lora.storage.repository import file_digest
from sdxl_lora.training.checkpointer import Checkpointer
from sdxl_lora.training.denoiser import load_denoiser
from sdxl_lora.training.grad_scaler import GradScaler
from sdxl_lora.training.trainer import Trainer, prepare_modules
from tests.support.patience import patience

SEED = 7
SECONDS = patience(60)  # that a process may take to say something


@dataclass(frozen=True)
class Job:
    """What to train; its checkpoints and its result lie in `folder`."""

    folder: Path
    encoded: Path
    model: ModelConfig
    lora: LoraConfig
    config: TrainingConfig
    device: str

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


@dataclass(frozen=True)
class Result:
    """What two trainings have in common that are equal to the bit."""

    adapter: str
    """SHA-256 of the adapter's file."""
    history: list[list[float]]
    """All that steps report, but for the time that they took."""


def train(job: Job, progress: Connection) -> None:
    """Goes on with the training, says each step as soon as it is done, then saves it; body of a process."""
    torch.set_num_threads(1)
    GradScaler.INITIAL, GradScaler.GROWTH_INTERVAL = 131072.0, 2  # so that it rises and falls in few steps
    with deterministic_kernels(True):
        denoiser = load_denoiser(job.model, job.config.precision, torch.device(job.device))
        add_adapters(denoiser.parts, job.lora, SEED)
        dataset = EncodedDataset(job.encoded, "train")
        prepare_modules(denoiser, job.config, dataset.largest_latents)
        training = Trainer(denoiser, dataset, job.config, SEED)
        checkpoints = Checkpointer(job.checkpoints, job.config.checkpoint_minutes)
        checkpoint = checkpoints.newest()
        if checkpoint is not None:
            training.load_state_dict(checkpoint.tensors)
        progress.send(training.step)
        for report in training:
            progress.send(report.step)
            if checkpoints.are_due():
                checkpoints.save(training.step, training.state_dict(), {})
        save_lora(job.folder, denoiser.parts)
    reports = [astuple(replace(report, seconds=0.0)) for report in training.history]
    (job.folder / "reports.json").write_text(json.dumps(reports))


class Killer:
    """Starts trainings and kills them. On a CPU, processes are copies of one that has imported everything."""

    def __init__(self, seed: int, device: str) -> None:
        self._context: Any = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
        if device == "cpu":
            self._context.set_forkserver_preload(
                ["sdxl_lora.training.checkpointer", "sdxl_lora.training.trainer"]
            )
        self._random = random.Random(seed)

    def moments(self, kills: int, steps: int) -> list[int]:
        """Different steps to be killed after, in their order: neither the first nor one of the last two."""
        return sorted(self._random.sample(range(2, steps - 1), kills))

    def run(self, job: Job) -> Result:
        """Trains to the end."""
        progress, process = self._start(job)
        with progress:
            try:
                while True:
                    self._next_step(progress)
            except EOFError:
                process.join(SECONDS)
        assert process.exitcode == 0
        reports = json.loads((job.folder / "reports.json").read_text())
        return Result(file_digest(saved_lora(job.folder)), reports)

    def run_and_kill(self, job: Job, step: int) -> int:
        """Kills the training at a random moment of the step after `step`, or of saving `step`.

        Returns:
            The step that it started from.
        """
        progress, process = self._start(job)
        with progress:
            start = reached = self._next_step(progress)
            before = time.monotonic()
            while reached < step:
                before = time.monotonic()
                reached = self._next_step(progress)
            time.sleep(self._random.uniform(0, time.monotonic() - before))
            os.kill(process.pid, signal.SIGKILL)
            process.join(SECONDS)
        assert process.exitcode == -signal.SIGKILL, "it ended before it could be killed"
        return start

    def _start(self, job: Job) -> tuple[Connection, Any]:
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=train, args=(job, sender))
        process.start()
        sender.close()  # so that the receiver learns when the process has ended
        return receiver, process

    def _next_step(self, progress: Connection) -> int:
        assert progress.poll(SECONDS), "the process says nothing"
        step: int = progress.recv()
        return step
