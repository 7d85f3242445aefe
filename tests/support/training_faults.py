"""A training that is killed, stopped, short of disk or of sense, and what it goes on with."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sdxl_lora import paths
from sdxl_lora.adapters.lora_file import saved_lora
from sdxl_lora.storage.repository import file_digest
from sdxl_lora.training import run
from sdxl_lora.training.loop import EXIT_STOPPED
from stages import train_lora
from tests.support.fault import REPOSITORY, Fault, at_step, contents, news, plain, told
from tests.support.patience import patience
from tests.support.small_disks import fill, small_disk
from tests.support.training_project import enter_project, write_params

STEPS = 4
SECONDS = patience(30)


def training_faults(folder: Path) -> Iterator[Fault]:
    """All of them in one training, with a checkpoint after each step, which is run to its end in between."""
    with small_disk(folder / "disk", "128m") as disk, pytest.MonkeyPatch.context() as patch:
        recipe = enter_project(disk, patch)
        recipe["model"]["text_encoders"] = "frozen"
        recipe["training"].update(steps=STEPS, batch_size=1, log_every=1, checkpoint_minutes=0.0)
        write_params(recipe)
        train_lora.main()
        undisturbed = adapter()

        def lost(newest: int) -> list[str]:
            """What is lost if the same training is run again: steps after this checkpoint, its result."""
            with news() as said:
                train_lora.main()
            again = [] if f"resuming after step {newest} of {STEPS}" in said else ["steps that were saved"]
            return again if adapter() == undisturbed else [*again, "the adapter"]

        kill_after_a_checkpoint()
        yield Fault("The process is killed (SIGKILL)", "nothing", lost(checkpoints()[-1]), "nothing")

        said = stopped_after_two_steps(patch)
        yield Fault("The process receives SIGTERM", said, lost(2), "`dvc repro` resumes from there")

        stopped_after_two_steps(patch)
        damage(next(paths.CHECKPOINTS.rglob("step-00000002-*")))
        with news() as messages:
            kept = lost(1)
        yield Fault(
            "The newest checkpoint is damaged", one(messages, "damaged"), kept, "the checkpoint before"
        )

        free = (disk / "ballast").unlink
        with at_step(2, patch, lambda: fill(disk)), at_step(3, patch, free), news() as messages:
            train_lora.main()
        kept = [] if adapter() == undisturbed else ["the adapter"]
        said = one(messages, "no checkpoint")
        yield Fault(
            "The disk is full when a checkpoint is written", said, kept, "free some.*training continues$"
        )

        with full_before_saving(patch, disk):
            said = told(train_lora.main)
        free()
        yield Fault("The disk is full when the adapter is written", said, lost(STEPS), "free some")

        before = contents(paths.DATA)
        write_params(recipe, learning_rate=1e30)
        said = told(train_lora.main)
        after = contents(paths.DATA)
        kept = [name for name, digest in before.items() if after.get(name) != digest]
        assert contents(next(paths.FAILED_STEPS.iterdir())).keys() == {"inputs.safetensors", "report.json"}
        yield Fault("The loss is not finite", said, kept, r"lower training.learning_rate.*Its inputs are in ")


def one(messages: list[str], word: str) -> str:
    """The message with this word."""
    (found,) = [plain(message) for message in messages if word in message]
    return found


def adapter() -> str:
    return file_digest(saved_lora(paths.LORA))


def checkpoints() -> list[int]:
    """Steps of the checkpoints that there are."""
    return sorted(int(path.name.split("-")[1]) for path in paths.CHECKPOINTS.rglob("step-*.safetensors"))


def kill_after_a_checkpoint() -> None:
    """Runs the stage as a process of its own, and kills it as soon as it has saved a step."""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'src'}"}
    command = [sys.executable, "-m", "stages.train_lora"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + SECONDS
        while not checkpoints():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL


def stopped_after_two_steps(patch: pytest.MonkeyPatch) -> str:
    """Runs the stage and asks it to end, as a machine does that is about to go; what it says."""
    stop = at_step(2, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with stop, news() as messages, pytest.raises(SystemExit) as ended:
        train_lora.main()
    assert ended.value.code == EXIT_STOPPED
    return one(messages, "SIGTERM")


def damage(path: Path) -> None:
    """Flips a bit."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@contextmanager
def full_before_saving(patch: pytest.MonkeyPatch, disk: Path) -> Iterator[None]:
    """Fills the disk between training and the writing of its result."""
    save_lora = vars(run)["save_lora"]

    def fill_and_save(*arguments: Any) -> None:
        fill(disk)
        save_lora(*arguments)

    with patch.context() as inner:
        inner.setattr(run, "save_lora", fill_and_save)
        yield
