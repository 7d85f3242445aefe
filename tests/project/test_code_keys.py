"""Which edits start a training again, or encode images or captions again: on a copy of the code."""

import ast
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdxl_lora.config import load_params
from sdxl_lora.data.encoders import Encoders, load_encoders
from sdxl_lora.data.image_loader import CaptionedImage
from sdxl_lora.data.latent_cache import LatentCache
from sdxl_lora.runtime import import_closure
from sdxl_lora.storage.content_store import ContentStore
from sdxl_lora.training.checkpointer import training_key

REPOSITORY = Path(__file__).parents[2]
PARAMS = load_params(REPOSITORY / "recipes/demo.yaml")
CPU = torch.device("cpu")
ROW = CaptionedImage("0" * 64, "0.png", "a caption")
Keys = dict[str, str]


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return load_encoders(PARAMS.model, PARAMS.encoding, CPU)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's folder in a copy of the code, which keys are computed from."""
    for name in ("src", "stages"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(import_closure, "REPOSITORY", tmp_path)
    return tmp_path / "src/sdxl_lora"


@pytest.fixture
def keys(library: Path, encoders: Encoders) -> Callable[[], Keys]:
    """Computes all keys from the code as it is in the copy by then."""
    index = library.parents[1] / "index.jsonl"
    index.touch()
    cache_arguments = ContentStore(library), encoders, PARAMS.encoding, library

    def compute() -> Keys:
        cache = LatentCache(*cache_arguments)
        return {
            "training": training_key(0, PARAMS.lora, PARAMS.model, PARAMS.training, index, CPU),
            "image": cache._image_key(ROW),
            "latents": cache._latents_key(ROW),
            "text": cache._text_key(torch.zeros(1, 2, 77)),
        }

    return compute


@pytest.fixture
def changed(keys: Callable[[], Keys]) -> Callable[[], set[str]]:
    """Tells which keys are not what they were before the test."""
    before = keys()
    return lambda: differing(before, keys())


def differing(first: Keys, second: Keys) -> set[str]:
    return {name for name in first if first[name] != second[name]}


def add_code(file: Path) -> None:
    file.write_text(file.read_text() + "\nADDED = 1\n")


def flip_an_operator(file: Path) -> None:
    """Replace the first arithmetic operator that has another one's place."""
    opposites: dict[type[ast.operator], ast.operator] = {
        ast.Add: ast.Sub(),
        ast.Sub: ast.Add(),
        ast.Mult: ast.Div(),
        ast.Div: ast.Mult(),
    }
    tree = ast.parse(file.read_text())
    found = (node for node in ast.walk(tree) if isinstance(node, ast.BinOp) and type(node.op) in opposites)
    operation = next(found)
    operation.op = opposites[type(operation.op)]
    file.write_text(ast.unparse(tree))


def test_comments_docstrings_and_formatting_change_no_key(
    library: Path, changed: Callable[[], set[str]]
) -> None:
    for file in [*library.rglob("*.py"), *(library.parents[1] / "stages").glob("*.py")]:
        if file != library / "config.py":  # stands for the data set's index
            file.write_text(
                f'"""Another docstring."""\n# a comment\n{ast.unparse(ast.parse(file.read_text()))}'
            )
    assert changed() == set()


@pytest.mark.parametrize(
    "package", ["cli", "evaluation", "inference", "memory", "reporting", "reproducibility", "tracking"]
)
def test_packages_that_compute_nothing_that_is_kept_change_no_key(
    library: Path, changed: Callable[[], set[str]], package: str
) -> None:
    files = list((library / package).rglob("*.py"))
    assert len(files) > 2
    for file in files:
        add_code(file)
    assert changed() == set()


@pytest.mark.parametrize(
    ("file", "kinds"),
    [
        ("kernels/conv_ops.py", {"training", "latents"}),
        ("kernels/triton/group_norm.py", {"training", "latents"}),
        ("kernels/attention_ops.py", {"training"}),
        ("adapters/lora.py", {"training"}),
        ("adapters/merged_linear.py", {"training"}),
        ("training/trainer.py", {"training"}),
        ("data/images.py", {"image", "latents"}),
        ("data/batch_sampler.py", {"training"}),
    ],
)
def test_operator_changes_the_keys_of_what_it_computes(
    library: Path, changed: Callable[[], set[str]], file: str, kinds: set[str]
) -> None:
    flip_an_operator(library / file)
    assert changed() == kinds


@pytest.mark.parametrize(
    ("file", "kinds"),
    [
        ("models/fused_vae.py", {"latents"}),
        ("models/fused_blocks.py", {"training", "latents"}),
        ("models/fused_unet.py", {"training"}),
        ("models/fused_text_encoder.py", {"training"}),
        ("models/text_encoders.py", {"training", "text"}),
        ("data/image_encoder.py", {"latents"}),
        ("data/caption_encoder.py", {"text"}),
        ("kernels/padding.py", {"latents", "text"}),
        ("data/latent_cache.py", {"image", "latents", "text"}),
        ("../../stages/train_lora.py", {"training"}),
        ("../../stages/encode_dataset.py", set()),
    ],
)
def test_code_changes_the_keys_of_what_it_computes(
    library: Path, changed: Callable[[], set[str]], file: str, kinds: set[str]
) -> None:
    add_code(library / file)
    assert changed() == kinds


def test_module_that_only_the_vae_imports_is_part_of_the_latents_key(
    library: Path, keys: Callable[[], Keys]
) -> None:
    """A list by hand would miss it."""
    importer, module = library / "models/fused_vae.py", library / "kernels/new_op.py"
    importer.write_text(f"{importer.read_text()}\nfrom sdxl_lora.kernels import new_op\n")
    module.write_text("FACTOR = 1\n")
    before = keys()
    module.write_text("FACTOR = 2\n")
    assert differing(before, keys()) == {"latents"}
