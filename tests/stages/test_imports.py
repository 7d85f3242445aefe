"""Stages load no library that they do not use: one costs each run of a stage up to seven CPU seconds."""

from pathlib import Path

import pytest

from benchmarks.import_time import STAGES
from sdxl_lora import paths
from tests.support.imports import modules_after_import, modules_after_run
from tests.support.tracked import write_results

REPOSITORY = Path(__file__).parents[2]
DEMO = (REPOSITORY / "recipes/demo.yaml").read_text(encoding="utf-8")
MODEL_LIBRARIES = {"torch", "diffusers", "peft", "accelerate", "bitsandbytes"}
NOT_LOADED = {
    "download_dataset": {*MODEL_LIBRARIES, "transformers", "mlflow", "datasets", "pandas"},
    "clean_captions": {*MODEL_LIBRARIES, "mlflow", "datasets"},
    "encode_dataset": {"mlflow", "datasets"},
    "train_lora": {
        "mlflow",
        "datasets",
        "diffusers.pipelines.stable_diffusion_xl",
        "diffusers.models.autoencoders",
    },
    "sample_images": {"mlflow", "datasets"},
    "evaluate_lora": {
        "mlflow",
        "datasets",
        "diffusers.pipelines.stable_diffusion_xl",
        "diffusers.models.autoencoders",
    },
    "export_lora": {*MODEL_LIBRARIES - {"torch"}, "transformers", "mlflow", "datasets"},
    "report_run": {*MODEL_LIBRARIES, "transformers", "mlflow", "datasets"},
    "track_run": {*MODEL_LIBRARIES, "transformers", "datasets"},
}


def test_every_stage_is_tested() -> None:
    scripts = {path.stem for path in (REPOSITORY / "stages").glob("*.py")} - {"__init__"}
    assert scripts == set(NOT_LOADED) == set(STAGES)


@pytest.mark.parametrize("stage", NOT_LOADED)
def test_import_loads_no_library_that_the_stage_does_not_use(stage: str) -> None:
    assert modules_after_import(stage) & NOT_LOADED[stage] == set()


def test_neither_download_nor_captions_load_torch_as_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").symlink_to(REPOSITORY / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    paths.PARAMS.write_text(DEMO, encoding="utf-8")
    for stage, output in {"download_dataset": paths.RAW_CAPTIONS, "clean_captions": paths.CAPTIONS}.items():
        assert modules_after_run(stage) & MODEL_LIBRARIES == set()
        assert output.is_file()


def test_tracking_loads_no_torch_as_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    paths.PARAMS.write_text(DEMO, encoding="utf-8")
    write_results()
    assert modules_after_run("track_run") & MODEL_LIBRARIES == set()
    assert (tmp_path / "mlflow.db").is_file()
