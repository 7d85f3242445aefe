from pathlib import Path

import pytest
import torch
from torch import nn

from sdxl_lora.config import ModelConfig, load_params
from sdxl_lora.models.architecture import KNOWN_VAES, SDXL_BASE, read_architecture
from sdxl_lora.models.sdxl import load_unet
from sdxl_lora.models.text_encoders import load_text_encoders
from sdxl_lora.models.vae import load_vae

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return load_params(Path("recipes/demo.yaml")).model


def layout(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def test_modules_without_weights_are_those_that_are_loaded(model: ModelConfig) -> None:
    """In the precision asked for, whatever the files say."""
    shapes = read_architecture(model)
    assert layout(shapes.make_unet("fp32", META)) == layout(load_unet(model, "fp32", CPU))
    assert layout(shapes.make_vae("bf16", META)) == layout(load_vae(model, "bf16", CPU))
    ours, loaded = shapes.make_text_encoders("fp32", META), load_text_encoders(model, "fp32", CPU)
    assert [layout(module) for module in ours] == [layout(module) for module in loaded]


def test_modules_without_weights_are_frozen(model: ModelConfig) -> None:
    modules = [
        read_architecture(model).make_unet("fp16", META),
        *read_architecture(model).make_text_encoders("fp16", META),
    ]
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert not any(module.training for module in modules)


def test_widths_are_those_of_the_embeddings(model: ModelConfig) -> None:
    assert SDXL_BASE.embedding_widths == (2048, 1280)
    assert (
        read_architecture(model).embedding_widths[0]
        == load_unet(model, "fp32", CPU).config.cross_attention_dim
    )
    assert SDXL_BASE.pixels_per_latent == 8


def test_sdxls_shapes_need_no_files() -> None:
    """Neither network nor cache is asked."""
    model = load_params(Path("recipes/sdxl-naruto-16gb.yaml")).model
    shapes = read_architecture(model)
    assert shapes.unet == SDXL_BASE.unet
    assert shapes.vae == KNOWN_VAES[str(model.vae)]
    assert read_architecture(model.model_copy(update={"vae": None, "vae_revision": None})) == SDXL_BASE
