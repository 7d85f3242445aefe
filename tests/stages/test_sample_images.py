import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from sdxl_lora import paths
from sdxl_lora.config import load_params
from sdxl_lora.runtime.rng import keyed_generator
from stages import sample_images
from tests.support.adapters import write_adapter
from tests.support.encoded import CAPTIONS, write_encoded_dataset


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose recipe samples one prompt, and its demo model."""
    (tmp_path / "demo").symlink_to(Path("demo").resolve())
    recipe = yaml.safe_load(Path("recipes/demo.yaml").read_text(encoding="utf-8"))
    recipe["sampling"].update(
        prompts=["pizza, fluent 3d style"],
        training_captions=1,
        held_out_captions=1,
        seeds=[3],
        strengths=[0.0, 1.0],
        num_inference_steps=2,
        resolution=64,
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("SDXL_LORA_DEVICE", "cpu")
    paths.PARAMS.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    paths.DATA.mkdir()
    return tmp_path


def test_images_table_and_grid_are_written(project: Path) -> None:
    params = load_params()
    write_adapter(paths.LORA, params.model, params.lora)
    write_encoded_dataset(paths.ENCODED, params.model)
    sample_images.main()
    rows = [json.loads(line) for line in paths.SAMPLE_TABLE.read_text(encoding="utf-8").splitlines()]
    assert [(row["prompt"], row["origin"], row["seed"], row["strength"]) for row in rows] == [
        (prompt, origin, 3, strength)
        for strength in (0.0, 1.0)
        for prompt, origin in (
            ("pizza, fluent 3d style", "free"),
            (CAPTIONS[0], "training"),
            (CAPTIONS[0], "held_out"),
        )
    ]
    images = [Image.open(paths.SAMPLES / row["file"]) for row in rows]
    assert {image.size for image in images} == {(64, 64)}
    assert (
        json.loads(images[3].info["parameters"])["noise_seed"]
        == keyed_generator("sample", 0, 3).initial_seed()
    )
    assert len({image.tobytes() for image in images}) == 6
    assert Image.open(paths.SAMPLE_GRID).width > 2 * 192
    assert project == Path.cwd()


@pytest.mark.usefixtures("project")
def test_missing_adapter_names_the_stage_to_run() -> None:
    with pytest.raises(FileNotFoundError, match="dvc repro train_lora"):
        sample_images.main()


def test_half_precision_on_a_cpu_is_refused_before_anything_is_loaded(project: Path) -> None:
    recipe = yaml.safe_load((project / paths.PARAMS).read_text(encoding="utf-8"))
    recipe["sampling"]["precision"] = "fp16"
    recipe["model"]["base"] = "./nowhere"
    paths.PARAMS.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.raises(ValueError, match=r"sampling\.precision is fp16"):
        sample_images.main()
