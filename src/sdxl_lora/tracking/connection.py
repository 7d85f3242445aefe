"""The tracking server: the project's experiment there, its runs, and what can go wrong with it.

In `tracking` alone is MLflow known. What goes wrong with the tracking server never stops a stage: results are
files, and `dvc repro -sf track_run` shows them when it is back.
"""

import os
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.exceptions import MlflowException

from sdxl_lora.config import Params
from sdxl_lora.runtime.dvc_execution import DvcExecution, parse_execution_id, project_root
from sdxl_lora.runtime.git import head_commit
from sdxl_lora.storage.report_io import flatten

TRACKING_ERRORS = (MlflowException, OSError)  # requests' errors are OSErrors
EXPERIMENT = "sdxl-lora"
ENTRIES_A_REQUEST = 100  # MLflow's own limit for params


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


def error_cause(error: BaseException) -> str:
    """What went wrong at the bottom of it, unless that tells an address, which may hold a password."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error) if str(error) and "@" not in str(error) else type(error).__name__


def chunks(entries: list[Any], size: int) -> Iterable[list[Any]]:
    return (entries[start : start + size] for start in range(0, len(entries), size))
