import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from sdxl_lora import paths
from sdxl_lora.adapters.lora_file import WEIGHTS_FILE
from sdxl_lora.config import load_params
from sdxl_lora.inference.samples import Sample, load_table, save_table
from stages import evaluate_lora
from tests.support.adapters import write_adapter
from tests.support.encoded import write_encoded_dataset


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with an encoded data set and two samples, the data set's own image of an alien monster."""
    (tmp_path / "demo").symlink_to(Path("demo").resolve())
    recipe = yaml.safe_load(Path("recipes/demo.yaml").read_text(encoding="utf-8"))
    recipe["evaluation"].update(timesteps=[100, 900], noises=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("SDXL_LORA_DEVICE", "cpu")
    paths.PARAMS.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    paths.DATA.mkdir()
    write_encoded_dataset(paths.ENCODED, load_params().model)
    prompt = "alien monster, fluent 3d style"
    samples = [Sample("0.png", prompt, 0, 0.0), Sample("1.png", prompt, 0, 1.0)]
    paths.SAMPLES.mkdir()
    for sample in samples:
        with Image.open("demo/dataset/images/alien-monster.webp") as image:
            image.convert("RGB").save(paths.SAMPLES / sample.file)
    save_table(paths.SAMPLE_TABLE, samples)
    write_raw_images()
    return tmp_path


def write_raw_images() -> None:
    """Images under the names that the encoded data set has; 2.png is the alien monster."""
    names = sorted(path.name for path in Path("demo/dataset/images").iterdir() if "alien" not in path.name)
    paths.RAW_IMAGES.mkdir(parents=True)
    for number, name in enumerate(names[:9]):
        source = "alien-monster.webp" if number == 2 else name
        with Image.open(f"demo/dataset/images/{source}") as image:
            image.convert("RGB").save(paths.RAW_IMAGES / f"{number}.png")


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested mappings, by their path."""
    found: dict[str, float] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.mark.usefixtures("project")
def test_metrics_and_loss_by_timestep_are_written() -> None:
    params = load_params()
    write_adapter(paths.LORA, params.model, params.lora)
    evaluate_lora.main()
    metrics = json.loads(paths.METRICS.read_text(encoding="utf-8"))
    assert set(metrics) == {
        "held_out_loss",
        "clip_score",
        "retrieval_at_1",
        "style_probability",
        "change",
        "copied",
        "copy_threshold",
        "adapter_bytes",
        "gates",
    }
    loss = metrics["held_out_loss"]
    assert loss["change_percent"] == pytest.approx(100 * (loss["adapter"] / loss["base"] - 1))
    assert metrics["retrieval_at_1"] == {"base": 1.0, "adapter": 1.0}
    assert metrics["style_probability"]["adapter"] > 0.5
    assert metrics["adapter_bytes"] == (paths.LORA / WEIGHTS_FILE).stat().st_size
    assert metrics["copied"] == {"base": 1.0, "adapter": 1.0}  # the samples are a training image
    copies = read_csv(paths.COPIES)
    assert [(row["file"], row["training_image"], row["copied"]) for row in copies] == [
        ("0.png", "2.png", "True"),
        ("1.png", "2.png", "True"),
    ]
    intervals = read_csv(paths.INTERVALS)
    assert ("style_probability", "adapter") in [(row["metric"], row["strength"]) for row in intervals]
    assert all(float(row["low"]) <= float(row["high"]) for row in intervals)
    assert {row["origin"] for row in intervals} == {"free"}
    gates = {row["name"]: row for row in read_csv(paths.GATES)}
    assert metrics["gates"]["all"] == metrics["gates"]["copied"] == 0
    assert gates["copied"]["reason"] == "copied.adapter is 1, should be at most 0.2"
    assert gates["style_probability"]["passed"] == "True"
    rows = read_csv(paths.LOSS_BY_TIMESTEP)
    assert [row["timestep"] for row in rows] == ["100", "900"]
    assert float(rows[0]["base"]) + float(rows[1]["base"]) == pytest.approx(2 * loss["base"])
    assert float(rows[0]["adapter"]) + float(rows[1]["adapter"]) == pytest.approx(2 * loss["adapter"])


@pytest.mark.usefixtures("project")
def test_samples_of_captions_are_scored_apart() -> None:
    params = load_params()
    write_adapter(paths.LORA, params.model, params.lora)
    evaluate_lora.main()
    alone = json.loads(paths.METRICS.read_text(encoding="utf-8"))
    free = load_table(paths.SAMPLE_TABLE)
    captions = [replace(sample, prompt="red apple", origin="training") for sample in free]
    save_table(paths.SAMPLE_TABLE, [*free, *captions])
    evaluate_lora.main()
    metrics = json.loads(paths.METRICS.read_text(encoding="utf-8"))
    apart = metrics.pop("training_captions")
    # The free samples are in a larger batch now, for which kernels sum in another order. In each of CLIP's 10
    # layers sums of 500 products are off by sqrt(500) 2^-24: a cosine by 1e-5, a score in percent by 1e-3.
    assert flat(metrics) == pytest.approx(flat(alone), rel=1e-5, abs=1e-3)
    counted = [
        name for name in flat(metrics) if name.startswith(("copied", "gates", "adapter_bytes", "retrieval"))
    ]
    assert [flat(metrics)[name] for name in counted] == [flat(alone)[name] for name in counted]
    assert apart["copied"] == metrics["copied"]  # the same images
    assert apart["clip_score"]["adapter"] < metrics["clip_score"]["adapter"] - 1  # other words
    assert [row["origin"] for row in read_csv(paths.COPIES)] == ["free", "free", "training", "training"]
    assert {row["origin"] for row in read_csv(paths.INTERVALS)} == {"free", "training"}


@pytest.mark.usefixtures("project")
def test_missing_adapter_names_the_stage_to_run() -> None:
    with pytest.raises(FileNotFoundError, match="dvc repro train_lora"):
        evaluate_lora.main()
