"""A training under way: shown, saved now and then, and ended early with a checkpoint if it must be."""

import logging
import os
import shutil
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
from sdxl_lora.training.checkpointer import Checkpointer
from sdxl_lora.training.previews import Previewer
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
    """A training with the place of its checkpoints and its deadline, from wherever it was left to its end."""

    training: Trainer
    config: TrainingConfig
    checkpoints: Checkpointer
    choices: Mapping[str, str]
    """Params that were `auto`, as measured. Saved with a checkpoint: the next time might choose others."""
    deadline: Deadline

    def run_main_rank(self, live: _MetricLogger, previewer: Previewer | None) -> None:
        """Trains as the first process, which alone writes files and curves.

        Raises:
            SystemExit: it was stopped before its end. There is a checkpoint.
        """
        with self._stoppable():
            self._show_past(live)
            steps = tqdm(
                self.training,
                initial=self.training.step,
                total=self.config.steps,
                desc="train_lora",
                unit="step",
            )
            for report in steps:
                if report.step % self.config.log_every == 0:
                    live.log(**mean_metrics(self.training.history[-self.config.log_every :]))
                if previewer and self.config.preview_every and report.step % self.config.preview_every == 0:
                    path = paths.PREVIEWS / _preview_name(report.step)
                    live.image("preview", previewer.save(path), report.step)
                if self.checkpoints.are_due():  # after the preview, which a resume would not draw
                    self._save_or_warn()
                if self.deadline.is_near():
                    self.training.stop()

    def run_worker_rank(self) -> None:
        """Trains as any other process.

        Raises:
            SystemExit: it was stopped before its end.
        """
        with self._stoppable():
            deque(self.training, maxlen=0)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Trains in the block; where that ends early, saves what it reached and ends the process.

        Raises:
            ValueError: processes found different checkpoints.
        """
        if not all_ranks_agree(self.training.step):
            raise ValueError(
                f"processes found different checkpoints in {paths.CHECKPOINTS}/: let all of them see the "
                "same folder, or delete it"
            )
        with stop_on_signals(self.training.stop) as signals:
            yield
            if self.training.is_finished:
                return
            if distributed_state().is_main_process:
                self._save()
                logger.warning(
                    "%s: stopped after step %d of %d, with a checkpoint; `dvc repro` goes on from there",
                    _stop_reason(signals, self.deadline),
                    self.training.step,
                    self.config.steps,
                )
            distributed_state().wait_for_everyone()  # a launcher ends all of them as soon as one has ended
            raise SystemExit(EXIT_STOPPED)

    def _save(self) -> None:
        """Saves a checkpoint, and the previews so far: DVC deletes a stage's outputs before it runs."""
        with explain_write_errors(self._kept_previews):
            self._kept_previews.mkdir(parents=True, exist_ok=True)
            for path in paths.PREVIEWS.iterdir():
                shutil.copy(path, self._kept_previews)
        self.checkpoints.save(self.training.step, self.training.state_dict(), self.choices)

    def _save_or_warn(self) -> None:
        try:
            self._save()
        except OSError as error:
            logger.warning("no checkpoint of step %d (%s): training goes on", self.training.step, error)

    def _show_past(self, live: _MetricLogger) -> None:
        """What was shown before a resume, once more: the run that showed it is over, and DVC deleted it."""
        if self.training.step:
            logger.info("going on after step %d of %d", self.training.step, self.config.steps)
        past, every = self.training.history, self.config.log_every
        for end in _multiples(every, len(past)):
            live.log(**mean_metrics(past[end - every : end]))
        for step in _multiples(self.config.preview_every, len(past)):
            path = shutil.copy(self._kept_previews / _preview_name(step), paths.PREVIEWS)
            live.image("preview", Image.open(path), step)

    @property
    def _kept_previews(self) -> Path:
        return self.checkpoints.folder / "previews"


def _multiples(every: int | None, last: int) -> range:
    """Those of `every` that are not above `last`; None has none."""
    return range(every, last + 1, every) if every else range(0)


def _preview_name(step: int) -> str:
    return f"step-{step:06d}.png"


def _stop_reason(signals: Sequence[signal.Signals], deadline: Deadline) -> str:
    """Why training was stopped."""
    if signals:
        return signals[0].name
    return "training.deadline_minutes" if deadline.is_near() else "another process was told to stop"
