from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdxl_lora.adapters.kohya import kohya_delta, kohya_name, kohya_weights, original_path
from sdxl_lora.adapters.lora import add_adapters, lora_parameters, save_lora
from sdxl_lora.adapters.lora_file import WEIGHTS_FILE
from sdxl_lora.config import LoraConfig, ModelConfig, load_params
from sdxl_lora.models.sdxl import load_pipeline
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.training.denoiser import Denoiser, load_denoiser
from tests.support.sdxl_shapes import full_size_sdxl

CPU = torch.device("cpu")
PARTS = ("unet", "text_encoder", "text_encoder_2")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TRANSFORMER = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
CONVOLUTIONS = [
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
]
EVERYTHING = [*TRANSFORMER, *CONVOLUTIONS, "conv_in", "conv_out"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.fixture(scope="module")
def full_size() -> Any:
    return full_size_sdxl()


def layers(module: nn.Module) -> list[str]:
    """All that an adapter can be put on."""
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def file_names(names: list[str]) -> list[str]:
    """Recent transformers dropped the first text encoder's `text_model.`; adapter files keep it."""
    return [f"text_model.{name}" if name.startswith("encoder.") else name for name in names]


def test_every_weight_of_full_size_sdxl_has_the_name_that_diffusers_reads_it_from(full_size: Any) -> None:
    """Diffusers converts a checkpoint in the original layout: each of ours must come back to where it was."""
    unet = full_size[0]
    names = [name.removesuffix(".weight") for name in unet.state_dict() if name.endswith(".weight")]
    marks = {name: torch.tensor(float(number)) for number, name in enumerate(names)}
    original = {f"model.diffusion_model.{original_path(name, 2)}.weight": marks[name] for name in names}
    biases = {key.replace(".weight", ".bias"): mark for key, mark in original.items()}
    restored = convert_ldm_unet_checkpoint({**original, **biases}, dict(unet.config))
    assert len(original) == len(names)
    assert {name: restored[f"{name}.weight"].item() for name in names} == {
        name: mark.item() for name, mark in marks.items()
    }


def test_full_size_names_are_those_that_kohya_itself_trains(full_size: Any) -> None:
    """Known from its logs: 722 layers of the UNet, 72 and 192 of the text encoders."""
    ends = {
        "unet": TRANSFORMER,
        "text_encoder": [*TEXT, "fc1", "fc2"],
        "text_encoder_2": [*TEXT, "fc1", "fc2"],
    }
    weights = {
        f"{part}.{name}.lora_A.weight": torch.zeros(1)
        for part, module in zip(PARTS, full_size, strict=True)
        for name in file_names(layers(module))
        if name.endswith(tuple(ends[part]))
    }
    names = {key.split(".")[0] for key in kohya_weights(weights, dict.fromkeys(PARTS, 1.0))}
    prefixes = Counter("_".join(name.split("_")[:2]) for name in names)
    assert prefixes == {"lora_unet": 722, "lora_te1": 72, "lora_te2": 192}
    assert {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
        "lora_unet_middle_block_1_proj_in",
        "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
        "lora_te1_text_model_encoder_layers_11_mlp_fc2",
        "lora_te2_text_model_encoder_layers_31_self_attn_q_proj",
    } <= names


def test_diffusers_finds_every_full_size_layer_again(full_size: Any) -> None:
    unet = full_size[0]
    weights = {
        f"unet.{name}.lora_{matrix}.weight": torch.full((1,), float(number) + (0.5 if matrix == "B" else 0.0))
        for number, name in enumerate(layers(unet))
        for matrix in "AB"
    }
    found, alphas = StableDiffusionXLPipeline.lora_state_dict(
        kohya_weights(weights, {"unet": 3.0}), unet_config=unet.config
    )
    restored = convert_unet_state_dict_to_peft(found)
    assert {key: tensor.item() for key, tensor in restored.items()} == {
        key: tensor.item() for key, tensor in weights.items()
    }
    assert len(alphas) == len(weights) / 2
    assert set(alphas.values()) == {3.0}


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    model = load_params(Path("recipes/demo.yaml")).model
    return model.model_copy(update={"text_encoders": "trained"})


@torch.no_grad()
def as_if_trained(model: ModelConfig, unet_modules: list[str], text_modules: list[str]) -> Denoiser:
    """With alpha 1.5 times the rank."""
    config = LoraConfig(
        rank=4, alpha=6.0, dropout=0.0, unet_modules=unet_modules, text_encoder_modules=text_modules
    )
    denoiser = load_denoiser(model, "fp32", CPU)
    add_adapters(denoiser.parts, config, 0)
    for number, parameter in enumerate(p for m in denoiser.modules for p in lora_parameters(m)):
        parameter.copy_(torch.randn(parameter.shape, generator=keyed_generator("trained", number)) * 0.1)
    return denoiser


def peft_updates(module: nn.Module) -> dict[str, Tensor]:
    named = {name: layer for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in named.items()}


@pytest.mark.parametrize(
    ("unet_modules", "text_modules"),
    [(ATTENTION, TEXT), (TRANSFORMER, [*TEXT, "fc1", "fc2"]), (CONVOLUTIONS, TEXT), (EVERYTHING, TEXT)],
    ids=["attention", "transformer", "convolutions", "everything"],
)
def test_diffusers_loads_a_kohya_file_with_the_updates_that_were_trained(
    model: ModelConfig, unet_modules: list[str], text_modules: list[str], tmp_path: Path
) -> None:
    trained = as_if_trained(model, unet_modules, text_modules)
    save_lora(tmp_path, trained.parts)
    save_file(
        kohya_weights(load_file(tmp_path / WEIGHTS_FILE), dict.fromkeys(PARTS, 6.0)),
        tmp_path / "k.safetensors",
    )
    pipeline = load_pipeline(model, "fp32", CPU)
    pipeline.load_lora_weights(tmp_path, weight_name="k.safetensors", adapter_name="default")
    theirs = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    for our_module, their_module in zip(trained.modules, theirs, strict=True):
        expected, found = peft_updates(our_module), peft_updates(their_module)
        assert expected.keys() == found.keys()
        assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in expected)


def test_updates_of_a_kohya_file_are_pefts(model: ModelConfig, tmp_path: Path) -> None:
    trained = as_if_trained(model, EVERYTHING, TEXT)
    save_lora(tmp_path, trained.parts)
    weights = kohya_weights(load_file(tmp_path / WEIGHTS_FILE), dict.fromkeys(PARTS, 6.0))
    expected = peft_updates(trained.unet)
    assert len(weights) == 3 * sum(len(peft_updates(module)) for module in trained.modules)
    for name, update in expected.items():
        torch.testing.assert_close(kohya_delta(weights, kohya_name(f"unet.{name}", 2)), update)


@pytest.mark.parametrize(
    "layer", ["down_blocks.0", "encoder.layers.0", "up_blocks.0.nothing.0.conv", "mid_block.resnets.0.conv3"]
)
def test_layer_that_sdxl_lacks_is_refused(layer: str) -> None:
    with pytest.raises(ValueError, match=f"{layer} is not a layer of SDXL's UNet"):
        original_path(layer, 2)


def test_tensor_that_kohya_has_no_place_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"to_q\.lora_magnitude_vector is neither A nor B"):
        kohya_weights(
            {"unet.mid_block.attentions.0.to_q.lora_magnitude_vector": torch.ones(1)}, {"unet": 1.0}
        )
