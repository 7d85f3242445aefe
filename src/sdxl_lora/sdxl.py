"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952) as diffusers keeps it: its parts and conditions.

The only module that knows how the base model's folders are laid out. Everything is loaded from safetensors.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdxl_lora.config import ModelConfig, Precision
from sdxl_lora.diffusion import PredictionType
from sdxl_lora.sources import file_digest, local_copy, open_repository

TextEncoders = tuple[CLIPTextModel, CLIPTextModelWithProjection]
Tokenizers = tuple[CLIPTokenizer, CLIPTokenizer]

VAE_FILE = "diffusion_pytorch_model.safetensors"
VAE_FILES = ["config.json", VAE_FILE]
DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class NoiseSchedule:
    """How the base model was trained to denoise."""

    alphas_cumprod: Tensor
    """alpha_bar at each timestep, fp32, (T,)."""
    prediction_type: PredictionType


def open_base(config: ModelConfig) -> Path:
    """The base model's folder: configurations, tokenizers and the safetensors of the variant asked for."""
    return open_repository(config.base, config.revision, "model.base", base_files(config))


def base_files(config: ModelConfig) -> list[str]:
    """What is read of the base model, as globs."""
    weights = f"*.{config.variant}.safetensors" if config.variant else "*.safetensors"
    parts = ("unet", "text_encoder", "text_encoder_2", "vae")
    patterns = ["model_index.json", "scheduler/*", "tokenizer/*", "tokenizer_2/*"]
    patterns += [f"{part}/*.json" for part in parts]
    return patterns + [f"{part}/{weights}" for part in parts if part != "vae" or config.vae is None]


def open_vae(config: ModelConfig) -> Path:
    """The folder of the replacement VAE that `config` names."""
    return open_repository(str(config.vae), str(config.vae_revision), "model.vae", VAE_FILES)


def local_models(config: ModelConfig) -> dict[str, Path | None]:
    """The folders of the base model and, where there is one, of the VAE in place of its own, by params key.

    None: not here, or incomplete. Asks no network, and checks no content.
    """
    models = {"model.base": local_copy(config.base, config.revision, base_files(config))}
    if config.vae is not None:
        models["model.vae"] = local_copy(config.vae, str(config.vae_revision), VAE_FILES)
    return models


def weight_digests(config: ModelConfig) -> dict[str, str]:
    """SHA-256 of the files that each part's weights are in; reads them all, at SDXL's size some seconds."""
    vae = None if config.vae is None else open_vae(config)
    return {part: digests(files) for part, files in weight_files(config, open_base(config), vae).items()}


def weight_files(config: ModelConfig, base: Path, vae: Path | None) -> dict[str, list[Path]]:
    """The files that each part's weights are in.

    Args:
        base: the base model's folder.
        vae: that of the VAE in place of its own.
    """
    name = f"*.{config.variant}.safetensors" if config.variant else "*.safetensors"
    files = {part: sorted((base / part).glob(name)) for part in ("unet", "text_encoder", "text_encoder_2")}
    files["vae"] = sorted((base / "vae").glob(name)) if vae is None else sorted(vae.glob(VAE_FILE))
    return files


def digests(files: Iterable[Path]) -> str:
    """SHA-256 of each file, with commas between."""
    return ",".join(file_digest(path) for path in files)


def load_tokenizers(config: ModelConfig) -> Tokenizers:
    base = open_base(config)
    first, second = (CLIPTokenizer.from_pretrained(base / name) for name in ("tokenizer", "tokenizer_2"))
    return first, second


def load_text_encoders(config: ModelConfig, precision: Precision, device: torch.device) -> TextEncoders:
    """Both text encoders, frozen."""
    base = open_base(config)
    options = {"dtype": DTYPES[precision], "variant": config.variant, "use_safetensors": True}
    return (
        frozen(CLIPTextModel.from_pretrained(base / "text_encoder", **options), device),
        frozen(CLIPTextModelWithProjection.from_pretrained(base / "text_encoder_2", **options), device),
    )


