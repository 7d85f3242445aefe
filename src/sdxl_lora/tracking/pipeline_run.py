"""The pipeline's results as one complete MLflow run: a view of what DVC records, which can be rebuilt."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, RunTag
from PIL import Image

from sdxl_lora import paths
from sdxl_lora.adapters.lineage import read_lineage, training_digest
from sdxl_lora.config import Params
from sdxl_lora.evaluation.gates import failures
from sdxl_lora.runtime.dvc_execution import current_execution
from sdxl_lora.runtime.dvc_lock import read_lock
from sdxl_lora.storage.report_io import flatten
from sdxl_lora.storage.repository import file_digest
from sdxl_lora.tracking.live_run import (
    ENTRIES_A_REQUEST,
    TRACKING_ERRORS,
    Connection,
    chunks,
    connect,
    error_cause,
    explain_tracking_errors,
)
from sdxl_lora.tracking.logged_model import log_adapter

_DIGEST_LENGTH = 36  # characters that MLflow has for a data set's digest
_RECORD_FOLDER = Path("dvc")  # of a run's artifacts
_RESULTS = (
    paths.PIPELINE,
    paths.LOCK,
    paths.RAW_SOURCE,
    paths.ENCODED_INDEX,
    *paths.NUMBERS,
    paths.LOSS_CURVE,
    paths.GATES,
    paths.EXPORTED_WEIGHTS,
    paths.CARD,
    paths.SAMPLE_GRID,
    paths.SAMPLE_TABLE,
)
_NOTE_LENGTH = 8000  # characters that MLflow has for a tag

logger = logging.getLogger(__name__)


def track_run(params: Params) -> dict[str, dict[str, str | None]]:
    """Shows the pipeline's present results in MLflow as one complete run.

    Results that DVC restored, and that a run shows already, are linked to that run instead.

    Returns:
        The pointer to that run, {"mlflow": {"run": name, "id": id}}; nulls if the server cannot be reached.

    Raises:
        FileNotFoundError: there is nothing to show, or not all of it; names a file and the remedy.
    """
    _require_results()
    try:
        connection = connect()
        run_id = _show_results(connection, params)
        name = connection.client.get_run(run_id).info.run_name
    except TRACKING_ERRORS as error:
        logger.warning(
            "MLflow cannot be reached (%s): results are safe in their files. When it is back: "
            "`dvc repro -sf track_run`",
            error_cause(error),
        )
        return {"mlflow": {"run": None, "id": None}}
    logger.info("MLflow run %s (%s): `make ui` shows it", name, run_id)
    return {"mlflow": {"run": name, "id": run_id}}


def _require_results() -> None:
    """Refuses results that are not all there, before their absence passes for a fault of the server."""
    for path in _files_shown():
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} not found: `dvc repro` makes what is missing, and `dvc pull` gets what others made"
            )


def _files_shown() -> Iterator[Path]:
    """All that a run cannot be shown without; the table of samples before the pictures that it names."""
    yield from _RESULTS
    samples = pd.read_json(paths.SAMPLE_TABLE, lines=True)
    yield from (paths.SAMPLES / str(file) for file in samples["file"])


def _show_results(connection: Connection, params: Params) -> str:
    """Completes this execution's run, or finds the one that shows the same results; its id."""
    client, execution = connection.client, current_execution()
    records = {name: record for name, record in execution.records().items() if name != "track_run"}
    content = _content_id()
    shown = connection.run_of_content(content)
    if shown is not None and not records:
        also = client.get_run(shown).data.tags.get("dvc.also", "")
        names = set(also.split(",")) | {os.environ.get("DVC_EXP_NAME") or "repro"}
        client.set_tag(shown, "dvc.also", ",".join(sorted(names - {""})))
        return shown
    run_id = connection.new_run(execution, params, {} if records else {"dvc.origin": "restored"})
    _log_curves(client, run_id)
    model_id = log_adapter(
        client, run_id, params, paths.EXPORTED_WEIGHTS, read_lineage(paths.EXPORTED_WEIGHTS)
    )
    _log_reports(client, run_id, model_id, _log_dataset(client, run_id))
    _log_pictures(client, run_id)
    _log_verdict(client, run_id, model_id)
    for name in _pipeline_stages():
        client.set_tag(run_id, f"stage.{name}", records[name].status if name in records else "cached")
        if name in records:
            client.log_metric(run_id, f"seconds/{name}", records[name].seconds)
    client.log_artifacts(run_id, str(paths.EXPORT), "adapter")
    for path in filter(Path.is_file, paths.RECORD):
        client.log_artifact(run_id, str(path), str(_RECORD_FOLDER / path.parent))
    client.set_tag(run_id, "memory", memory_tag())
    client.set_tag(run_id, "mlflow.note.content", _run_description(run_id))
    client.set_tag(run_id, "dvc.content", content)
    client.set_tag(run_id, "dvc.train_lora", training_digest(paths.LOCK))
    client.set_terminated(run_id, "FINISHED")
    return run_id


def download_record(run_id: str, folder: Path) -> Path:
    """Fetches what `_show_results` kept of DVC's record with a run; where it lies, laid out as the project.

    Raises:
        ConnectionError: the server cannot be reached, has no such run, or the run has no record.
    """
    with explain_tracking_errors():
        return Path(connect().client.download_artifacts(run_id, str(_RECORD_FOLDER), str(folder)))


