"""One execution of the pipeline, as its stages see it: who runs it, where its notes lie, how each stage went.

A DVC command runs every stage in a process of its own. What they share about the execution lies in a scratch
folder named after that command; it is never an output, since it would make every run's outputs differ.
Knows no MLflow.
"""

import hashlib
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import psutil

from sdxl_lora.storage.atomic_io import explained, write_text

Status = Literal["running", "executed", "failed", "killed"]
DVC_COMMANDS = {"repro", "exp", "experiments", "queue"}
START_FIELD = 19  # of /proc/<pid>/stat behind the command's name (proc_pid_stat(5): field 22)
USER_ERRORS = (ValueError, OSError, FloatingPointError)

logger = logging.getLogger("sdxl_lora")


@dataclass(frozen=True)
class StageRecord:
    """How a stage went in this execution."""

    status: Status
    started: float
    """Seconds since the epoch."""
    seconds: float


@dataclass(frozen=True)
class Execution:
    """The DVC command behind the running stage, or the stage's own process."""

    machine: str
    """Digest that tells machines apart without naming them."""
    pid: int
    created: int
    """When that process started, by `start_of`: process ids are used again."""

    @property
    def id(self) -> str:
        return f"{self.machine}-{self.pid}-{self.created}"

    @property
    def scratch(self) -> Path:
        """The execution's notes, in the repository that DVC was started from."""
        folder = scratch_root() / self.id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def is_alive(self) -> bool:
        """Whether the command still runs; True on other machines, which cannot be asked."""
        if self.machine != machine_digest():
            return True
        with suppress(psutil.NoSuchProcess, OSError):
            return start_of(psutil.Process(self.pid)) == self.created
        return False

    def records(self) -> dict[str, StageRecord]:
        """The stages that have run so far, by name."""
        files = sorted((self.scratch / "stages").glob("*.json"))
        return {file.stem: StageRecord(**json.loads(file.read_text(encoding="utf-8"))) for file in files}


def current_execution() -> Execution:
    """The nearest ancestor process that is `dvc repro` or an experiment; this process if there is none."""
    own = psutil.Process()
    for process in own.parents():
        with suppress(psutil.Error, OSError):
            words = process.cmdline()
            if any(Path(word).name in ("dvc", "dvc.exe") for word in words[:4]) and DVC_COMMANDS & set(words):
                return Execution(machine_digest(), process.pid, start_of(process))
    return Execution(machine_digest(), own.pid, start_of(own))


def start_of(process: psutil.Process) -> int:
    """When a process started: clock ticks since the machine did; outside Linux, seconds since the epoch.

    psutil's seconds move whenever somebody sets the clock: an execution would turn into another one on its
    way, and its run into one whose process is gone.
    """
    if not sys.platform.startswith("linux"):
        return int(process.create_time())
    stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8")
    return int(stat.rpartition(")")[2].split()[START_FIELD])


def parse_execution(execution_id: str) -> Execution | None:
    """The execution of this id; None if it is none."""
    match execution_id.split("-"):
        case [machine, pid, created] if pid.isdigit() and created.isdigit():
            return Execution(machine, int(pid), int(created))
    return None


def machine_digest() -> str:
    return hashlib.sha256(f"{socket.gethostname()} {uuid.getnode()}".encode()).hexdigest()[:8]


def project_root() -> Path:
    """The repository that DVC was started from, also when the stage runs in a temporary copy of it."""
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    folders = (Path.cwd(), *Path.cwd().parents)
    return next((folder for folder in folders if (folder / ".dvc").is_dir()), Path.cwd())


def scratch_root() -> Path:
    return project_root() / ".dvc" / "tmp" / "mlflow"


def git_commit() -> str:
    """The commit that is checked out; empty outside a repository."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Notes how the stage `name` went and how long it took; ends it cleanly on SIGTERM."""
    file = current_execution().scratch / "stages" / f"{name}.json"
    started, clock = time.time(), time.monotonic()

    def note(status: Status) -> None:
        record = StageRecord(status, started, time.monotonic() - clock)
        write_text(file, json.dumps(asdict(record)))

    previous = signal.signal(signal.SIGTERM, exit_on_signal)
    note("running")
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # on a full disk, the error that matters is the first
            note("killed" if isinstance(error, SystemExit) else "failed")
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    note("executed")


@contextmanager
def stopping_on_signals(stop: Callable[[], None]) -> Iterator[list[signal.Signals]]:
    """Lets SIGTERM and SIGINT call `stop`, which must be quick, instead of ending the block.

    Yields:
        The signals that came so far.
    """
    received: list[signal.Signals] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        stop()

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Deadline:
    """A known end of the machine's time, some minutes from now; None: there is none."""

    def __init__(self, minutes: float | None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._longest_round = 0.0
        self._last: float | None = None

    def is_near(self) -> bool:
        """Whether two more rounds as long as the longest so far would not end before it. Ask once a round.

        Two, because several processes may need one to agree, and what is to be saved takes time as well.
        """
        now = time.monotonic()
        if self._last is not None:
            self._longest_round = max(self._longest_round, now - self._last)
        self._last = now
        return now + 2 * self._longest_round >= self._end


def exit_on_signal(number: int, _frame: FrameType | None) -> None:
    """Turns a signal into an exit that runs every `finally`."""
    raise SystemExit(128 + number)


def run(main: Callable[[], None]) -> None:
    """Runs a stage as a script: progress and warnings on stderr, what a user can mend without a traceback."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)  # our own news; of libraries, warnings alone
    try:
        main()
    except USER_ERRORS as error:
        logger.debug("traceback", exc_info=True)
        told = explained(error) if isinstance(error, OSError) else error
        sys.exit(f"{Path(sys.argv[0]).stem}: {told}")
