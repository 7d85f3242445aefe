"""An adapter that changes what the demo's base model draws, made without training."""

from pathlib import Path

import torch

from sdxl_lora.adapters.lora import add_adapters, lora_parameters, save_lora
from sdxl_lora.config import LoraConfig, ModelConfig
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.training.denoiser import Denoiser, load_denoiser


@torch.no_grad()
def write_adapter(folder: Path, model: ModelConfig, lora: LoraConfig) -> Denoiser:
    """Saves an adapter with a random B, alpha twice the rank and dropout; returns the adapted model."""
    lora = lora.model_copy(update={"rank": 4, "alpha": 8.0, "dropout": 0.5})
    denoiser = load_denoiser(model, "fp32", torch.device("cpu"))
    add_adapters(denoiser.parts, lora, 0)
    for number, parameter in enumerate(p for module in denoiser.modules for p in lora_parameters(module)):
        if not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=keyed_generator("b", number)) * 0.02)
    for module in denoiser.modules:
        module.eval()
    save_lora(folder, denoiser.parts)
    return denoiser
