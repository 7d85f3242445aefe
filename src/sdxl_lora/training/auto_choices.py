"""What a recorded training chose where its params say `auto`, chosen again when it is made again.

A measurement of kernels, or a forecast by other libraries, could come out differently. Knows no model.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sdxl_lora import paths
from sdxl_lora.config import TrainingConfig

_Choices = Mapping[str, Any]
"""Values of params' section `training`, by key."""
_Made = TypeVar("_Made")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedChoices:
    """The choices of a training, as far as its report has them."""

    plan: _Choices = field(default_factory=dict)
    """Micro-batch size and number of checkpointed units."""
    attention: _Choices = field(default_factory=dict)
    """Kernels of the UNet's self-attention."""


def choices_in(report: Mapping[str, Any]) -> RecordedChoices:
    """What a training's report says was chosen."""
    plan, keys = report.get("plan", {}), ("micro_batch_size", "checkpointing")
    return RecordedChoices(
        plan={key: plan[key] for key in keys if key in plan},
        attention={"attention": report["attention"]} if "attention" in report else {},
    )


def recorded_choices(root: Path) -> RecordedChoices:
    """Those of the training that is being made again in the project at `root`; none in any other project."""
    note = root / paths.RECORDED_TRAINING
    return choices_in(json.loads(note.read_text(encoding="utf-8"))) if note.is_file() else RecordedChoices()


def with_recorded_choices(
    make: Callable[[TrainingConfig], _Made], config: TrainingConfig, recorded: _Choices
) -> _Made:
    """What `make` makes of `config` with recorded choices in place of `auto`.

    Where these cannot be had, as cuDNN's kernels on a CPU, a warning names them and `make` chooses anew.

    Args:
        make: raises ValueError, and leaves everything as it was, if it cannot do what a config says.

    Raises:
        ValueError: `make` cannot do without the recorded choices either.
    """
    pinned = {key: value for key, value in recorded.items() if getattr(config, key) == "auto"}
    if not pinned:
        return make(config)
    try:
        return make(config.model_copy(update=pinned))
    except ValueError as error:
        named = ", ".join(f"training.{key} {value}" for key, value in pinned.items())
        logger.warning("recorded was %s, which cannot be had here, so it is chosen anew (%s)", named, error)
        return make(config)
