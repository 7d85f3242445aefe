import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.exceptions import MlflowException
from PIL import Image

from sdxl_lora import paths
from sdxl_lora.adapters.lineage import training_digest
from sdxl_lora.config import Params, load_params
from sdxl_lora.runtime.dvc_execution import DvcExecution, current_execution, machine_digest
from sdxl_lora.runtime.stage import record_stage
from sdxl_lora.storage.report_io import write_numbers
from sdxl_lora.storage.repository import file_digest
from sdxl_lora.tracking.connection import EXPERIMENT, connect, error_cause
from sdxl_lora.tracking.live_run import live_run
from sdxl_lora.tracking.pipeline_run import memory_tag, track_run
from tests.support.patience import patience
from tests.support.tracked import write_gates, write_results

REPOSITORY = Path(__file__).parents[2]
CLOSED = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project in which every stage but track_run has run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(
        "sdxl_lora.tracking.live_run.PATIENCE_SECONDS", patience(5)
    )  # a busy machine is not to exhaust it
    write_results()


@pytest.fixture
def params() -> Params:
    return load_params(REPOSITORY / "recipes/demo.yaml")


def client() -> MlflowClient:
    return connect().client


def test_run_shows_params_curves_numbers_images_and_the_adapter(params: Params) -> None:
    with record_stage("train_lora"):
        pass
    pointer = track_run(params)["mlflow"]
    run = client().get_run(str(pointer["id"]))
    assert run.info.status == "FINISHED"
    assert run.data.params["lora.rank"] == str(params.lora.rank)
    history = client().get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(10, 0.5), (20, 0.25)]
    assert run.data.metrics["training/group/value"] == 2.0
    assert run.data.tags["training/attention"] == "sdpa"
    assert run.data.tags["stage.train_lora"] == "executed"
    assert run.data.tags["stage.encode_dataset"] == "cached"
    assert run.data.tags["gates"] == "passed"
    assert run.data.tags["memory"] == "9.98 GiB (process, on a CPU)"
    assert run.data.tags["dvc.train_lora"] == training_digest(paths.LOCK)
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("# An adapter\n\n![Samples](get-artifact?path=grid.png&run_uuid=")
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("owner/pictures", file_digest(paths.ENCODED_INDEX)[:36])
    artifacts = {item.path for item in client().list_artifacts(run.info.run_id)}
    assert {"adapter", "dvc", "grid.png", "images", "reports", "samples.json"} <= artifacts
    reports = {item.path for item in client().list_artifacts(run.info.run_id, "reports")}
    expected = {"captions.html", "gates.csv", "index.html", "loss.csv"}
    assert reports == {f"reports/{name}" for name in expected}


def test_measured_memory_is_beside_its_forecast() -> None:
    report = {"peak_memory_gib": 13.5, "forecast_gib": {"weights": 6.3, "total": 13.77}}
    write_numbers(paths.TRAINING_REPORT, report)
    assert memory_tag() == "13.50 GiB (forecast 13.77)"


def model_of(run_id: str | None) -> LoggedModel:
    """The one model that a run logged."""
    outputs = client().get_run(str(run_id)).outputs.model_outputs
    assert len(outputs) == 1
    return client().get_logged_model(outputs[0].model_id)


def test_run_of_an_adapter_that_fails_says_why(params: Params) -> None:
    write_gates("copied.adapter is 1, should be at most 0.1")
    run_id = str(track_run(params)["mlflow"]["id"])
    for tags in (client().get_run(run_id).data.tags, model_of(run_id).tags):
        assert tags["gates"] == "failed"
        assert tags["gates.copied"] == "copied.adapter is 1, should be at most 0.1"


def test_evaluation_is_of_the_model_on_the_data_set(params: Params) -> None:
    run_id = track_run(params)["mlflow"]["id"]
    model, run = model_of(run_id), client().get_run(str(run_id))
    assert (model.name, model.model_type, model.status) == ("adapter", "lora", LoggedModelStatus.READY)
    assert model.params["lora.rank"] == str(params.lora.rank)
    digest = file_digest(paths.ENCODED_INDEX)[:36]
    number = paths.NUMBERS.index(paths.METRICS)
    found = {metric.key: metric for metric in model.metrics}
    value = found["group/value"]
    assert set(found) == {"group/value", "peak_memory_gib"}  # those of metrics.json alone
    assert value.value == run.data.metrics["group/value"] == number
    assert (value.dataset_name, value.dataset_digest) == ("owner/pictures", digest)


