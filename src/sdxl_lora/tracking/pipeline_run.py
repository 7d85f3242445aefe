"""The pipeline's results as one complete MLflow run: a view of DVC's record, which can be rebuilt from files.

A run belongs to one DVC command, a `DvcExecution`. If the command ran stages, their results complete its run,
which training may have opened already. If DVC restored every result from its cache, nothing new was computed:
the run that first had the same results is marked instead, and a new run is created only if there is none.
"""

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
from sdxl_lora.evaluation.gates import read_gate_failures
from sdxl_lora.runtime.dvc_execution import current_execution
from sdxl_lora.runtime.dvc_lock import read_lock
from sdxl_lora.storage.report_io import flatten
from sdxl_lora.storage.repository import file_digest
from sdxl_lora.tracking.connection import (
    ENTRIES_A_REQUEST,
    TRACKING_ERRORS,
    Connection,
    chunks,
    connect,
    error_cause,
    explain_tracking_errors,
)
from sdxl_lora.tracking.logged_model import log_adapter

_DIGEST_LENGTH = 36  # characters that MLflow stores of a data set's digest
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
_NOTE_LENGTH = 8000  # characters that MLflow stores of a tag

logger = logging.getLogger(__name__)


def track_run(params: Params) -> dict[str, dict[str, str | None]]:
    """Log the pipeline's current results to MLflow as one complete run, or find the run that has them.

    Returns:
        The pointer to the run, {"mlflow": {"run": name, "id": id}}; nulls if the server cannot be reached.

    Raises:
        FileNotFoundError: a result is missing; names the file and the remedy.
    """
    _require_results()
    try:
        connection = connect()
        run_id = _show_results(connection, params)
        name = connection.client.get_run(run_id).info.run_name
    except TRACKING_ERRORS as error:
        logger.warning(
            "MLflow cannot be reached (%s), so this run is not logged; the results are in their files. When "
            "the server is back: `dvc repro -sf track_run`",
            error_cause(error),
        )
        return {"mlflow": {"run": None, "id": None}}
    logger.info("MLflow run %s (%s): `make ui` shows it", name, run_id)
    return {"mlflow": {"run": name, "id": run_id}}


def _require_results() -> None:
    """Raise FileNotFoundError unless every result exists.

    Checked first, because a FileNotFoundError later would be reported as an error of the server: as an
    OSError it is among `TRACKING_ERRORS`.
    """
    for path in _files_shown():
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} not found: `dvc repro` generates missing results, `dvc pull` downloads pushed ones"
            )


def _files_shown() -> Iterator[Path]:
    """Yield all files that a complete run needs."""
    yield from _RESULTS  # among them the table of samples, which the next line reads
    samples = pd.read_json(paths.SAMPLE_TABLE, lines=True)
    yield from (paths.SAMPLES / str(file) for file in samples["file"])


def _show_results(connection: Connection, params: Params) -> str:
    """Complete this execution's run, or find the run that has the same results; return its id."""
    client, execution = connection.client, current_execution()
    # The stages that this DVC command has run. None: DVC restored all results from its cache.
    records = {name: record for name, record in execution.records().items() if name != "track_run"}
    content = _content_id()
    shown = connection.run_of_content(content)
    if shown is not None and not records:
        # The same results under another experiment's name: the run is marked with that name.
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
    _log_images(client, run_id)
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
    # After all results: `run_of_content` must not find a run that a lost connection left incomplete.
    client.set_tag(run_id, "dvc.content", content)
    client.set_tag(run_id, "dvc.train_lora", training_digest(paths.LOCK))
    client.set_terminated(run_id, "FINISHED")
    return run_id


def download_record(run_id: str, folder: Path) -> Path:
    """Download the record that `_show_results` logged with a run; return its folder, laid out as the project.

    Raises:
        ConnectionError: the server cannot be reached, or does not have the run or its record.
    """
    with explain_tracking_errors():
        return Path(connect().client.download_artifacts(run_id, str(_RECORD_FOLDER), str(folder)))


def _log_curves(client: MlflowClient, run_id: str) -> None:
    """Log the points of the training curves that the live run has not logged, from the file."""
    logged = {point.step for point in client.get_metric_history(run_id, "train/loss")}
    curve = pd.read_csv(paths.LOSS_CURVE)
    curve = curve[~curve["step"].isin(logged)]
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
    """Log each number of each report as a metric under the report's name, and each string as a tag.

    The metrics of the evaluation are linked to the model and the data set as well.
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
    """Set the tags `gates`, passed or failed, and `gates.<name>` with the reason of each failed gate."""
    failed = read_gate_failures(paths.GATES)
    tags = {"gates": "failed" if failed else "passed"}
    tags |= {f"gates.{name}": reason for name, reason in failed.items()}
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
    client.set_logged_model_tags(model_id, tags)


def _log_dataset(client: MlflowClient, run_id: str) -> Dataset:
    """Log the data set that the adapter was trained on, with the digest of its images and captions."""
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


def _log_images(client: MlflowClient, run_id: str) -> None:
    """Log the grid, each sample under its name, and the table of their prompts and seeds."""
    client.log_artifact(run_id, str(paths.SAMPLE_GRID))
    samples = pd.read_json(paths.SAMPLE_TABLE, lines=True)
    client.log_table(run_id, samples, "samples.json")
    for row in samples.itertuples():
        place, seed = Path(str(row.file)).stem.split("-seed-")
        # MLflow's image grid has a slider for the step, so it serves as the strength, in percent.
        step = round(100 * float(str(row.strength)))
        with Image.open(paths.SAMPLES / str(row.file)) as image:
            client.log_image(run_id, image, key=f"sample {place} seed {seed}", step=step)


def memory_tag() -> str:
    """Return training's peak memory and its forecast, in few characters: MLflow's page cuts long tags."""
    report = json.loads(paths.TRAINING_REPORT.read_text(encoding="utf-8"))
    measured, forecast = report["peak_memory_gib"], report.get("forecast_gib")
    note = "process, on a CPU" if forecast is None else f"forecast {forecast['total']:.2f}"
    return f"{measured:.2f} GiB ({note})"


def _run_description(run_id: str) -> str:
    """Return the text of the run's page: the model card, with its image as an artifact of the run."""
    card = paths.CARD.read_text(encoding="utf-8")
    _, _, text = card.removeprefix("---").partition("\n---\n")  # without the YAML header for the Hub
    grid = paths.SAMPLE_GRID.name
    return text.strip().replace(f"]({grid})", f"](get-artifact?path={grid}&run_uuid={run_id})")[:_NOTE_LENGTH]


def _content_id() -> str:
    """Return a hash of the outputs and params of all stages in dvc.lock, except track_run."""
    results = {
        name: [{out["path"]: out.get("md5") for out in entry.get("outs", [])}, entry.get("params")]
        for name, entry in read_lock(paths.LOCK).items()
        if name != "track_run"
    }
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:16]


def _pipeline_stages() -> list[str]:
    """Return the stages whose results a run shows: all except track_run itself."""
    stages = yaml.safe_load(paths.PIPELINE.read_text(encoding="utf-8"))["stages"]
    return [name for name in stages if name != "track_run"]
