import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxl_lora import paths
from sdxl_lora.data.encoded_dataset import EncodedDataset, data_digest
from stages import clean_captions, download_dataset, encode_dataset


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project with the demo recipe, cut to twelve images, on the CPU."""
    (tmp_path / "demo").symlink_to(Path("demo").resolve())
    recipe = yaml.safe_load(Path("recipes/demo.yaml").read_text(encoding="utf-8"))
    recipe["download"]["max_examples"] = 12
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("SDXL_LORA_DEVICE", "cpu")
    paths.PARAMS.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def change(section: str, **values: Any) -> None:
    recipe = yaml.safe_load(paths.PARAMS.read_text(encoding="utf-8"))
    recipe[section].update(values)
    paths.PARAMS.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def test_downloaded_images_are_encoded_and_counted() -> None:
    download_dataset.main()
    clean_captions.main()
    encode_dataset.main()
    train, held_out = (EncodedDataset(paths.ENCODED, split) for split in ("train", "held_out"))
    report = json.loads(paths.ENCODING_REPORT.read_text(encoding="utf-8"))
    assert report["examples"] == {"train": len(train), "held_out": len(held_out)}
    assert len(train) + len(held_out) == 12
    assert train[0].latents_mean.shape == (1, 4, 16, 16)
    card = paths.DATASET_CARD.read_text(encoding="utf-8")
    assert f"| train | {data_digest(train.examples)} |" in card
    assert paths.IMAGE_FINDINGS.read_text(encoding="utf-8") == "image,kind,left_out,detail\n"


@pytest.mark.parametrize("key", ["vae_precision", "text_precision"])
def test_half_precision_on_a_cpu_is_refused_before_anything_is_loaded(key: str) -> None:
    change("encoding", **{key: "fp16"})
    change("model", base="./nowhere")
    with pytest.raises(ValueError, match=rf"encoding\.{key} is fp16.*CUDA GPU.*make recipe NAME=demo"):
        encode_dataset.main()


def test_missing_captions_name_the_stage_to_run() -> None:
    with pytest.raises(FileNotFoundError, match="dvc repro clean_captions"):
        encode_dataset.main()
