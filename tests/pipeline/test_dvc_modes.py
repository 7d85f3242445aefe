"""DVC's ways to run the pipeline, and the MLflow runs that each must leave. Only the stages' work is toy."""

import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from sdxl_lora import paths
from sdxl_lora.reproducibility.run_record import find_record
from tests.support.project import FOREIGN, REPOSITORY, TIMEOUT, Project, create_project

TRAIN_AND_BELOW = ["train_lora", "sample_images", "evaluate_lora", "export_lora", "report_run", "track_run"]
UPSTREAM = ["download_dataset", "clean_captions", "encode_dataset"]


def use_toys(stages: dict[str, Any]) -> None:
    for name, stage in stages.items():
        if name != "track_run":
            stage["cmd"] = f"python toy_stages.py {name}"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The demo recipe, all stages run once by `dvc repro` and committed."""
    root = tmp_path_factory.mktemp("modes") / "project"
    root.mkdir()
    shutil.copy(Path(__file__).parents[1] / "support/toy_stages.py", root)
    (root / "demo/dataset").mkdir(parents=True)
    params = yaml.safe_load((REPOSITORY / "recipes/demo.yaml").read_text(encoding="utf-8"))
    params["training"]["warmup_steps"] = 1  # seconds that the toy trains
    project = create_project(root, params, change_stages=use_toys)
    project.dvc("repro")
    project.git("add", "--all")
    project.git("commit", "--quiet", "--message=results")
    return project


def runs(project: Project) -> list[Run]:
    """All MLflow runs of the project, oldest first."""
    client = MlflowClient(f"sqlite:///{project.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sdxl-lora")
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]))


def pointer(project: Project) -> dict[str, str | None]:
    """Where the project's present results are shown."""
    shown: dict[str, str | None] = project.read("data/reports/mlflow.json")["mlflow"]
    return shown


def artifacts(project: Project, run: Run) -> set[str]:
    client = MlflowClient(f"sqlite:///{project.root / 'mlflow.db'}")
    return {item.path for item in client.list_artifacts(run.info.run_id)}


def executed(output: str) -> list[str]:
    """The stages that a DVC command ran, in order."""
    lines = [line.strip() for line in output.splitlines()]
    return [line.split("'")[1] for line in lines if line.startswith("Running stage '")]


def history(project: Project, run: Run) -> list[Any]:
    """The points of a run's loss curve."""
    client = MlflowClient(f"sqlite:///{project.root / 'mlflow.db'}")
    return list(client.get_metric_history(run.info.run_id, "train/loss"))


def wait_for_queue(project: Project, count: int, before: int) -> None:
    """Returns when `count` queued experiments have succeeded, beside `before` runs that were finished.

    DVC is asked once they have ended: its answer takes seconds of the cores that they run on.
    """
    deadline = time.monotonic() + TIMEOUT
    while number_finished(project) < before + count:
        assert time.monotonic() < deadline, project.dvc("queue", "status")
        time.sleep(0.5)
    while (status := project.dvc("queue", "status")).count("Success") < count:
        assert "Failed" not in status, status
        assert time.monotonic() < deadline, status
        time.sleep(1)


def number_finished(project: Project) -> int:
    return sum(run.info.status == "FINISHED" for run in runs(project))


def test_repro_leaves_one_complete_run(project: Project) -> None:
    (run,) = runs(project)
    assert run.info.status == "FINISHED"
    assert pointer(project) == {"run": run.info.run_name, "id": run.info.run_id}
    assert artifacts(project, run) >= {"adapter", "dvc", "grid.png", "images", "reports", "samples.json"}
    assert run.data.metrics["train/loss"] == pytest.approx(1 / 3)


def test_second_repro_has_nothing_to_do(project: Project) -> None:
    assert executed(project.dvc("repro")) == []
    assert len(runs(project)) == 1


def test_experiment_reruns_training_and_what_follows_it_alone(project: Project) -> None:
    output = project.dvc("exp", "run", "--name=rank-8", "--set-param=lora.rank=8")
    assert executed(output) == TRAIN_AND_BELOW
    run = runs(project)[-1]
    assert (run.info.run_name, run.data.params["lora.rank"]) == ("rank-8", "8")
    stages = {key: value for key, value in run.data.tags.items() if key.startswith("stage.")}
    assert {stages[f"stage.{name}"] for name in UPSTREAM} == {"cached"}
    assert {stages[f"stage.{name}"] for name in TRAIN_AND_BELOW[:-1]} == {"executed"}


