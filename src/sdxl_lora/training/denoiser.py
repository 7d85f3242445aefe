"""The base model with its adapters in training and evaluation: from encoded examples to prediction errors."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdxl_lora.adapters.lora import named_parts
from sdxl_lora.config import ModelConfig, Precision, Quantization
from sdxl_lora.data.encoded_dataset import Batch, EncodedDataset
from sdxl_lora.kernels.quantized_linear import quantize
from sdxl_lora.models.base_config import force_zeros_for_empty_prompt
from sdxl_lora.models.diffusion import add_noise, prediction_target, squared_error
from sdxl_lora.models.loading import DTYPES
from sdxl_lora.models.sdxl import (
    NoiseSchedule,
    load_noise_schedule,
    load_unet,
    predict,
)
from sdxl_lora.models.text_encoders import TextEncoders, embed_tokens, load_text_encoders
from sdxl_lora.models.tokenizers import load_tokenizers, tokenize

_EMBEDDED_AT_ONCE = 16  # captions, whose hidden states are 0.12 GiB in a half precision


@dataclass(frozen=True)
class _NullConditioning:
    """The empty caption's embeddings, for base models that replace dropped captions by these, not zeros."""

    token_ids: Tensor
    """(1, 2, 77)."""
    prompt_embeds: Tensor
    """Computed by the text encoders as loaded or, once trained ones are frozen, by those, (1, 77, 2048)."""
    pooled_prompt_embeds: Tensor
    """(1, 1280)."""


@dataclass(frozen=True)
class Denoiser:
    """UNet, noise schedule and, unless captions are embedded already, text encoders."""

    unet: UNet2DConditionModel
    text_encoders: TextEncoders | None
    noise_schedule: NoiseSchedule
    precision: Precision
    null_conditioning: _NullConditioning | None = None
    """None: zeros replace a dropped caption."""

    @property
    def parts(self) -> dict[str, Any]:
        """The adapted models by part: the UNet, and the text encoders if they are trained."""
        return named_parts(self.unet, self.text_encoders)

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        return tuple(self.parts.values())

    @property
    def device(self) -> torch.device:
        return self.noise_schedule.alphas_cumprod.device

    def per_example_mse(
        self,
        batch: Batch,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        caption_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the mean squared error of each example's prediction, fp32, (B,).

        Args:
            batch: source of the conditioning.
            latents: x_0, fp32, (B, 4, H/8, W/8).
            noise: eps, shaped as `latents`.
            timesteps: int64, (B,).
            caption_mask: 0 where the caption is dropped, else 1, (B,); None: no caption is dropped.
        """
        alpha_bar = self.noise_schedule.alphas_cumprod[timesteps]
        prediction_type = self.noise_schedule.prediction_type
        prompt_embeds, pooled_prompt_embeds = self.conditioning(batch, caption_mask)
        noisy_latents = add_noise(latents, noise, alpha_bar).to(DTYPES[self.precision])
        prediction = predict(
            self.unet, noisy_latents, timesteps, prompt_embeds, pooled_prompt_embeds, batch.time_ids
        )
        return squared_error(prediction, prediction_target(latents, noise, alpha_bar, prediction_type))

    def conditioning(self, batch: Batch, caption_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the captions' embeddings as the UNet reads them, (B, 77, 2048) and (B, 1280).

        A dropped caption becomes zeros or the empty caption's embeddings, whichever diffusers' pipeline uses
        for a missing prompt.

        Raises:
            ValueError: the text encoders are frozen and the data set was encoded without embeddings.
        """
        empty = self.null_conditioning
        if self.text_encoders is not None:
            token_ids = batch.token_ids
            if empty is not None and caption_mask is not None:
                token_ids = torch.where(caption_mask[:, None, None] > 0, token_ids, empty.token_ids)
            prompt_embeds, pooled_prompt_embeds = embed_tokens(self.text_encoders, token_ids)
        elif batch.prompt_embeds is not None and batch.pooled_prompt_embeds is not None:
            prompt_embeds, pooled_prompt_embeds = batch.prompt_embeds, batch.pooled_prompt_embeds
        else:
            raise ValueError(
                "model.text_encoders is 'frozen', but the encoded data set holds no embeddings: "
                "run `dvc repro encode_dataset`"
            )
        dtype = DTYPES[self.precision]
        prompt_embeds, pooled_prompt_embeds = prompt_embeds.to(dtype), pooled_prompt_embeds.to(dtype)
        if caption_mask is None:
            return prompt_embeds, pooled_prompt_embeds
        if empty is None:
            caption_mask = caption_mask.to(dtype)
            return prompt_embeds * caption_mask[:, None, None], pooled_prompt_embeds * caption_mask[:, None]
        if self.text_encoders is not None:
            return prompt_embeds, pooled_prompt_embeds
        kept = caption_mask > 0
        return (
            torch.where(kept[:, None, None], prompt_embeds, empty.prompt_embeds.to(dtype)),
            torch.where(kept[:, None], pooled_prompt_embeds, empty.pooled_prompt_embeds.to(dtype)),
        )


@torch.no_grad()
def embed_null_conditioning(text_encoders: TextEncoders, token_ids: Tensor) -> _NullConditioning:
    """Embed the empty caption with these text encoders.

    Args:
        token_ids: of the empty caption, on the text encoders' device, (1, 2, 77).
    """
    return _NullConditioning(token_ids, *embed_tokens(text_encoders, token_ids))


def _load_null_conditioning(
    config: ModelConfig, precision: Precision, device: torch.device
) -> _NullConditioning | None:
    """Return the empty caption's embeddings; None if zeros replace it. Loads and frees the text encoders."""
    if force_zeros_for_empty_prompt(config):
        return None
    token_ids = tokenize(load_tokenizers(config), [""]).to(device)
    return embed_null_conditioning(load_text_encoders(config, precision, device), token_ids)


@torch.no_grad()
def with_captions_embedded(denoiser: Denoiser, dataset: EncodedDataset) -> EncodedDataset:
    """Return the data set with its captions embedded by the text encoders as they are now.

    The embeddings are on the CPU, in the text encoders' precision: 0.3 MB an example in a half one.
    """
    assert denoiser.text_encoders is not None
    embeds = []
    for token_ids in dataset.token_ids().split(_EMBEDDED_AT_ONCE):
        rows = embed_tokens(denoiser.text_encoders, token_ids.to(denoiser.device))
        embeds.append([tensor.cpu() for tensor in rows])
    return dataset.with_embeddings(*(torch.cat(column) for column in zip(*embeds, strict=True)))


def load_denoiser(
    config: ModelConfig, precision: Precision, device: torch.device, quantization: Quantization = "none"
) -> Denoiser:
    """Load the base model's UNet and, unless `config` has them frozen, its text encoders; no gradients."""
    # First of all, so that its text encoders are freed before the UNet takes their memory.
    null_conditioning = _load_null_conditioning(config, precision, device)
    cpu = torch.device("cpu")  # the full weights: the device gets only the quantised ones
    text_encoders = None
    if config.text_encoders != "frozen":
        first, second = load_text_encoders(config, precision, cpu)
        text_encoders = quantize(first, quantization, device), quantize(second, quantization, device)
    unet = quantize(load_unet(config, precision, cpu), quantization, device)
    schedule = load_noise_schedule(config)
    schedule = NoiseSchedule(schedule.alphas_cumprod.to(device), schedule.prediction_type)
    return Denoiser(unet, text_encoders, schedule, precision, null_conditioning)