def _log_curves(client: MlflowClient, run_id: str) -> None:
    """The training curves from their file, as far as the live run has not drawn them."""
    drawn = {point.step for point in client.get_metric_history(run_id, "train/loss")}
    curve = pd.read_csv(paths.LOSS_CURVE)
    curve = curve[~curve["step"].isin(drawn)]
    now = int(time.time() * 1000)
    steps = curve.pop("step").tolist()
    points = [
        Metric(f"train/{name}", value, now, step)
        for name, values in curve.items()
        for step, value in zip(steps, values.tolist(), strict=True)
    ]
    for chunk in chunks(points, ENTRIES_A_REQUEST):
        client.log_batch(run_id, metrics=chunk)


def _log_reports(client: MlflowClient, run_id: str, model_id: str, dataset: Dataset) -> None:
    """Every number of every report as a metric under the report's name, every word as a tag.

    What was evaluated is a metric of the model on the data set as well.
    """
    evaluated = {"model_id": model_id, "dataset_name": dataset.name, "dataset_digest": dataset.digest}
    now = int(time.time() * 1000)
    for path in paths.NUMBERS:
        prefix = "" if path == paths.METRICS else f"{path.stem}/"
        leaves = flatten(json.loads(path.read_text(encoding="utf-8")), "/")
        entries = {f"{prefix}{key}": value for key, value in leaves}
        words = [RunTag(key, value) for key, value in entries.items() if isinstance(value, str)]
        of = evaluated if path == paths.METRICS else {}
        numbers = {key: float(value) for key, value in entries.items() if not isinstance(value, str)}
        points = [Metric(key, value, now, 0, **of) for key, value in numbers.items()]
        client.log_batch(run_id, metrics=points, tags=words)
    for path in sorted(paths.REPORTS.iterdir()):
        if path.suffix in (".csv", ".html", ".md") and path != paths.REPRODUCTION_PAGE:
            client.log_artifact(run_id, str(path), "reports")


def _log_verdict(client: MlflowClient, run_id: str, model_id: str) -> None:
    """Tags that say whether the adapter passed its gates, and why not: `gates` and `gates.<name>`."""
    failed = failures(paths.GATES)
    tags = {"gates": "failed" if failed else "passed"}
    tags |= {f"gates.{name}": reason for name, reason in failed.items()}
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
    client.set_logged_model_tags(model_id, tags)


def _log_dataset(client: MlflowClient, run_id: str) -> Dataset:
    """The data set that the adapter was trained on, with the digest of its images and captions."""
    record = json.loads(paths.RAW_SOURCE.read_text(encoding="utf-8"))
    digest = file_digest(paths.ENCODED_INDEX)
    dataset = Dataset(
        name=record["repository"],
        digest=digest[:_DIGEST_LENGTH],
        source_type="dvc",
        source=json.dumps(record),
        profile=json.dumps({"sha256": digest, "examples": record["examples"]}),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
    return dataset


def _log_pictures(client: MlflowClient, run_id: str) -> None:
    """The grid, every sample under its own name, and a table of what each was drawn from."""
    client.log_artifact(run_id, str(paths.SAMPLE_GRID))
    samples = pd.read_json(paths.SAMPLE_TABLE, lines=True)
    client.log_table(run_id, samples, "samples.json")
    for row in samples.itertuples():
        place, seed = Path(str(row.file)).stem.split("-seed-")
        step = round(100 * float(str(row.strength)))  # the slider of MLflow's image grid: strength in percent
        with Image.open(paths.SAMPLES / str(row.file)) as image:
            client.log_image(run_id, image, key=f"sample {place} seed {seed}", step=step)


def memory_tag() -> str:
    """What training held at most, beside its forecast. Short, since MLflow's page cuts long tags."""
    report = json.loads(paths.TRAINING_REPORT.read_text(encoding="utf-8"))
    measured, forecast = report["peak_memory_gib"], report.get("forecast_gib")
    beside = "process, on a CPU" if forecast is None else f"forecast {forecast['total']:.2f}"
    return f"{measured:.2f} GiB ({beside})"


def _run_description(run_id: str) -> str:
    """What a run's page opens with: the model card, its pictures as MLflow's server hands them out."""
    card = paths.CARD.read_text(encoding="utf-8")
    _, _, text = card.removeprefix("---").partition("\n---\n")  # the Hub's header is not for readers
    grid = paths.SAMPLE_GRID.name
    return text.strip().replace(f"]({grid})", f"](get-artifact?path={grid}&run_uuid={run_id})")[:_NOTE_LENGTH]


def _content_id() -> str:
    """A hash of all results but the pointer to MLflow, and of the params that they came from."""
    results = {
        name: [{out["path"]: out.get("md5") for out in entry.get("outs", [])}, entry.get("params")]
        for name, entry in read_lock(paths.LOCK).items()
        if name != "track_run"
    }
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:16]


def _pipeline_stages() -> list[str]:
    """The stages whose results a run shows."""
    stages = yaml.safe_load(paths.PIPELINE.read_text(encoding="utf-8"))["stages"]
    return [name for name in stages if name != "track_run"]
