"""The DVC command that runs a stage: its identity, its scratch folder, and how each of its stages went.

`dvc repro` runs every stage in a new process and gives them no common identifier: it sets DVC_ROOT, DVC_STAGE
and, for experiments, DVC_EXP_NAME. The stages of one command must share one MLflow run, so the command is
identified by its process, an ancestor of every stage. Its stages share a scratch folder with that name, which
is never an output: it would make the outputs of every run differ. Independent of MLflow.
"""

import hashlib
import json
import os
import socket
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

StageStatus = Literal["running", "executed", "failed", "killed"]
_DVC_COMMANDS = {"repro", "exp", "experiments", "queue"}
_MAX_LAUNCHER_WORDS = 4  # `python -m dvc`, `/usr/bin/env python .venv/bin/dvc`: where the word dvc can be
_START_FIELD = 19  # of /proc/<pid>/stat after the command's name (proc_pid_stat(5): field 22)


@dataclass(frozen=True)
class StageRecord:
    """How a stage went in this execution."""

    status: StageStatus
    started: float
    """Seconds since the epoch."""
    seconds: float


@dataclass(frozen=True)
class DvcExecution:
    """The DVC command that runs the current stage, or the stage's process if it was started without DVC."""

    machine: str
    """Digest that tells machines apart without naming them."""
    pid: int
    created: int
    """Start of that process, by `_process_start`. Needed because the system reuses process ids."""

    @property
    def id(self) -> str:
        return f"{self.machine}-{self.pid}-{self.created}"

    @property
    def scratch(self) -> Path:
        """The folder that this execution's stages share, in the repository that DVC was started from."""
        folder = _scratch_root() / self.id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def is_alive(self) -> bool:
        """Return whether the command still runs; True for other machines, which cannot be asked."""
        if self.machine != machine_digest():
            return True
        with suppress(psutil.NoSuchProcess, OSError):
            return _process_start(psutil.Process(self.pid)) == self.created
        return False

    def records(self) -> dict[str, StageRecord]:
        """Return the records of the stages that have run so far, by name."""
        files = sorted((self.scratch / "stages").glob("*.json"))
        return {file.stem: StageRecord(**json.loads(file.read_text(encoding="utf-8"))) for file in files}


def current_execution() -> DvcExecution:
    """Return the nearest ancestor process that is a DVC pipeline command; this process if there is none."""
    process = psutil.Process()
    for ancestor in process.parents():
        with suppress(psutil.Error, OSError):  # it ended meanwhile, or belongs to another user
            if _runs_pipeline(ancestor.cmdline()):
                process = ancestor
                break
    return DvcExecution(machine_digest(), process.pid, _process_start(process))


def _runs_pipeline(words: Sequence[str]) -> bool:
    """Return whether a command line is `dvc repro`, `dvc exp run` or a worker of `dvc queue`.

    The process itself is named after the Python interpreter, so only the command line tells. `dvc` must be
    among the first words: a later one is an argument, such as a folder with that name.
    """
    starts_dvc = any(Path(word).name in ("dvc", "dvc.exe") for word in words[:_MAX_LAUNCHER_WORDS])
    return starts_dvc and not _DVC_COMMANDS.isdisjoint(words)


def _process_start(process: psutil.Process) -> int:
    """Return when a process started: clock ticks since boot; outside Linux, seconds since the epoch.

    `psutil.Process.create_time` adds the boot time, which the kernel derives from the wall clock: setting the
    clock changes it. An execution would then get another id halfway, and `is_alive` would call it dead. Ticks
    since boot never change.
    """
    if not sys.platform.startswith("linux"):
        return int(process.create_time())
    stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8")
    # The second field is the name in parentheses, which may itself hold spaces and parentheses.
    return int(stat.rpartition(")")[2].split()[_START_FIELD])


def parse_execution_id(execution_id: str) -> DvcExecution | None:
    """Return the execution with this id; None if the text is not such an id."""
    match execution_id.split("-"):
        case [machine, pid, created] if pid.isdigit() and created.isdigit():
            return DvcExecution(machine, int(pid), int(created))
    return None


def machine_digest() -> str:
    """Return a digest of host name and network address: MLflow's runs are shared, names of hosts private."""
    return hashlib.sha256(f"{socket.gethostname()} {uuid.getnode()}".encode()).hexdigest()[:8]


def project_root() -> Path:
    """Return the repository that DVC was started from, also if the stage runs in a temporary copy of it."""
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    folders = (Path.cwd(), *Path.cwd().parents)
    return next((folder for folder in folders if (folder / ".dvc").is_dir()), Path.cwd())


def _scratch_root() -> Path:
    return project_root() / ".dvc" / "tmp" / "mlflow"
