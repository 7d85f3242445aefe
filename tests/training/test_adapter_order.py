"""That adapters of layers with the same input are neighbours in the flat tensor, so that no step copies them.

Nothing else would notice: a copy has the same numbers.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPAttention

from sdxl_lora.adapters import merged_linear
from sdxl_lora.adapters.lora import ADAPTER_NAME, add_adapters, lora_parameters
from sdxl_lora.adapters.merged_linear import cat_or_view, is_mergeable
from sdxl_lora.config import load_params
from sdxl_lora.models.fused_text_encoder import text_projections
from sdxl_lora.models.fused_unet import cross_attentions, projections_of_same_input
from sdxl_lora.training.batches import TrainingBatch, training_batches
from sdxl_lora.training.denoiser import Denoiser, load_denoiser
from sdxl_lora.training.train_step import TrainStep
from sdxl_lora.training.trainer import make_train_step, prepare_modules
from tests.support.encoded import write_encoded_dataset

PARAMS = load_params(Path("recipes/demo.yaml"))
MODEL = PARAMS.model.model_copy(update={"text_encoders": "trained"})


@pytest.fixture
def training() -> tuple[Denoiser, TrainStep[TrainingBatch]]:
    denoiser = load_denoiser(MODEL, "fp32", torch.device("cpu"))
    add_adapters(denoiser.parts, PARAMS.lora, seed=0)
    prepare_modules(denoiser, PARAMS.training, torch.Size((1, 4, 16, 16)))
    return denoiser, make_train_step(denoiser, PARAMS.training)


def is_view(result: Tensor, tensors: Sequence[Tensor]) -> bool:
    return result.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr()


def groups(module: torch.nn.Module) -> list[list[Tensor]]:
    """The A's, and the B's, of each attention's layers that read the same input, where they have adapters."""
    layers = [
        text_projections(part) if isinstance(part, CLIPAttention) else projections_of_same_input(part)
        for part in module.modules()
        if isinstance(part, Attention | CLIPAttention)
    ]
    return [
        [getattr(layer, matrix)[ADAPTER_NAME].weight for layer in group]
        for group in layers
        if all(is_mergeable(layer) for layer in group)
        for matrix in ("lora_A", "lora_B")
    ]


@pytest.mark.parametrize(("part", "expected"), [("unet", 44), ("text_encoder", 2), ("text_encoder_2", 6)])
def test_every_group_of_adapters_is_a_view(
    training: tuple[Denoiser, TrainStep[TrainingBatch]], part: str, expected: int
) -> None:
    """The first text encoder's last layer has no adapters."""
    found = groups(training[0].parts[part])
    views = [is_view(cat_or_view(tensors), tensors) for tensors in found]
    assert (sum(views), len(views)) == (expected, expected)


def test_a_step_copies_adapters_for_the_projected_text_alone(
    training: tuple[Denoiser, TrainStep[TrainingBatch]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of all cross-attentions of a width are one group, whose layers others lie between."""
    denoiser, train_step = training
    adapters = {p.data_ptr() for module in denoiser.modules for p in lora_parameters(module)}
    copied: list[int] = []

    def spy(tensors: Sequence[Tensor]) -> Tensor:
        result = cat_or_view(tensors)
        if tensors[0].data_ptr() in adapters and not is_view(result, tensors):
            copied.append(len(tensors))
        return result

    monkeypatch.setattr(merged_linear, "cat_or_view", spy)
    dataset = write_encoded_dataset(tmp_path / "encoded", MODEL)
    train_step.accumulate(next(training_batches(denoiser, dataset, PARAMS.training, seed=0)))
    widths = Counter(attention.inner_dim for attention in cross_attentions(denoiser.unet))
    assert sorted(copied) == sorted(2 * count for count in widths.values() for _ in "AB")
