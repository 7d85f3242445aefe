"""MLflow while training runs: the project's experiment there, its runs, and live curves.

Here, in `projection`, `logged_model` and `registry` alone is MLflow known. What goes wrong with the tracking
server never stops a stage: results are files, and `dvc repro -sf track_run` shows them when it is back.
"""

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from PIL import Image

from sdxl_lora.config import Params
from sdxl_lora.runtime.dvc_execution import DvcExecution, current_execution, parse_execution_id, project_root
from sdxl_lora.runtime.git import head_commit
from sdxl_lora.storage.report_io import flatten

TRACKING_ERRORS = (MlflowException, OSError)  # requests' errors are OSErrors
EXPERIMENT = "sdxl-lora"
_POINTS_A_REQUEST = 20
ENTRIES_A_REQUEST = 100  # MLflow's own limit for params
PATIENCE_SECONDS = 5.0  # seconds that a stage waits at its end for what is still to be sent

_Call = Callable[[MlflowClient, str], object]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Connection:
    """A tracking server, or the project's own database, and our experiment there."""

    client: MlflowClient
    experiment_id: str

    def new_run(self, execution: DvcExecution, params: Params, tags: dict[str, str]) -> str:
        """Creates the run of this execution, or finds the one that an earlier stage created; its id."""
        note = execution.scratch / "run_id"
        if note.is_file():
            return note.read_text(encoding="utf-8")
        experiment = os.environ.get("DVC_EXP_NAME")
        commit = head_commit()
        name = experiment or time.strftime("repro-%m%d-%H%M%S")
        identity = {
            "dvc.execution": execution.id,
            "dvc.experiment": experiment or "",
            "dvc.baseline": os.environ.get("DVC_EXP_BASELINE_REV") or commit,
            "mlflow.source.git.commit": commit,
            "mlflow.source.name": "dvc.yaml",
        }
        run = self.client.create_run(self.experiment_id, run_name=name, tags={**identity, **tags})
        run_id: str = run.info.run_id
        note.write_text(run_id, encoding="utf-8")
        entries = [Param(key, str(value)) for key, value in flatten(params.model_dump(), ".")]
        for chunk in chunks(entries, ENTRIES_A_REQUEST):
            self.client.log_batch(run_id, params=chunk)
        return run_id

    def run_of_content(self, content: str) -> str | None:
        """The run that first showed exactly these results."""
        query = f"tags.`dvc.content` = '{content}'"
        found = self.client.search_runs(
            [self.experiment_id], query, order_by=["attributes.start_time ASC"], max_results=1
        )
        return found[0].info.run_id if found else None

    def reap(self) -> None:
        """Marks this machine's runs as killed whose DVC command is gone; nothing else ever would."""
        for run in self.client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'"):
            execution = parse_execution_id(run.data.tags.get("dvc.execution", ""))
            if execution is not None and not execution.is_alive():
                self.client.set_terminated(run.info.run_id, "KILLED")


def connect() -> Connection:
    """Opens the server that MLFLOW_TRACKING_URI names, else the project's database, created once.

    Two processes that create the database at once would crash each other: a lock keeps them apart. Database
    and artifacts lie in the repository that DVC was started from, since a temporary copy of it is deleted.

    Raises:
        MlflowException, OSError: the server cannot be reached or refuses.
    """
    root = project_root()
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    scratch = root / ".dvc" / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    with FileLock(scratch / "mlflow.lock"):
        client = MlflowClient(uri or f"sqlite:///{root / 'mlflow.db'}")
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            connection = Connection(client, experiment.experiment_id)
        else:
            artifacts = None if uri else (root / "mlruns" / name).as_uri()
            connection = Connection(client, client.create_experiment(name, artifact_location=artifacts))
            if not uri:
                with closing(sqlite3.connect(root / "mlflow.db")) as database:
                    database.execute("pragma journal_mode=wal")  # readers and a writer at once, 3x faster
        connection.reap()
    return connection


class _LiveRun:
    """Curves and pictures while training runs, sent by a thread of their own: training waits for no answer.

    Never raises. At the first call that fails it gives up and says so once; `track_run` logs what is missing.
    """

    def __init__(self, params: Params) -> None:
        self._points: list[Metric] = []
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._status: str | None = None
        self._thread = Thread(target=self._send, args=(params,), name="live run", daemon=True)
        self._thread.start()

    def log(self, step: float, **values: float) -> None:
        """Puts a point on each curve, under `train/<name>`."""
        now = int(time.time() * 1000)
        self._points += [Metric(f"train/{name}", value, now, int(step)) for name, value in values.items()]
        if len(self._points) >= _POINTS_A_REQUEST:
            self.flush()

    def flush(self) -> None:
        """Sends the points that wait for company."""
        points, self._points = self._points, []
        self._do(lambda client, run_id: client.log_batch(run_id, metrics=points))

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Shows a picture under `name` at `step`."""
        self._do(lambda client, run_id: client.log_image(run_id, image, key=name, step=step))

    def end(self, status: str | None) -> None:
        """Sends what is left; with a status, closes the run. A run without one goes on in later stages."""
        self.flush()
        self._status = status
        self._calls.put(None)
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


@contextmanager
def explain_tracking_errors() -> Iterator[None]:
    """Turn what MLflow's client raises into a ConnectionError."""
    try:
        yield
    except TRACKING_ERRORS as error:
        raise ConnectionError(
            f"MLflow cannot be reached or refuses ({type(error).__name__}: {error})"
        ) from error


def error_cause(error: BaseException) -> str:
    """What went wrong at the bottom of it, unless that tells an address, which may hold a password."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error) if str(error) and "@" not in str(error) else type(error).__name__


def chunks(entries: list[Any], size: int) -> Iterable[list[Any]]:
    return (entries[start : start + size] for start in range(0, len(entries), size))
