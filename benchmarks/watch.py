"""Observes an unmodified training script, a process with a tqdm bar named `Steps`, from outside.

The times at which the bar advances are read from a pipe. The memory that PyTorch's allocator held is read
from a file that watched.py writes at the end.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter

from benchmarks.device_memory import DeviceMemory
from benchmarks.results import OK

WATCHED = Path(__file__).with_name("watched.py")
PATIENCE = 240.0  # seconds without output, as while a model loads, after which a script is ended
ADVANCE = re.compile(rb"Steps:[^\r\n]*?\| *(\d+)/\d+ \[")
LOSS = re.compile(rb"step_loss=([^],\s]+)[],]")
TAIL = 4000  # bytes of output that are searched for bars, and shown if the script fails


@dataclass(frozen=True)
class Observed:
    """Measurements of a script; its fields are named as those of `Result`."""

    outcome: str
    seconds: list[float]
    peak_reserved_gib: float | None
    peak_allocated_gib: float | None
    peak_device_gib: float | None
    figures: dict[str, float]


class Progress:
    """Times at which the bar reached each count."""

    def __init__(self) -> None:
        self.steps = 0
        self.loss: float | None = None
        """The last loss shown next to the bar."""
        self.tail = b""
        self._reached: dict[int, float] = {}

    def read(self, chunk: bytes, time: float) -> None:
        """Parse a chunk that arrived at `time`, seconds; chunks may split the bar anywhere."""
        self.tail = (self.tail + chunk)[-TAIL:]
        for match in ADVANCE.finditer(self.tail):
            count = int(match[1])
            if count > self.steps:
                self.steps = count
                self._reached[count] = time
        if losses := LOSS.findall(self.tail):
            self.loss = float(losses[-1])

    def seconds(self, warmup: int) -> list[float]:
        """Return the seconds of each step after the first `warmup`, at least 1, as step 1 starts unseen.

        Raises:
            ValueError: the bar skipped a count, so that steps cannot be separated.
        """
        counts = range(warmup, self.steps + 1)
        if skipped := [count for count in counts if count not in self._reached]:
            raise ValueError(f"the progress bar skipped {skipped}: the times of those steps are unknown")
        times = [self._reached[count] for count in counts]
        return [round(end - start, 4) for start, end in pairwise(times)]


def watch(
    script: Path, arguments: Sequence[str], vram_gib: float | None, warmup: int, steps: int, scratch: Path
) -> Observed:
    """Run a script until `warmup` + `steps` steps are done, then interrupt it.

    Args:
        vram_gib: limit of PyTorch's allocator in the script, GiB; None for no limit.
        scratch: an existing folder in which the script runs; its output is written there to script.log.
    """
    report = scratch / "watched.json"
    report.unlink(missing_ok=True)
    cap = "none" if vram_gib is None else str(vram_gib)
    command = [sys.executable, str(WATCHED), str(report), cap, str(script), *arguments]
    progress = Progress()
    log = scratch / "script.log"
    with DeviceMemory() as memory, log.open("wb", buffering=0) as file, start(command, scratch) as process:
        for chunk in chunks(process):
            file.write(chunk)
            progress.read(chunk, perf_counter())
            if progress.steps >= warmup + steps:
                break
        finish(process)
    watched = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    outcome = watched.get("outcome", f"killed after {PATIENCE:g} s without output")
    if outcome == OK and progress.steps < warmup + steps:
        outcome = f"ended after {progress.steps} steps"
    if outcome != OK:
        print(progress.tail.decode(errors="replace"), file=sys.stderr)
    return Observed(
        outcome=outcome,
        seconds=progress.seconds(warmup)[:steps],
        peak_reserved_gib=watched.get("reserved_gib"),
        peak_allocated_gib=watched.get("allocated_gib"),
        peak_device_gib=memory.peak_gib,
        figures={} if progress.loss is None else {"final_loss": progress.loss},
    )


def start(command: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that stays offline, caches in `folder`, and shows each step immediately."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "huggingface"),
        "PYTHONUNBUFFERED": "1",
        "TQDM_MININTERVAL": "0",
    }
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )


def chunks(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Yield the output of the process until it ends or prints nothing for `PATIENCE` seconds."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    while select.select([descriptor], [], [], PATIENCE)[0]:
        if not (chunk := os.read(descriptor, 65536)):
            return
        yield chunk


def finish(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process that still runs, and kill it if it does not end."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