def test_live_curve_is_not_drawn_twice(params: Params) -> None:
    with record_stage("train_lora"), live_run(params) as run:
        run.log(10, loss=0.5)
        run.log(20, loss=0.25)
    pointer = track_run(params)["mlflow"]
    assert len(client().get_metric_history(str(pointer["id"]), "train/loss")) == 2
    assert len(client().search_runs([connect().experiment_id])) == 1


def test_restored_results_are_linked_to_the_run_that_made_them(params: Params) -> None:
    with record_stage("train_lora"):
        pass
    first = track_run(params)
    shutil.rmtree(current_execution().scratch)
    assert track_run(params) == first
    assert len(client().search_runs([connect().experiment_id])) == 1


def test_failed_training_is_marked_so(params: Params) -> None:
    with pytest.raises(KeyError), live_run(params):
        raise KeyError("x")
    assert client().search_runs([connect().experiment_id])[0].info.status == "FAILED"


def test_runs_whose_process_is_gone_are_marked_killed(params: Params) -> None:
    gone = DvcExecution(machine_digest(), 999_999_999, 1)
    run_id = connect().new_run(gone, params, {})
    assert client().get_run(run_id).info.status == "KILLED"


def test_server_that_is_down_stops_nothing(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", CLOSED)
    with live_run(params) as run:
        run.log(1, loss=0.5)
        run.image("preview", Image.new("RGB", (8, 8)), 1)
    assert track_run(params) == {"mlflow": {"run": None, "id": None}}


@pytest.mark.parametrize(
    "path", [paths.GATES, paths.LOCK, paths.SAMPLES / "strength-1/00-seed-0.png"], ids=str
)
def test_results_that_are_missing_are_no_fault_of_the_server(params: Params, path: Path) -> None:
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"^{path} not found: `dvc repro` generates missing results"):
        track_run(params)


def test_server_that_never_answers_slows_no_step(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdxl_lora.tracking.live_run.PATIENCE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{patience(60):.0f}")
        start = time.monotonic()
        with live_run(params) as run:
            for step in range(100):
                run.log(step, loss=0.5)
            run.image("preview", Image.new("RGB", (8, 8)), 1)
        assert time.monotonic() - start < patience(60)  # one wait for an answer would take longer


def test_curve_that_broke_off_is_completed(params: Params) -> None:
    with record_stage("train_lora"), live_run(params) as run:
        run.log(10, loss=0.5)
    history = client().get_metric_history(str(track_run(params)["mlflow"]["id"]), "train/loss")
    assert [point.step for point in history] == [10, 20]


def test_news_of_a_failure_hold_no_password() -> None:
    with pytest.raises(MlflowException, match="hunter2") as told:
        MlflowClient("http://me:hunter2@127.0.0.1:9").get_experiment_by_name("x")
    assert error_cause(told.value) == "[Errno 111] Connection refused"
    assert error_cause(ValueError("http://me:hunter2@host")) == "ValueError"


def test_nothing_logged_tells_the_host_or_the_home_folder(params: Params) -> None:
    run_id = str(track_run(params)["mlflow"]["id"])
    run = client().get_run(run_id)
    said = json.dumps({**run.data.tags, **run.data.params})
    assert str(Path.home()) not in said
    assert "mlflow.user" not in run.data.tags
    model = model_of(run_id)
    folder = Path(model.artifact_location.removeprefix("file://"))
    said = "".join(path.read_text() for path in folder.iterdir() if path.is_file()) + json.dumps(model.tags)
    assert str(Path.home()) not in said
    assert str(Path.cwd()) not in said


def test_two_processes_can_create_the_database_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from sdxl_lora.tracking.connection import connect; connect()"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=patience(30))[1].count("Traceback") for process in processes] == [
        0,
        0,
    ]
    assert [process.returncode for process in processes] == [0, 0]
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("pragma journal_mode").fetchone() == ("wal",)
        query = "select count(*) from experiments where name = ?"
        assert database.execute(query, (EXPERIMENT,)).fetchone() == (1,)
