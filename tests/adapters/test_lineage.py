import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sdxl_lora.adapters.lineage import lineage, training_digest
from sdxl_lora.config import ModelConfig, load_params
from sdxl_lora.models.weights import weight_digests
from sdxl_lora.storage.repository import folder_digest

ENTRY: dict[str, Any] = {
    "deps": [{"path": "data/encoded", "md5": "1"}],
    "params": {"params.yaml": {"lora": {"rank": 4}}},
    "outs": [{"path": "data/lora", "md5": "2"}, {"path": "data/reports/training.json", "md5": "3"}],
}


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return load_params(Path("recipes/demo.yaml")).model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.json"
    path.write_text(json.dumps({"repository": "owner/pictures", "revision": "c0ffee"}), encoding="utf-8")
    (tmp_path / "index.jsonl").write_text("{}\n", encoding="utf-8")
    return path


def write_lock(path: Path, entry: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"stages": {"train_lora": entry}}), encoding="utf-8")
    return path


def test_facts_find_data_base_code_and_params_again(model: ModelConfig, source: Path) -> None:
    lock = write_lock(source.parent / "dvc.lock", ENTRY)
    facts = lineage(model, weight_digests(model), source, source.parent / "index.jsonl", lock)
    assert facts["sdxl_lora.data.repository"] == "owner/pictures"
    assert facts["sdxl_lora.data.revision"] == "c0ffee"
    assert facts["sdxl_lora.data.sha256"] == hashlib.sha256(b"{}\n").hexdigest()
    assert facts["sdxl_lora.base.revision"] == model.revision
    unet = Path("demo/base_model/unet/diffusion_pytorch_model.safetensors").read_bytes()
    assert facts["sdxl_lora.unet.sha256"] == hashlib.sha256(unet).hexdigest()
    assert {f"sdxl_lora.{part}.sha256" for part in ("text_encoder", "text_encoder_2", "vae")} <= set(facts)
    assert len(facts["sdxl_lora.git.commit"]) == 40
    assert facts["sdxl_lora.dvc.train_lora"] == training_digest(lock)
    assert len(facts["sdxl_lora.params.sha256"]) == 64


def test_facts_are_the_same_wherever_the_project_lies(model: ModelConfig, source: Path) -> None:
    index = source.parent / "index.jsonl"
    absolute = model.model_copy(update={"base": str(Path("demo/base_model").resolve())})
    facts = lineage(absolute, weight_digests(absolute), source, index, source.parent / "none.lock")
    assert facts["sdxl_lora.base.repository"] == "base_model"
    assert str(Path.cwd()) not in str(facts)
    assert "sdxl_lora.dvc.train_lora" not in facts


def test_vae_of_its_own_is_named_and_hashed(model: ModelConfig, source: Path, tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "config.json").write_text("{}", encoding="utf-8")
    weights = vae / "diffusion_pytorch_model.safetensors"
    save_file({"weight": torch.zeros(1)}, weights)
    other = model.model_copy(update={"vae": str(vae), "vae_revision": folder_digest(vae)})
    facts = lineage(other, weight_digests(other), source, tmp_path / "index.jsonl", tmp_path / "none.lock")
    assert facts["sdxl_lora.vae.repository"] == "vae"
    assert facts["sdxl_lora.vae.revision"] == folder_digest(vae)
    assert facts["sdxl_lora.vae.sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"deps": [{"path": "data/encoded", "md5": "9"}]}, False),
        ({"params": {"params.yaml": {"lora": {"rank": 8}}}}, False),
        ({"outs": [{"path": "data/lora", "md5": "9"}]}, False),
        (
            {"outs": [{"path": "data/lora", "md5": "2"}, {"path": "data/reports/training.json", "md5": "9"}]},
            True,
        ),
    ],
    ids=["data", "params", "adapter", "time"],
)
def test_training_is_told_apart_by_all_but_the_time_it_took(
    tmp_path: Path, change: dict[str, Any], same: bool
) -> None:
    first = training_digest(write_lock(tmp_path / "dvc.lock", ENTRY))
    again = training_digest(write_lock(tmp_path / "dvc.lock", {**ENTRY, **change}))
    assert (first == again) == same
