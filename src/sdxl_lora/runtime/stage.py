"""A stage as a process: its record, signals that stop it, its deadline, and errors as one line."""

import json
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from sdxl_lora.runtime.dvc_execution import StageRecord, StageStatus, current_execution
from sdxl_lora.runtime.user_errors import exit_on_user_error
from sdxl_lora.storage.atomic_io import write_text

logger = logging.getLogger("sdxl_lora")


@contextmanager
def record_stage(name: str) -> Iterator[None]:
    """Record how the stage `name` went and how long it took; end it cleanly on SIGTERM."""
    file = current_execution().scratch / "stages" / f"{name}.json"
    started, clock = time.time(), time.monotonic()

    def note(status: StageStatus) -> None:
        record = StageRecord(status, started, time.monotonic() - clock)
        write_text(file, json.dumps(asdict(record)))

    previous = signal.signal(signal.SIGTERM, _exit_on_signal)
    note("running")
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # on a full disk, the first error is the one to report
            note("killed" if isinstance(error, SystemExit) else "failed")
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    note("executed")


@contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[list[signal.Signals]]:
    """Call `stop`, which must be quick, on SIGTERM and SIGINT instead of ending the block.

    Yields:
        The signals received so far.
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
    """A known end of the machine's time, `minutes` from now; None: no end."""

    def __init__(self, minutes: float | None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._longest_round = 0.0
        self._last: float | None = None

    def is_near(self) -> bool:
        """Return whether two more rounds as long as the longest so far would exceed it. Call once a round.

        Two, because several processes may need one round to agree, and saving takes time as well.
        """
        now = time.monotonic()
        if self._last is not None:
            self._longest_round = max(self._longest_round, now - self._last)
        self._last = now
        return now + 2 * self._longest_round >= self._end


def _exit_on_signal(number: int, _frame: FrameType | None) -> None:
    """Exit by an exception, so that every `finally` runs; the default action of SIGTERM skips them."""
    raise SystemExit(128 + number)  # the status that a shell reports for a process killed by this signal


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage as a script: log to stderr, and end with one line for errors that a user can fix."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)  # this project's logger only; libraries log warnings
    with exit_on_user_error(Path(sys.argv[0]).stem):
        main()
