"""The adapter's files for other programs: diffusers' format, and kohya's for ComfyUI and A1111.

Both hold the same fp32 weights and, in their headers, their lineage. They are read back and checked.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdxl_lora.adapters.kohya import kohya_delta, kohya_name, kohya_weights, lora_delta
from sdxl_lora.adapters.lineage import WEIGHTS_KEY
from sdxl_lora.adapters.lora_file import WEIGHTS_FILE, peft_header, peft_scale, saved_lora, split_by_part
from sdxl_lora.config import ExportConfig, PredictionType
from sdxl_lora.storage.safetensors_io import content_digest, read_header, write_tensors


def export_lora(
    source: Path, target: Path, config: ExportConfig, facts: Mapping[str, str], layers_per_block: int
) -> None:
    """Write both files of the adapter in `source` to `target`, read them back and compare them with it.

    Args:
        source: folder of the trained adapter.
        target: folder for the files.
        config: names the files.
        facts: entries of both headers: ModelSpec's, and the lineage.
        layers_per_block: resnets in a down block of the UNet.

    Raises:
        FileNotFoundError: there is no adapter in `source`.
        ValueError: a layer has no name in kohya's format.
        RuntimeError: a file differs from the trained adapter.
    """
    path = saved_lora(source)
    weights, configs = load_file(path), split_by_part(peft_header(path))
    alphas = {part: _kohya_alpha(config) for part, config in configs.items()}
    renamed = kohya_weights(weights, alphas, layers_per_block)
    target.mkdir(parents=True, exist_ok=True)
    header = {**read_header(path), **facts, WEIGHTS_KEY: content_digest(weights)}
    write_tensors(target / WEIGHTS_FILE, weights, header)
    header = {
        **facts,
        **_kohya_header(configs["unet"]),
        WEIGHTS_KEY: content_digest(renamed),
        "modelspec.hash_sha256": f"0x{content_digest(renamed)}",
    }
    write_tensors(target / kohya_file(config), renamed, header)
    check_files(path, target / WEIGHTS_FILE, target / kohya_file(config), layers_per_block)


def check_files(trained: Path, diffusers: Path, kohya: Path, layers_per_block: int) -> None:
    """Read the files back and compare their update of each layer with the trained one.

    Raises:
        RuntimeError: an update differs, or a file has other layers.
    """
    expected, again, renamed = load_file(trained), load_file(diffusers), load_file(kohya)
    scales, scales_again = (_scales_by_part(path) for path in (trained, diffusers))
    layers = [key.removesuffix(".lora_A.weight") for key in expected if key.endswith(".lora_A.weight")]
    if len(again) != len(expected) or len(renamed) != 3 * len(layers):
        raise RuntimeError(f"{diffusers} or {kohya} has other layers than {trained}: run export_lora again")
    for layer in layers:
        update = _update_of(expected, layer, scales)
        for path, found in (
            (diffusers, _update_of(again, layer, scales_again)),
            (kohya, kohya_delta(renamed, kohya_name(layer, layers_per_block))),
        ):
            # Not equal bits: the scale is a float64 here, and alpha an fp32 tensor in kohya's file.
            if not torch.allclose(found, update, rtol=1e-6, atol=0):
                raise RuntimeError(f"{path} differs from {trained} in {layer}: run export_lora again")


def _update_of(weights: Mapping[str, Tensor], layer: str, scales: Mapping[str, float]) -> Tensor:
    """Return the update of a layer by an adapter in diffusers' format."""
    up, down = (weights[f"{layer}.lora_{matrix}.weight"] for matrix in "BA")
    return scales[layer.partition(".")[0]] * lora_delta(up, down)


def _scales_by_part(path: Path) -> dict[str, float]:
    """Return the factor of each part's updates, from a file's header."""
    return {part: peft_scale(config) for part, config in split_by_part(peft_header(path)).items()}


def _kohya_alpha(config: Mapping[str, Any]) -> float:
    """Return the alpha with which kohya's formula, alpha / rank, gives PEFT's scale.

    Rounded to nine digits, which fp32 does not exceed: (5.1 / 3) * 3 is written as 5.1 again.
    """
    return float(f"{peft_scale(config) * config['r']:.9g}")


def _kohya_header(config: Mapping[str, Any]) -> dict[str, str]:
    """Return those header entries of kohya's files that tools display.

    Args:
        config: PEFT's config of the UNet.
    """
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config["r"]),
        "ss_network_alpha": str(_kohya_alpha(config)),
        "ss_base_model_version": "sdxl_base_v1-0",
    }


def model_spec(
    config: ExportConfig, trigger: str | None, resolution: int, prediction_type: PredictionType
) -> dict[str, str]:
    """Return entries of the Stability AI Model Metadata Standard 1.0.0 (Stability-AI/ModelSpec)."""
    entries = {
        "sai_model_spec": "1.0.0",
        "architecture": "stable-diffusion-xl-v1-base/lora",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": config.title,
        "license": config.license,
        "resolution": f"{resolution}x{resolution}",
        "prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "trigger_phrase": trigger,
    }
    return {f"modelspec.{name}": value for name, value in entries.items() if value}


def kohya_file(config: ExportConfig) -> str:
    """Return the name of kohya's file, under which ComfyUI and A1111 list the adapter."""
    return f"{re.sub(r'[^a-z0-9]+', '-', config.title.lower()).strip('-')}.safetensors"
