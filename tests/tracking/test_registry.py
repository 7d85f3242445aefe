import json
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from sdxl_lora import paths
from sdxl_lora.cli.main import app
from sdxl_lora.config import load_params
from sdxl_lora.runtime.dvc_execution import current_execution
from sdxl_lora.storage.report_io import write_numbers
from sdxl_lora.tracking.connection import EXPERIMENT, connect
from sdxl_lora.tracking.pipeline_run import track_run
from sdxl_lora.tracking.registry import promote
from tests.support.tracked import write_gates, write_results


@pytest.fixture(autouse=True)
def tracked_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project whose results a run shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_results()
    track()


def track() -> str:
    """Shows the present results in a run of their own; its id."""
    (current_execution().scratch / "run_id").unlink(missing_ok=True)
    pointer = track_run(load_params())
    write_numbers(paths.MLFLOW_POINTER, pointer)
    return str(pointer["mlflow"]["id"])


def client() -> MlflowClient:
    return connect().client


def test_promoted_adapter_is_the_champion_and_can_be_fetched() -> None:
    version = promote()
    champion = client().get_model_version_by_alias(EXPERIMENT, "champion")
    assert champion.version == version.version
    assert champion.run_id == json.loads(paths.MLFLOW_POINTER.read_text(encoding="utf-8"))["mlflow"]["id"]
    uri = client().get_model_version_download_uri(EXPERIMENT, version.version)
    weights = Path(uri.removeprefix("file://")) / "adapter_weights" / paths.EXPORTED_WEIGHTS.name
    assert weights.read_bytes() == paths.EXPORTED_WEIGHTS.read_bytes()


def test_champion_is_loaded_by_its_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    promote()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client().tracking_uri)
    adapter = mlflow.diffusers.load_model(f"models:/{EXPERIMENT}@champion")
    assert adapter.base_model == load_params().model.base
    weights = Path(adapter.adapter_path) / paths.EXPORTED_WEIGHTS.name
    assert weights.read_bytes() == paths.EXPORTED_WEIGHTS.read_bytes()


def test_promoting_twice_registers_once() -> None:
    assert promote().version == promote().version
    assert len(client().search_model_versions(f"name = '{EXPERIMENT}'")) == 1


def test_adapter_that_fails_a_gate_is_refused_and_the_champion_stays(
    capsys: pytest.CaptureFixture[str],
) -> None:
    champion = promote().version
    write_gates("copied.adapter is 1, should be at most 0.1")
    with pytest.raises(SystemExit) as exit_:
        app(["promote"])
    assert "promote: the adapter fails its gates; nothing was registered:\n  copied.adapter is 1" in str(
        exit_.value
    )
    assert client().get_model_version_by_alias(EXPERIMENT, "champion").version == champion
    assert len(client().search_model_versions(f"name = '{EXPERIMENT}'")) == 1
    assert capsys.readouterr().out == ""


def test_alias_moves_to_the_next_adapter_that_passes() -> None:
    first = promote()
    paths.LOCK.write_text(paths.LOCK.read_text(encoding="utf-8").replace("'1'", "'2'"), encoding="utf-8")
    track()
    second = promote()
    assert first.version != second.version
    assert client().get_model_version_by_alias(EXPERIMENT, "champion").version == second.version


def test_adapter_that_no_run_shows_is_refused_with_the_remedy() -> None:
    write_numbers(paths.MLFLOW_POINTER, {"mlflow": {"run": None, "id": None}})
    with pytest.raises(ValueError, match="dvc repro -sf track_run"):
        promote()


def test_run_of_another_adapter_is_not_promoted() -> None:
    paths.LOCK.write_text(paths.LOCK.read_text(encoding="utf-8").replace("'1'", "'2'"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has another adapter than dvc\.lock"):
        promote()


def test_without_an_evaluation_the_stage_to_run_is_named() -> None:
    paths.GATES.unlink()
    with pytest.raises(FileNotFoundError, match="dvc repro evaluate_lora"):
        promote()


def test_nothing_is_registered_before_someone_asks() -> None:
    with pytest.raises(MlflowException):
        client().get_model_version_by_alias(EXPERIMENT, "champion")
