"""The loop around a Trainer: curves, previews, checkpoints, and an early end with a checkpoint.

The trainer yields metrics and decides nothing. A failed checkpoint is a warning, so that a full disk costs no
training; only the one of an early end must succeed.
"""

import logging
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image
from tqdm import tqdm

from sdxl_lora import paths
from sdxl_lora.config import TrainingConfig
from sdxl_lora.runtime.distributed import all_ranks_agree, distributed_state
from sdxl_lora.runtime.stage import Deadline, stop_on_signals
from sdxl_lora.storage.atomic_io import explain_write_errors
from sdxl_lora.training.previews import Previewer
from sdxl_lora.training.run import TrainingRun
from sdxl_lora.training.trainer import Trainer, mean_metrics

EXIT_STOPPED = os.EX_TEMPFAIL  # exit status: no result yet, and nothing wrong

logger = logging.getLogger(__name__)


class _MetricLogger(Protocol):
    """Where the curves and previews of a training are shown while it runs."""

    def log(self, step: float, **values: float) -> None:
        """Add a point at `step` to the curve of each value."""

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Show an image under `name` at `step`."""


@dataclass(frozen=True)
class TrainingLoop:
    """A training with its deadline, from the completed steps to the last."""

    run: TrainingRun
    deadline: Deadline

    def run_main_rank(self, live: _MetricLogger, previewer: Previewer | None) -> None:
        """Train as the main process, the only one that writes files and curves.

        Raises:
            SystemExit: training was stopped early. There is a checkpoint.
        """
        with self._stoppable():
            self._log_past(live)
            steps = tqdm(
                self._trainer,
                initial=self._trainer.step,
                total=self._config.steps,
                desc="train_lora",
                unit="step",
            )
            for metrics in steps:
                if metrics.step % self._config.log_every == 0:
                    live.log(**mean_metrics(self._trainer.history[-self._config.log_every :]))
                if previewer and metrics.step in _multiples(self._config.preview_every, self._config.steps):
                    self._preview(previewer, live)
                if self.run.checkpoints.are_due():  # after the preview, which a resume would not sample again
                    self._save_or_warn()
                if self.deadline.is_near():
                    self._trainer.stop()

    def run_worker_rank(self) -> None:
        """Train as any other process.

        Raises:
            SystemExit: training was stopped early.
        """
        with self._stoppable():
            for _ in self._trainer:
                pass

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Train in the block; if that ends early, save a checkpoint and end the process.

        Raises:
            ValueError: processes found different checkpoints.
        """
        if not all_ranks_agree(self._trainer.step):
            raise ValueError(
                f"processes found different checkpoints in {paths.CHECKPOINTS}/: let all of them see the "
                "same folder, or delete it"
            )
        with stop_on_signals(self._trainer.stop) as signals:
            yield
            if self._trainer.is_finished:
                return
            if distributed_state().is_main_process:
                self._save()
                logger.warning(
                    "%s: stopped after step %d of %d, with a checkpoint; `dvc repro` resumes from there",
                    _stop_reason(signals, self.deadline),
                    self._trainer.step,
                    self._config.steps,
                )
            # A launcher kills the other processes once one has exited: none may while the main one saves.
            distributed_state().wait_for_everyone()
            raise SystemExit(EXIT_STOPPED)

    def _preview(self, previewer: Previewer, live: _MetricLogger) -> None:
        """Sample and log a preview; the first one only after a checkpoint, in case the process dies in it."""
        if self.run.checkpoints.is_empty():
            self._save_or_warn()
        step = self._trainer.step
        image = previewer.save_or_warn(paths.PREVIEWS / _preview_name(step))
        if image is not None:
            live.image("preview", image, step)

    def _save(self) -> None:
        """Save a checkpoint and copies of the previews: DVC deletes a stage's outputs before it runs."""
        with explain_write_errors(self._kept_previews):
            self._kept_previews.mkdir(parents=True, exist_ok=True)
            for path in paths.PREVIEWS.iterdir():
                shutil.copy(path, self._kept_previews)
        self.run.checkpoints.save(self._trainer.step, self._trainer.state_dict(), self.run.choices)

    def _save_or_warn(self) -> None:
        try:
            self._save()
        except OSError as error:
            logger.warning("no checkpoint of step %d (%s): training continues", self._trainer.step, error)

    def _log_past(self, live: _MetricLogger) -> None:
        """Log the steps and previews before a resume to the new MLflow run; DVC deleted the preview files."""
        if self._trainer.step:
            logger.info("resuming after step %d of %d", self._trainer.step, self._config.steps)
        past, every = self._trainer.history, self._config.log_every
        for end in _multiples(every, len(past)):
            live.log(**mean_metrics(past[end - every : end]))
        for step in _multiples(self._config.preview_every, len(past)):
            kept = self._kept_previews / _preview_name(step)
            if kept.is_file():  # it is missing if it failed, or if the process died in it
                live.image("preview", Image.open(shutil.copy(kept, paths.PREVIEWS)), step)

    @property
    def _trainer(self) -> Trainer:
        return self.run.trainer

    @property
    def _config(self) -> TrainingConfig:
        return self.run.resolved

    @property
    def _kept_previews(self) -> Path:
        return self.run.checkpoints.folder / "previews"


def _multiples(every: int | None, last: int) -> range:
    """Return the multiples of `every` up to `last`; none if `every` is None."""
    return range(every, last + 1, every) if every else range(0)


def _preview_name(step: int) -> str:
    return f"step-{step:06d}.png"


def _stop_reason(signals: Sequence[signal.Signals], deadline: Deadline) -> str:
    """Return why training was stopped."""
    if signals:
        return signals[0].name
    return "training.deadline_minutes" if deadline.is_near() else "another process was told to stop"
