"""Adapters in kohya's format, which ComfyUI and A1111 read as well.

kohya names a layer of the UNet by its path in the original SDXL (Stability-AI/generative-models,
openaimodel.py), and a layer of a text encoder by its path in transformers, with `_` for `.`.
`lora_unet_input_blocks_4_1_proj_in.lora_down.weight` is A, `.lora_up.weight` is B, and `.alpha` is a scalar;
the update is alpha / rank B A. Knows tensors and names, but no model library.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
_TENSORS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}

_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK_PATTERN = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<place>\d+)\.(?P<rest>.+)"
)


def kohya_weights(
    weights: Mapping[str, Tensor], alphas: Mapping[str, float], layers_per_block: int = 2
) -> dict[str, Tensor]:
    """Return PEFT's adapter weights under kohya's names, each layer with its alpha.

    Args:
        weights: `<part>.<layer>.lora_A.weight`, (r, in) or (r, in, k, k), and `lora_B`, (out, r) or
            (out, r, 1, 1); a part is one of `unet`, `text_encoder`, `text_encoder_2`.
        alphas: kohya's alpha of each part, PEFT's scale times the rank.
        layers_per_block: resnets in a down block of the UNet; 2 in SDXL.

    Raises:
        ValueError: a layer has no name in the original SDXL, or a tensor is neither A nor B.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        layer, _, matrix = key.rpartition(".lora_")
        if f"lora_{matrix}" not in _TENSORS:
            raise ValueError(
                f"{key} is neither A nor B of an adapter, and kohya's format has no name for it: export an "
                "adapter of plain LoRA"
            )
        name = kohya_name(layer, layers_per_block)
        renamed[f"{name}.{_TENSORS[f'lora_{matrix}']}"] = tensor
        renamed[f"{name}.alpha"] = torch.tensor(alphas[key.partition(".")[0]])
    return renamed


def kohya_name(layer: str, layers_per_block: int) -> str:
    """Return kohya's name of a layer, `<part>.<path>`.

    Raises:
        ValueError: there is none.
    """
    part, _, path = layer.partition(".")
    path = original_path(path, layers_per_block) if part == "unet" else path
    return f"{_PREFIXES[part]}_{path.replace('.', '_')}"


def original_path(layer: str, layers_per_block: int) -> str:
    """Return a UNet layer's path in the original SDXL, from its path in diffusers.

    Raises:
        ValueError: there is no such layer.
    """
    if layer in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[layer]
    match = _BLOCK_PATTERN.fullmatch(layer)
    if match is None or (match["kind"] == "resnets" and match["rest"] not in _RESNET):
        raise ValueError(
            f"{layer} is not a layer of SDXL's UNet, and kohya's format has no name for it: remove it from "
            "lora.unet_modules"
        )
    kind, place, rest = match["kind"], int(match["place"]), match["rest"]
    if kind == "resnets":
        rest = _RESNET[rest]
    if match["side"] is None:  # resnet 0, attention 0, resnet 1
        return f"middle_block.{2 * place if kind == 'resnets' else 1}.{rest}"
    # The original numbers one flat list for each side: a down block has its resnets, then the downsampler; an
    # up block has one resnet more, and the upsampler shares the number of the last. Attentions stand next to
    # their resnet.
    first = int(match["block"]) * (layers_per_block + 1)
    slot = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}[kind]
    if match["side"] == "up":
        number = first + (layers_per_block if kind == "upsamplers" else place)
        return f"output_blocks.{number}.{slot}.{rest}"
    number = 1 + first + (layers_per_block if kind == "downsamplers" else place)
    return f"input_blocks.{number}.{slot}.{'op' if kind == 'downsamplers' else rest}"


def kohya_delta(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the update of layer `name` of a kohya file: alpha / rank B A, fp32, shaped as the weight."""
    down, up = (weights[f"{name}.{tensor}"] for tensor in _TENSORS.values())
    return weights[f"{name}.alpha"] / len(down) * lora_delta(up, down)


def lora_delta(up: Tensor, down: Tensor) -> Tensor:
    """Return B A in fp32, shaped as the layer's weight: (out, in) or (out, in, k, k).

    Args:
        up: B, (out, r) or (out, r, 1, 1).
        down: A, (r, in) or (r, in, k, k).
    """
    return (up.float().flatten(1) @ down.float().flatten(1)).view(len(up), *down.shape[1:])