def load_vae(config: ModelConfig, precision: Precision, device: torch.device) -> AutoencoderKL:
    """The VAE that `config` names, frozen."""
    if config.vae is None:
        folder, variant = open_base(config) / "vae", config.variant
    else:
        folder, variant = open_vae(config), None
    options = {"dtype": DTYPES[precision], "variant": variant, "use_safetensors": True}
    return frozen(AutoencoderKL.from_pretrained(folder, **options), device)


def load_unet(config: ModelConfig, precision: Precision, device: torch.device) -> UNet2DConditionModel:
    """The UNet, frozen."""
    options = {"dtype": DTYPES[precision], "variant": config.variant, "use_safetensors": True}
    return frozen(UNet2DConditionModel.from_pretrained(open_base(config) / "unet", **options), device)


def load_pipeline(
    config: ModelConfig, precision: Precision, device: torch.device
) -> StableDiffusionXLPipeline:
    """The whole pipeline, frozen, with the VAE that `config` names; decodes one image at a time.

    Frozen, because torch rounds the product with a weight that asks for gradients otherwise than with one
    that does not, also where no gradient is taken: it folds a batch into rows for the former alone.
    """
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        open_base(config),
        dtype=DTYPES[precision],
        variant=config.variant,
        vae=load_vae(config, precision, device),
        use_safetensors=True,
        add_watermarker=False,
    )
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        frozen(module, device)
    pipeline.vae.enable_slicing()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def layers_per_block(config: ModelConfig) -> int:
    """Resnets in a block of the UNet's way down."""
    number: int = UNet2DConditionModel.load_config(open_base(config) / "unet")["layers_per_block"]
    return number


def load_noise_schedule(config: ModelConfig) -> NoiseSchedule:
    """The noise schedule in the base model's scheduler folder."""
    scheduler = DDPMScheduler.from_pretrained(open_base(config) / "scheduler")
    return NoiseSchedule(scheduler.alphas_cumprod.float(), scheduler.config.prediction_type)


def zeros_mean_no_caption(config: ModelConfig) -> bool:
    """Whether the base model reads zeros where there is no caption, as SDXL does, or an empty caption."""
    zeros: bool = StableDiffusionXLPipeline.load_config(open_base(config)).get(
        "force_zeros_for_empty_prompt", True
    )
    return zeros


def tokenize(tokenizers: Tokenizers, texts: list[str]) -> Tensor:
    """Token ids of both tokenizers, padded and truncated to 77, int64, (B, 2, 77)."""
    options = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
    return torch.stack([tokenizer(texts, **options).input_ids for tokenizer in tokenizers], dim=1)


def count_tokens(tokenizers: Tokenizers, texts: list[str]) -> list[int]:
    """CLIP tokens of each text, start and end included, uncut."""
    return [len(ids) for ids in tokenizers[0](texts, truncation=False, verbose=False).input_ids]


def embed_tokens(text_encoders: TextEncoders, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the UNet reads of a text (Podell et al. 2023, section 2.1).

    The penultimate hidden states of both encoders side by side, and the second encoder's pooled projection.

    Args:
        token_ids: (B, 2, 77).

    Returns:
        prompt_embeds, (B, 77, 2048), and pooled_prompt_embeds, (B, 1280); narrower for smaller encoders.
    """
    first = text_encoders[0](token_ids[:, 0], output_hidden_states=True)
    second = text_encoders[1](token_ids[:, 1], output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def predict(
    unet: UNet2DConditionModel,
    noisy_latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    time_ids: Tensor,
) -> Tensor:
    """The UNet's prediction, (B, 4, H/8, W/8).

    Args:
        noisy_latents: (B, 4, H/8, W/8).
        timesteps: int64, (B,).
        prompt_embeds: (B, 77, 2048).
        pooled_prompt_embeds: (B, 1280).
        time_ids: original (h, w), crop (top, left), target (h, w) in pixels, (B, 6). Kept in fp32: fp16 would
            turn 4001 into 4000 and 70000 into infinity.
    """
    conditions = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids.float()}
    return unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=conditions, return_dict=False)[0]


def frozen(module: Any, device: torch.device) -> Any:
    """`module` on `device`, in evaluation mode, without gradients."""
    return module.to(device).eval().requires_grad_(False)
