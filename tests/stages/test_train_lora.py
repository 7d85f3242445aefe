from pathlib import Path

import pandas as pd
import pytest
import yaml
from encoded import write_encoded_dataset

from sdxl_lora import paths
from sdxl_lora.config import load_params
from sdxl_lora.lora import saved_lora
from sdxl_lora.reports import read_numbers
from stages import train_lora


@pytest.fixture(params=[None, 2], ids=["no previews", "previews"])
def preview_every(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> int | None:
    """A project whose recipe trains three steps on an encoded data set."""
    (tmp_path / "demo").symlink_to(Path("demo").resolve())
    recipe = yaml.safe_load(Path("recipes/demo.yaml").read_text(encoding="utf-8"))
    every: int | None = request.param
    recipe["training"].update(steps=3, batch_size=2, warmup_steps=1, log_every=2, preview_every=every)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("SDXL_LORA_DEVICE", "cpu")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    paths.PARAMS.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    paths.DATA.mkdir()
    write_encoded_dataset(paths.ENCODED, load_params().model)
    paths.REPORTS.mkdir()
    return every


def test_every_output_that_dvc_expects_is_written(preview_every: int | None) -> None:
    train_lora.main()
    assert saved_lora(paths.LORA).stat().st_size > 0
    assert read_numbers(paths.TRAINING_REPORT, "train_lora")["steps"] == 3
    assert pd.read_csv(paths.LOSS_CURVE)["step"].tolist() == [2, 3]
    previews = [path.name for path in paths.PREVIEWS.iterdir()]
    assert previews == (["step-000002.png"] if preview_every else [])
