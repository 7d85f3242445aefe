import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from sdxl_lora import paths
from sdxl_lora.config import load_params
from sdxl_lora.inference.samples import Sample, save_table
from sdxl_lora.storage.report_io import write_numbers
from sdxl_lora.storage.safetensors_io import read_header
from stages import export_lora
from tests.support.adapters import write_adapter
from tests.support.encoded import write_encoded_dataset


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which every stage before this one has run."""
    (tmp_path / "demo").symlink_to(Path("demo").resolve())
    recipe = yaml.safe_load(Path("recipes/demo.yaml").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    paths.PARAMS.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    params = load_params()
    paths.RAW.mkdir(parents=True)
    paths.RAW_SOURCE.write_text(
        json.dumps({"repository": "owner/data", "revision": "c0ffee"}), encoding="utf-8"
    )
    write_encoded_dataset(paths.ENCODED, params.model)
    write_adapter(paths.LORA, params.model, params.lora)
    sample = Sample("strength-1/00-seed-0.png", "pizza, fluent 3d style", 0, 1.0)
    (paths.SAMPLES / sample.file).parent.mkdir(parents=True)
    for path in (paths.SAMPLES / sample.file, paths.SAMPLE_GRID):
        Image.new("RGB", (64, 64), "red").save(path)
    save_table(paths.SAMPLE_TABLE, [sample])
    loss = {"base": 0.2, "adapter": 0.1, "change_percent": -50.0}
    ends = {"change_percent_low": -60.0, "change_percent_high": -40.0}
    write_numbers(paths.METRICS, {"held_out_loss": {**loss, **ends}, "change": {}})
    gates = {"name": ["a", "b"], "passed": [True, False], "reason": [None, "b is 1, should be at most 0"]}
    pd.DataFrame(gates).to_csv(paths.GATES, index=False)
    return tmp_path


def test_folder_is_what_the_hub_wants_and_says_where_it_comes_from(project: Path) -> None:
    export_lora.main()
    names = {path.relative_to(paths.EXPORT).as_posix() for path in paths.EXPORT.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "grid.png",
        "images/00-seed-0.png",
        "fluent-3d-emoji.safetensors",
        "pytorch_lora_weights.safetensors",
    }
    header = read_header(paths.EXPORT / "fluent-3d-emoji.safetensors")
    assert header["sdxl_lora.data.revision"] == "c0ffee"
    assert header["modelspec.resolution"] == "128x128"
    card = ModelCard.load(paths.EXPORT / "README.md")
    assert card.data["license"] == "mit"
    assert "b is 1, should be at most 0" in card.text
    for path in paths.EXPORT.rglob("*"):
        if path.is_file():
            assert str(project).encode() not in path.read_bytes()
