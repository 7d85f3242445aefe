"""The DVC command behind a stage: who runs it, where its notes lie, how each of its stages went.

A DVC command runs every stage in a process of its own. What they share about the execution lies in a scratch
folder named after that command; it is never an output, since it would make every run's outputs differ.
Knows no MLflow.
"""

import hashlib
import json
import os
import socket
import sys
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

StageStatus = Literal["running", "executed", "failed", "killed"]
_DVC_COMMANDS = {"repro", "exp", "experiments", "queue"}
_START_FIELD = 19  # of /proc/<pid>/stat behind the command's name (proc_pid_stat(5): field 22)


@dataclass(frozen=True)
class StageRecord:
    """How a stage went in this execution."""

    status: StageStatus
    started: float
    """Seconds since the epoch."""
    seconds: float


@dataclass(frozen=True)
class DvcExecution:
    """The DVC command behind the running stage, or the stage's own process."""

    machine: str
    """Digest that tells machines apart without naming them."""
    pid: int
    created: int
    """When that process started, by `_process_start`: process ids are used again."""

    @property
    def id(self) -> str:
        return f"{self.machine}-{self.pid}-{self.created}"

    @property
    def scratch(self) -> Path:
        """The execution's notes, in the repository that DVC was started from."""
        folder = _scratch_root() / self.id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def is_alive(self) -> bool:
        """Whether the command still runs; True on other machines, which cannot be asked."""
        if self.machine != machine_digest():
            return True
        with suppress(psutil.NoSuchProcess, OSError):
            return _process_start(psutil.Process(self.pid)) == self.created
        return False

    def records(self) -> dict[str, StageRecord]:
        """The stages that have run so far, by name."""
        files = sorted((self.scratch / "stages").glob("*.json"))
        return {file.stem: StageRecord(**json.loads(file.read_text(encoding="utf-8"))) for file in files}


def current_execution() -> DvcExecution:
    """The nearest ancestor process that is `dvc repro` or an experiment; this process if there is none."""
    own = psutil.Process()
    for process in own.parents():
        with suppress(psutil.Error, OSError):
            words = process.cmdline()
            if any(Path(word).name in ("dvc", "dvc.exe") for word in words[:4]) and _DVC_COMMANDS & set(
                words
            ):
                return DvcExecution(machine_digest(), process.pid, _process_start(process))
    return DvcExecution(machine_digest(), own.pid, _process_start(own))


def _process_start(process: psutil.Process) -> int:
    """When a process started: clock ticks since the machine did; outside Linux, seconds since the epoch.

    psutil's seconds move whenever somebody sets the clock: an execution would turn into another one on its
    way, and its run into one whose process is gone.
    """
    if not sys.platform.startswith("linux"):
        return int(process.create_time())
    stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8")
    return int(stat.rpartition(")")[2].split()[_START_FIELD])


def parse_execution_id(execution_id: str) -> DvcExecution | None:
    """The execution of this id; None if it is none."""
    match execution_id.split("-"):
        case [machine, pid, created] if pid.isdigit() and created.isdigit():
            return DvcExecution(machine, int(pid), int(created))
    return None


def machine_digest() -> str:
    return hashlib.sha256(f"{socket.gethostname()} {uuid.getnode()}".encode()).hexdigest()[:8]


def project_root() -> Path:
    """The repository that DVC was started from, also when the stage runs in a temporary copy of it."""
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    folders = (Path.cwd(), *Path.cwd().parents)
    return next((folder for folder in folders if (folder / ".dvc").is_dir()), Path.cwd())


def _scratch_root() -> Path:
    return project_root() / ".dvc" / "tmp" / "mlflow"
