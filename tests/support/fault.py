"""What an injected fault came to, and what injecting one takes."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxl_lora.runtime.stage import run_stage
from sdxl_lora.storage.repository import file_digest
from sdxl_lora.training import run
from sdxl_lora.training.trainer import StepMetrics

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    """A fault that was injected, and what came of it."""

    name: str
    said: str
    """What a user reads."""
    lost: list[str]
    remedy: str
    """A pattern that `said` must match: what tells the user what to do."""

    def row(self) -> tuple[str, str, str]:
        return self.name, self.said, ", ".join(self.lost) or "nothing"


@contextmanager
def project(folder: Path) -> Iterator[tuple[dict[str, Any], pytest.MonkeyPatch]]:
    """A working folder on a machine without a GPU, for the demo's recipe, which is yet to be written."""
    with pytest.MonkeyPatch.context() as patch:
        folder.mkdir(parents=True, exist_ok=True)
        patch.chdir(folder)
        patch.setenv("DVC_ROOT", str(folder))
        patch.setenv("SDXL_LORA_DEVICE", "cpu")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        Path("demo").symlink_to(REPOSITORY / "demo")
        yield yaml.safe_load((REPOSITORY / "recipes/demo.yaml").read_text(encoding="utf-8")), patch


@contextmanager
def news() -> Iterator[list[str]]:
    """What the library says in the block."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sdxl_lora")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def told(main: Callable[[], None]) -> str:
    """What a stage says to its user as it fails."""
    with pytest.raises(SystemExit) as ended:
        run_stage(main)
    return plain(str(ended.value.code).partition(": ")[2])


def plain(message: str) -> str:
    """A message without what differs from run to run: places, hashes."""
    message = message.replace(f"{Path.cwd()}/", "")
    return re.sub(r"[0-9a-f]{8}-\d+-\d+|(?:[0-9a-f]{2}/)?[0-9a-f]{12,}|\.download-\w+", "...", message)


def contents(folder: Path) -> dict[str, str]:
    """Digests of the files below a folder, but for notes on how stages went."""
    files = (path for path in folder.rglob("*") if path.is_file() and "mlflow" not in path.parts)
    return {str(path.relative_to(folder)): file_digest(path) for path in files}


@contextmanager
def at_step(step: int, patch: pytest.MonkeyPatch, act: Callable[[], object]) -> Iterator[None]:
    """Does something in the middle of the stage's training: after a step, before its checkpoint."""
    undisturbed = vars(run)["Trainer"]  # that of an outer call, if there is one

    class Disturbed(undisturbed):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[StepMetrics]:
            for report in super().__iter__():
                if report.step == step:
                    act()
                yield report

    with patch.context() as inner:
        inner.setattr(run, "Trainer", Disturbed)
        yield
