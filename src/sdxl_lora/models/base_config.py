"""Facts from the base model's configuration files, read as JSON: no model library is loaded for them."""

import json

from sdxl_lora.config import ModelConfig, PredictionType
from sdxl_lora.models.weights import open_base


def force_zeros_for_empty_prompt(config: ModelConfig) -> bool:
    """Return whether no caption means zero embeddings, as in SDXL, or those of an empty caption."""
    text = (open_base(config) / "model_index.json").read_text(encoding="utf-8")
    zeros: bool = json.loads(text).get("force_zeros_for_empty_prompt", True)
    return zeros


def layers_per_block(config: ModelConfig) -> int:
    """Return the number of resnets in a down block of the UNet."""
    text = (open_base(config) / "unet" / "config.json").read_text(encoding="utf-8")
    number: int = json.loads(text)["layers_per_block"]
    return number


def prediction_type(config: ModelConfig) -> PredictionType:
    """Return what the UNet predicts: `load_noise_schedule(config).prediction_type`."""
    text = (open_base(config) / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    found: PredictionType = json.loads(text).get("prediction_type", "epsilon")  # diffusers' default
    return found
