"""Pickles in every place that weights or data are read from: refused by name, and never loaded."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sdxl_lora.adapters.lora_file import WEIGHTS_FILE, saved_lora
from sdxl_lora.config import Params, load_params
from sdxl_lora.data.download import download_dataset, open_source
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.evaluation.clip import ImageTextScorer
from sdxl_lora.models.sdxl import load_pipeline, load_unet
from sdxl_lora.models.text_encoders import load_text_encoders
from sdxl_lora.models.vae import load_vae
from sdxl_lora.storage.content_store import DIGEST_BYTES, ContentStore, content_key
from sdxl_lora.storage.repository import folder_digest
from sdxl_lora.training.checkpointer import Checkpointer
from sdxl_lora.training.checkpointer import _content_digest as content_digest
from tests.support.encoded import write_encoded_dataset
from tests.support.hub import Hub
from tests.support.naruto import CARD, png

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")
KINDS = ["a pickle", "a PyTorch checkpoint"]
Place = Callable[[Params, Path], None]


class Bomb:
    """Makes a folder when it is loaded from a pickle."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


@pytest.fixture
def crater(tmp_path: Path) -> Path:
    """What is there if a bomb went off."""
    return tmp_path / "crater"


@pytest.fixture
def params(tmp_path: Path) -> Params:
    """The demo's, with models in folders of the test's own."""
    for name in ("base_model", "evaluator"):
        shutil.copytree(REPOSITORY / "demo" / name, tmp_path / name)
    shutil.copytree(REPOSITORY / "demo/base_model/vae", tmp_path / "vae")
    return load_params(REPOSITORY / "recipes/demo.yaml")


def plant(path: Path, kind: str, crater: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "a pickle":
        path.write_bytes(pickle.dumps({"weight": Bomb(crater)}))
    else:
        torch.save({"weight": Bomb(crater)}, path)


def load(kind: str, params: Params, folder: Path) -> None:
    """Loads what the params name, from the test's folders as they are now."""
    base, vae, clip = (folder / name for name in ("base_model", "vae", "evaluator"))
    changes = {"base": str(base), "revision": folder_digest(base)}
    if kind == "vae":
        changes |= {"vae": str(vae), "vae_revision": folder_digest(vae)}
    model = params.model.model_copy(update=changes)
    loaders: dict[str, Callable[[], object]] = {
        "unet": lambda: load_unet(model, "fp32", CPU),
        "text_encoder": lambda: load_text_encoders(model, "fp32", CPU),
        "pipeline": lambda: load_pipeline(model, "fp32", CPU),
        "vae": lambda: load_vae(model, "fp32", CPU),
        "clip": lambda: ImageTextScorer(
            params.evaluation.model_copy(
                update={"clip_model": str(clip), "clip_revision": folder_digest(clip)}
            ),
            CPU,
        ),
    }
    loaders[kind]()


MODELS = {
    "unet": "base_model/unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "base_model/text_encoder_2/model.safetensors",
    "pipeline": "base_model/vae/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "clip": "evaluator/model.safetensors",
}


def test_bombs_go_off(crater: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(crater)))
    assert crater.is_dir()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("part", "file"), MODELS.items())
def test_model_under_a_false_name_is_refused(
    params: Params, tmp_path: Path, crater: Path, part: str, file: str, kind: str
) -> None:
    plant(tmp_path / file, kind, crater)
    with pytest.raises(ValueError, match=rf"{file} is a pickle, which can run any code"):
        load(part, params, tmp_path)
    assert not crater.exists()


@pytest.mark.parametrize(("part", "file"), MODELS.items())
def test_model_in_a_pickle_is_refused_by_name(
    params: Params, tmp_path: Path, crater: Path, part: str, file: str
) -> None:
    pickled = (tmp_path / file).with_suffix(".bin")
    (tmp_path / file).unlink()
    plant(pickled, "a PyTorch checkpoint", crater)
    with pytest.raises(FileNotFoundError, match=rf"but {pickled.name}. Only safetensors are read: .* Choose"):
        load(part, params, tmp_path)
    assert not crater.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_is_refused(tmp_path: Path, crater: Path, kind: str) -> None:
    plant(tmp_path / WEIGHTS_FILE, kind, crater)
    with pytest.raises(ValueError, match=rf"{WEIGHTS_FILE} is a pickle, which can run any code"):
        saved_lora(tmp_path)
    assert not crater.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_shard_is_refused(tmp_path: Path, crater: Path, kind: str) -> None:
    model = load_params(REPOSITORY / "recipes/demo.yaml").model
    write_encoded_dataset(tmp_path / "encoded", model)
    plant(tmp_path / "encoded/train-00000.safetensors", kind, crater)
    with pytest.raises(ValueError, match=r"train-00000.safetensors is a pickle, which can run any code"):
        EncodedDataset(tmp_path / "encoded", "train")
    assert not crater.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_is_refused(tmp_path: Path, crater: Path, kind: str) -> None:
    plant(tmp_path / "planted", kind, crater)
    digest = content_digest((tmp_path / "planted").read_bytes())
    (tmp_path / "planted").rename(tmp_path / f"step-00000001-{digest}.safetensors")
    with pytest.raises(
        ValueError, match=r"step-00000001-\w+.safetensors is a pickle, which can run any code"
    ):
        Checkpointer(tmp_path, None).newest()
    assert not crater.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_entry_of_the_store_is_none(tmp_path: Path, crater: Path, kind: str) -> None:
    store, key = ContentStore(tmp_path / "store"), content_key("latents", image="a")
    store.put(key, {"a": torch.ones(1)})
    (entry,) = (path for path in (tmp_path / "store").rglob("*") if path.is_file())
    plant(entry, kind, crater)
    content = entry.read_bytes()
    digest = bytes.fromhex(content_digest(content))
    assert len(digest) == DIGEST_BYTES
    entry.write_bytes(digest + content)
    assert store.get(key) is None
    assert not crater.exists()


def test_pickled_type_of_a_parquet_column_is_not_loaded(hub: Hub, tmp_path: Path, crater: Path) -> None:
    """As pyarrow once did by itself (CVE-2023-47248)."""
    extension = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Bomb(crater)),
    }
    image = pa.array([{"bytes": png(0), "path": None}])
    schema = pa.schema([pa.field("image", image.type), pa.field("text", pa.string(), metadata=extension)])
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table([image, ["a fox"]], schema=schema), folder / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD.format(1))
    hub.add("owner/planted", folder, "datasets")
    config = load_params(REPOSITORY / "recipes/sdxl-naruto-16gb.yaml").download
    source = open_source(config.model_copy(update={"repository": "owner/planted"}))
    (example,) = download_dataset(source, tmp_path / "raw")
    assert example.captions == ["a fox"]
    assert not crater.exists()
