"""Curves and images in MLflow while training runs, sent by a thread that alone waits for MLflow."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING

from PIL import Image

from sdxl_lora.config import Params
from sdxl_lora.runtime.dvc_execution import current_execution

if TYPE_CHECKING:
    from mlflow import MlflowClient

_POINTS_A_REQUEST = 20
PATIENCE_SECONDS = 5.0  # seconds that a stage waits at its end for what is still to be sent

_Call = Callable[["MlflowClient", str], object]
_Point = tuple[str, float, int, int]
"""Name, value, time in milliseconds and step."""

logger = logging.getLogger(__name__)


class _LiveRun:
    """Curves and pictures while training runs, sent by a thread of their own: training waits for no answer.

    Never raises. At the first call that fails it gives up and says so once; `track_run` logs what is missing.
    """

    def __init__(self, params: Params) -> None:
        self._points: list[_Point] = []
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._status: str | None = None
        self._imported = Event()
        self._thread = Thread(target=self._send, args=(params,), name="live run", daemon=True)
        self._thread.start()

    def log(self, step: float, **values: float) -> None:
        """Puts a point on each curve, under `train/<name>`."""
        now = int(time.time() * 1000)
        self._points += [(f"train/{name}", value, now, int(step)) for name, value in values.items()]
        if len(self._points) >= _POINTS_A_REQUEST:
            self.flush()

    def flush(self) -> None:
        """Sends the points that wait for company."""
        points, self._points = self._points, []
        self._do(partial(_log_points, points))

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Shows a picture under `name` at `step`."""
        self._do(lambda client, run_id: client.log_image(run_id, image, key=name, step=step))

    def end(self, status: str | None) -> None:
        """Sends what is left; with a status, closes the run. A run without one goes on in later stages."""
        self.flush()
        self._status = status
        self._calls.put(None)
        self._imported.wait()  # which says nothing about the server: patience is for its answers
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():
            logger.warning(
                "MLflow does not answer: training ends without it, and track_run will log the results from "
                "their files"
            )

    def _do(self, call: _Call) -> None:
        if self._thread.is_alive():
            self._calls.put(call)

    def _send(self, params: Params) -> None:
        """The thread: opens the run, makes call after call, and closes it."""
        try:  # here, because MLflow takes seconds to import, which training need not wait for
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            from sdxl_lora.tracking.connection import TRACKING_ERRORS, connect, error_cause
        finally:
            self._imported.set()
        try:
            connection = connect()
            run_id = connection.new_run(current_execution(), params, {})
            monitor = SystemMetricsMonitor(run_id, tracking_uri=connection.client.tracking_uri)
            monitor.start()
            for call in iter(self._calls.get, None):
                call(connection.client, run_id)
            monitor.finish()
            if self._status is not None:
                connection.client.set_terminated(run_id, self._status)
        except TRACKING_ERRORS as error:
            logger.warning(
                "MLflow cannot be reached (%s): training goes on without it, and track_run will log the "
                "results from their files",
                error_cause(error),
            )


def _log_points(points: Iterable[_Point], client: "MlflowClient", run_id: str) -> None:
    from mlflow.entities import Metric  # loaded by the thread that calls this

    client.log_batch(run_id, metrics=[Metric(*point) for point in points])


@contextmanager
def live_run(params: Params) -> Iterator[_LiveRun]:
    """The MLflow run of this execution, for as long as a stage reports to it."""
    run = _LiveRun(params)
    try:
        yield run
    except SystemExit:
        run.end("KILLED")
        raise
    except BaseException:
        run.end("FAILED")
        raise
    run.end(None)
