from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from sdxl_lora import paths
from sdxl_lora.inference.samples import Sample, save_table
from sdxl_lora.storage.report_io import write_numbers
from sdxl_lora.storage.safetensors_io import write_tensors
from stages import report_run
from tests.support.imports import modules_after_run

RECIPE = Path("recipes/demo.yaml").resolve()


pytestmark = pytest.mark.usefixtures("project")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project in which every stage before this one has run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    paths.PARAMS.write_text(RECIPE.read_text(encoding="utf-8"), encoding="utf-8")
    for folder in (paths.SAMPLES, paths.RAW_IMAGES, paths.EXPORT, paths.REPORTS):
        folder.mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(paths.SAMPLES / "0.png")
    Image.new("RGB", (32, 32), "blue").save(paths.RAW_IMAGES / "train.png")
    save_table(paths.SAMPLE_TABLE, [Sample("0.png", "pizza", 0, 1.0)])
    write_tensors(
        paths.EXPORTED_WEIGHTS, {"a": torch.ones(1)}, {"sdxl_lora.git.commit": "c0ffee", "format": "pt"}
    )
    write_numbers(paths.METRICS, {"change": {}, "copy_threshold": 0.9})
    write_numbers(paths.TRAINING_REPORT, {"seconds": 1.5})
    gate = {"name": "copied", "figure": "f", "value": 0.0, "limit": 0.1, "passed": True, "reason": ""}
    pair = {
        "file": "0.png",
        "strength": 1.0,
        "origin": "free",
        "training_image": "train.png",
        "similarity": 0.5,
        "copied": False,
    }
    for path, row in {
        paths.GATES: gate,
        paths.COPIES: pair,
        paths.LOSS_CURVE: {"step": 1, "loss": 0.5},
        paths.LOSS_BY_TIMESTEP: {"timestep": 100, "base": 0.5, "adapter": 0.4},
    }.items():
        pd.DataFrame([row]).to_csv(path, index=False)


def test_page_is_written() -> None:
    report_run.main()
    html = paths.REPORT.read_text(encoding="utf-8")
    for words in ("Fluent 3D emoji", "passes all 1 gates", "pizza", "train.png", "c0ffee"):
        assert words in html


def test_stage_loads_no_torch_as_it_runs() -> None:
    assert "torch" not in modules_after_run("report_run")
    assert paths.REPORT.is_file()


def test_missing_figures_name_the_stage_to_run() -> None:
    paths.METRICS.unlink()
    with pytest.raises(FileNotFoundError, match="dvc repro evaluate_lora"):
        report_run.main()
