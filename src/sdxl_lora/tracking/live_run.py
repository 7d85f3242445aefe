"""MLflow during training: the connection to the project's experiment, its runs, and live curves.

Errors of the tracking server never stop a stage: results are files, and `dvc repro -sf track_run` logs them
when the server is back.
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
from sdxl_lora.storage.atomic_io import write_text
from sdxl_lora.storage.report_io import flatten

TRACKING_ERRORS = (MlflowException, OSError)  # requests' errors are OSErrors
EXPERIMENT = "sdxl-lora"
_POINTS_A_REQUEST = 20
ENTRIES_A_REQUEST = 100  # MLflow's own limit for params
PATIENCE_SECONDS = 5.0  # limit of a stage's wait, at its end, for points that are still to be sent

_Call = Callable[[MlflowClient, str], object]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Connection:
    """A tracking server, or the project's database, and this project's experiment in it."""

    client: MlflowClient
    experiment_id: str

    def new_run(self, execution: DvcExecution, params: Params, tags: dict[str, str]) -> str:
        """Return the id of this execution's run; create the run if no earlier stage has.

        The stages of one `dvc repro` are separate processes and share one run. The id is in a file of the
        execution's scratch folder, not in an environment variable, which a stage cannot pass on to the next.
        DVC runs the stages of an execution one after the other, so no lock is needed.
        """
        note = execution.scratch / "run_id"
        if note.is_file():
            return note.read_text(encoding="utf-8")
        experiment = os.environ.get("DVC_EXP_NAME")
        commit = head_commit()
        name = experiment or time.strftime("repro-%m%d-%H%M%S")
        identity = {
            "dvc.execution": execution.id,  # `reap` asks by it whether the run's command still lives
            "dvc.experiment": experiment or "",
            # An experiment runs in a commit that DVC creates for it, so HEAD is not where it started from.
            "dvc.baseline": os.environ.get("DVC_EXP_BASELINE_REV") or commit,
            "mlflow.source.git.commit": commit,
            "mlflow.source.name": "dvc.yaml",
        }
        run = self.client.create_run(self.experiment_id, run_name=name, tags={**identity, **tags})
        run_id: str = run.info.run_id
        write_text(note, run_id)  # now: if logging the params fails, no later stage creates a second run
        entries = [Param(key, str(value)) for key, value in flatten(params.model_dump(), ".")]
        for chunk in chunks(entries, ENTRIES_A_REQUEST):
            self.client.log_batch(run_id, params=chunk)
        return run_id

    def run_of_content(self, content: str) -> str | None:
        """Return the id of the first run with exactly these results; None if there is none."""
        query = f"tags.`dvc.content` = '{content}'"
        found = self.client.search_runs(
            [self.experiment_id], query, order_by=["attributes.start_time ASC"], max_results=1
        )
        return found[0].info.run_id if found else None

    def reap(self) -> None:
        """Mark running runs of this machine as killed if their DVC command has ended.

        A process that is killed cannot do so itself, and MLflow would show its run as running forever.
        """
        for run in self.client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'"):
            execution = parse_execution_id(run.data.tags.get("dvc.execution", ""))
            if execution is not None and not execution.is_alive():
                self.client.set_terminated(run.info.run_id, "KILLED")


def connect() -> Connection:
    """Connect to the server that MLFLOW_TRACKING_URI names, or to the project's database, created if needed.

    Database and artifacts are in the repository that DVC was started from, because DVC deletes the temporary
    copies in which it runs experiments.

    Raises:
        MlflowException, OSError: the server cannot be reached or refuses.
    """
    root = project_root()
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    scratch = root / ".dvc" / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    with FileLock(scratch / "mlflow.lock"):  # two processes that create the database at once both crash
        client = MlflowClient(uri or f"sqlite:///{root / 'mlflow.db'}")
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            connection = Connection(client, experiment.experiment_id)
        else:
            artifacts = None if uri else (root / "mlruns" / name).as_uri()
            connection = Connection(client, client.create_experiment(name, artifact_location=artifacts))
            if not uri:
                with closing(sqlite3.connect(root / "mlflow.db")) as database:
                    # Readers no longer block the writer: `make ui` during training, and 3x faster writes.
                    database.execute("pragma journal_mode=wal")
        connection.reap()
    return connection


class _LiveRun:
    """Curves and images during training, sent by a thread, so that training never waits for the server.

    Never raises. After the first call that fails the thread logs one warning and ends, and later calls do
    nothing. `track_run` logs what is missing from the files.
    """

    def __init__(self, params: Params) -> None:
        self._points: list[Metric] = []
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._status: str | None = None
        self._thread = Thread(target=self._send, args=(params,), name="live run", daemon=True)
        self._thread.start()

    def log(self, step: float, **values: float) -> None:
        """Add a point to each curve `train/<name>`."""
        now = int(time.time() * 1000)
        self._points += [Metric(f"train/{name}", value, now, int(step)) for name, value in values.items()]
        if len(self._points) >= _POINTS_A_REQUEST:
            self.flush()

    def flush(self) -> None:
        """Queue the points that were collected so far as one request."""
        points, self._points = self._points, []
        self._enqueue(lambda client, run_id: client.log_batch(run_id, metrics=points))

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Queue an image under `name` at `step`."""
        self._enqueue(lambda client, run_id: client.log_image(run_id, image, key=name, step=step))

    def end(self, status: str | None) -> None:
        """Send the remaining calls, then set the run's status; None leaves it open for the next stages."""
        self.flush()
        self._status = status
        self._calls.put(None)
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():
            logger.warning(
                "MLflow does not answer: training ends without it, and track_run logs the results from their "
                "files"
            )

    def _enqueue(self, call: _Call) -> None:
        if self._thread.is_alive():  # else the queue would grow with nobody to read it
            self._calls.put(call)

    def _send(self, params: Params) -> None:
        """Open the run, make the queued calls, and close the run; the body of the thread."""
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


def error_cause(error: BaseException) -> str:
    """Return the innermost cause of an error; only its type if the text may hold a password in an address."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error) if str(error) and "@" not in str(error) else type(error).__name__


def chunks(entries: list[Any], size: int) -> Iterable[list[Any]]:
    """Return consecutive slices of at most `size` entries."""
    return (entries[start : start + size] for start in range(0, len(entries), size))
