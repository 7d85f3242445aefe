"""The values that `auto` resolved to in a recorded training, reused when that training is reproduced.

Another measurement of kernels, or a forecast with other libraries, could resolve differently. Knows no model.
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
_Resolved = TypeVar("_Resolved")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedChoices:
    """The choices in a training's report; empty where it has none."""

    plan: _Choices = field(default_factory=dict)
    """Micro-batch size and number of checkpointed units."""
    attention: _Choices = field(default_factory=dict)
    """Kernels of the UNet's self-attention."""


def choices_in(report: Mapping[str, Any]) -> RecordedChoices:
    """Return the choices in a training's report."""
    plan, keys = report.get("plan", {}), ("micro_batch_size", "checkpointing")
    return RecordedChoices(
        plan={key: plan[key] for key in keys if key in plan},
        attention={"attention": report["attention"]} if "attention" in report else {},
    )


def recorded_choices(root: Path) -> RecordedChoices:
    """Return the choices of the training that the project at `root` reproduces; empty in other projects."""
    note = root / paths.RECORDED_TRAINING
    return choices_in(json.loads(note.read_text(encoding="utf-8"))) if note.is_file() else RecordedChoices()


def with_recorded_choices(
    resolve: Callable[[TrainingConfig], _Resolved], config: TrainingConfig, recorded: _Choices
) -> _Resolved:
    """Return what `resolve` returns for `config` with recorded choices in place of `auto`.

    If a choice is not available on this machine, such as cuDNN's kernels on a CPU, log a warning that names
    it, and let `resolve` select again.

    Args:
        resolve: raises ValueError, and leaves everything unchanged, if a config's values are not available.

    Raises:
        ValueError: from `resolve`, without recorded choices too.
    """
    pinned = {key: value for key, value in recorded.items() if getattr(config, key) == "auto"}
    if not pinned:
        return resolve(config)
    try:
        return resolve(config.model_copy(update=pinned))
    except ValueError as error:
        named = ", ".join(f"training.{key} {value}" for key, value in pinned.items())
        logger.warning("recorded %s is not available on this machine (%s): selecting again", named, error)
        return resolve(config)
