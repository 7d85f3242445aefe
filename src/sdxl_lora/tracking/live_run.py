"""Live curves and images in MLflow during training, sent by a thread."""

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
PATIENCE_SECONDS = 5.0  # limit of a stage's wait, at its end, for points that are still to be sent

_Call = Callable[["MlflowClient", str], object]
_Point = tuple[str, float, int, int]
"""Name, value, time in milliseconds and step."""

logger = logging.getLogger(__name__)


class _LiveRun:
    """Curves and images during training, sent by a thread, so that training never waits for the server.

    Never raises. After the first call that fails the thread logs one warning and ends, and later calls do
    nothing. `track_run` logs what is missing from the files.
    """

    def __init__(self, params: Params) -> None:
        self._points: list[_Point] = []
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._status: str | None = None
        self._imported = Event()
        self._thread = Thread(target=self._send, args=(params,), name="live run", daemon=True)
        self._thread.start()

    def log(self, step: float, **values: float) -> None:
        """Add a point to each curve `train/<name>`."""
        now = int(time.time() * 1000)
        self._points += [(f"train/{name}", value, now, int(step)) for name, value in values.items()]
        if len(self._points) >= _POINTS_A_REQUEST:
            self.flush()

    def flush(self) -> None:
        """Queue the points that were collected so far as one request."""
        points, self._points = self._points, []
        self._enqueue(partial(_log_points, points))

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Queue an image under `name` at `step`."""
        self._enqueue(lambda client, run_id: client.log_image(run_id, image, key=name, step=step))

    def end(self, status: str | None) -> None:
        """Send the remaining calls, then set the run's status; None leaves it open for the next stages."""
        self.flush()
        self._status = status
        self._calls.put(None)
        self._imported.wait()  # PATIENCE_SECONDS limits the wait for the server, not for imports
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():
            logger.warning(
                "MLflow does not answer: it lacks the last points until track_run logs the results from "
                "their files"
            )

    def _enqueue(self, call: _Call) -> None:
        if self._thread.is_alive():  # else the queue would grow with nobody to read it
            self._calls.put(call)

    def _send(self, params: Params) -> None:
        """Open the run, make the queued calls, and close the run; the body of the thread."""
        try:  # imported in the thread: MLflow takes seconds, and training need not wait for it
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
                "MLflow cannot be reached (%s): training continues without it, and track_run logs the "
                "results from their files",
                error_cause(error),
            )


def _log_points(points: Iterable[_Point], client: "MlflowClient", run_id: str) -> None:
    """Log the points in one request."""
    from mlflow.entities import Metric  # already imported by the thread that calls this

    client.log_batch(run_id, metrics=[Metric(*point) for point in points])


@contextmanager
def live_run(params: Params) -> Iterator[_LiveRun]:
    """Yield the MLflow run of this execution; mark it as killed or failed if the block raises."""
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
