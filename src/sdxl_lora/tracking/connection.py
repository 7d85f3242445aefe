"""The connection to the tracking server: the project's experiment in it, and its runs.

Errors of the tracking server never stop a stage: results are files, and `dvc repro -sf track_run` logs them
when the server is back.
"""

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.exceptions import MlflowException

from sdxl_lora.config import Params
from sdxl_lora.runtime.dvc_execution import DvcExecution, parse_execution_id, project_root
from sdxl_lora.runtime.git import head_commit
from sdxl_lora.storage.atomic_io import write_text
from sdxl_lora.storage.report_io import flatten

TRACKING_ERRORS = (MlflowException, OSError)  # requests' errors are OSErrors
EXPERIMENT = "sdxl-lora"
ENTRIES_A_REQUEST = 100  # MLflow's own limit for params


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


def error_cause(error: BaseException) -> str:
    """Return the innermost cause of an error; only its type if the text may hold a password in an address."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error) if str(error) and "@" not in str(error) else type(error).__name__


def chunks(entries: list[Any], size: int) -> Iterable[list[Any]]:
    """Return consecutive slices of at most `size` entries."""
    return (entries[start : start + size] for start in range(0, len(entries), size))


@contextmanager
def explain_tracking_errors() -> Iterator[None]:
    """Turn what MLflow's client raises into a ConnectionError."""
    try:
        yield
    except TRACKING_ERRORS as error:
        raise ConnectionError(
            f"MLflow cannot be reached or refuses ({type(error).__name__}: {error})"
        ) from error