def test_results_from_the_run_cache_point_to_the_run_that_made_them(project: Project) -> None:
    first, _ = runs(project)
    project.git("checkout", "--quiet", "--", ".")
    project.dvc("checkout", "--quiet")
    project.dvc("exp", "run", "--name=rank-16-again", "--set-param=lora.rank=16")
    assert pointer(project)["id"] == first.info.run_id
    assert len(runs(project)) == 2


def test_experiments_show_their_numbers_and_their_run(project: Project) -> None:
    table = project.dvc("exp", "show", "--csv")
    row = next(line for line in table.splitlines() if "rank-8" in line)
    assert any(run.info.run_id in row for run in runs(project))


def test_experiment_and_run_name_the_same_record(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    for variable in FOREIGN:
        monkeypatch.delenv(variable, raising=False)
    run = next(run for run in runs(project) if run.info.run_name == "rank-8")
    experiment, shown = find_record("rank-8"), find_record(run.info.run_id)
    assert experiment.files[paths.PARAMS] == shown.files[paths.PARAMS]
    assert yaml.safe_load(shown.files[paths.PARAMS])["lora"]["rank"] == 8
    assert experiment.outs("train_lora") == shown.outs("train_lora")
    assert experiment.recorded_head == shown.code_commit == project.git("rev-parse", "HEAD").strip()
    assert shown.changed_code() == []


def test_applied_experiment_brings_its_pointer_back(project: Project) -> None:
    project.git("checkout", "--quiet", "--", ".")
    project.dvc("exp", "apply", "rank-8")
    assert pointer(project)["run"] == "rank-8"
    assert project.read("params.yaml")["lora"]["rank"] == 8
    before = len(runs(project))
    assert executed(project.dvc("repro")) == []
    assert len(runs(project)) == before
    project.git("checkout", "--quiet", "--", ".")
    project.dvc("checkout", "--quiet")


def test_temporary_copy_logs_into_the_project(project: Project) -> None:
    project.dvc("exp", "run", "--temp", "--name=elsewhere", "--set-param=lora.rank=32")
    run = runs(project)[-1]
    assert (run.info.run_name, run.info.status) == ("elsewhere", "FINISHED")
    assert artifacts(project, run) >= {"adapter", "grid.png", "images"}
    place = project.root / "mlruns"
    assert run.info.artifact_uri.startswith(place.as_uri())


@pytest.mark.slow  # a minute: DVC starts workers, copies and a process per stage for three experiments
def test_queue_of_two_at_a_time_leaves_a_live_run_for_each(project: Project) -> None:
    project.dvc(
        "exp", "run", "--queue", "--set-param=lora.rank=2,4,64", "--set-param=training.warmup_steps=3"
    )
    before, finished = {run.info.run_id for run in runs(project)}, number_finished(project)
    project.dvc("queue", "start", "--jobs=2")
    wait_for_queue(project, 3, finished)
    new = [run for run in runs(project) if run.info.run_id not in before]
    assert {run.data.params["lora.rank"] for run in new} == {"2", "4", "64"}
    assert {run.info.status for run in new} == {"FINISHED"}
    assert all(artifacts(project, run) >= {"adapter", "grid.png", "images"} for run in new)


def test_fresh_machine_pulls_results_and_runs_nothing(project: Project, tmp_path: Path) -> None:
    project.dvc("push", "--quiet")
    other = Project(tmp_path / "clone")
    project.git("clone", "--quiet", str(project.root), str(other.root))
    other.dvc("remote", "modify", "--local", "local", "url", str(project.root / "dvc-remote"))
    other.dvc("pull", "--quiet")
    assert executed(other.dvc("repro")) == []
    assert pointer(other) == pointer(project)
    other.dvc("repro", "--single-item", "--force", "track_run")
    (run,) = runs(other)
    assert run.data.tags["dvc.origin"] == "restored"
    assert [point.step for point in history(other, run)] == [1, 2, 3]


def test_server_that_was_down_is_told_all_when_it_is_back(project: Project) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    down = Project(project.root, {"MLFLOW_TRACKING_URI": closed, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"})
    output = down.dvc("exp", "run", "--name=unseen", "--set-param=lora.rank=128")
    assert output.count("MLflow cannot be reached") == 2
    assert pointer(project) == {"run": None, "id": None}
    before = len(runs(project))
    project.dvc("repro", "--single-item", "--force", "track_run")
    run = runs(project)[-1]
    assert len(runs(project)) == before + 1
    assert (run.data.params["lora.rank"], run.info.status) == ("128", "FINISHED")
    assert [point.step for point in history(project, run)] == [1, 2, 3]
    assert pointer(project)["id"] == run.info.run_id
