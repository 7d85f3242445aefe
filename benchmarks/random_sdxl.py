"""SDXL in its real shapes with random weights, since time and memory do not depend on their values."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import CLIPTokenizer

from sdxl_lora.config import Precision, Quantization
from sdxl_lora.data.encoded_dataset import Batch, Example
from sdxl_lora.kernels.quantized_linear import quantize
from sdxl_lora.models import architecture
from sdxl_lora.models.sdxl import NoiseSchedule
from sdxl_lora.training.denoiser import Denoiser

TOKENIZER = Path("demo/base_model/tokenizer")
"""The demo's tokenizer: its 2,007 tokens are within SDXL's 49,408."""
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""SDXL's noise schedule, as arguments of diffusers' schedulers."""


def random_denoiser(
    precision: Precision,
    device: torch.device,
    trained_text_encoders: bool,
    quantization: Quantization = "none",
) -> Denoiser:
    """Return a frozen SDXL with random weights, on `device` in `precision`: 3.4 billion parameters."""
    torch.manual_seed(0)
    base = architecture.SDXL_BASE
    with quantize_on_creation(quantization, device):
        unet = base.make_unet(precision, device)
        text_encoders = base.make_text_encoders(precision, device) if trained_text_encoders else None
    scheduler = DDPMScheduler(**NOISE)
    schedule = NoiseSchedule(scheduler.alphas_cumprod.to(device), "epsilon")
    return Denoiser(unet, text_encoders, schedule, precision)


def random_pipeline(precision: Precision, device: torch.device) -> StableDiffusionXLPipeline:
    """Return SDXL base with random weights on `device`, its VAE marked as safe in half precision."""
    torch.manual_seed(0)
    base = architecture.SDXL_BASE
    text_encoder, text_encoder_2 = base.make_text_encoders(precision, device)
    vae = base.make_vae(precision, device)
    vae.register_to_config(force_upcast=False)  # as sdxl-vae-fp16-fix
    vae.enable_slicing()
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=base.make_unet(precision, device),
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def quantize_on_creation(quantization: Quantization, device: torch.device) -> Iterator[None]:
    """Quantize each layer that the block creates before the next one is created.

    `device` then never holds all layers in full precision, as with `load_denoiser`, and its peak memory is
    that of training.
    """

    def quantize_child(_parent: nn.Module, _name: str, child: nn.Module | None) -> None:
        if child is not None:
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)  # bitsandbytes creates its tables once, in this dtype
            quantize(child.requires_grad_(False), quantization, device)
            torch.set_default_dtype(default)

    handle = register_module_module_registration_hook(quantize_child)
    try:
        yield
    finally:
        handle.remove()


class RandomDataset:
    """Substitute for an encoded data set: eight examples of noise with sides of `resolution` pixels."""

    def __init__(self, resolution: int = 1024) -> None:
        side = resolution // 8
        self.latents = torch.Size((1, 4, side, side))
        self.latents_shapes = [self.latents] * 8
        self.examples = [Example(str(n), f"{n}.png", "", "train", "random", n) for n in range(8)]
        token_ids = torch.randint(0, 49000, (8, 2, 77))
        token_ids[..., -1] = architecture.SDXL_BASE.text_encoder["vocab_size"] - 1  # a caption's end
        self._batch = Batch(
            latents_mean=torch.randn(8, 4, side, side),
            latents_std=torch.full((8, 4, side, side), 0.1),
            token_ids=token_ids,
            time_ids=torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]] * 8),
            prompt_embeds=torch.randn(8, 77, 2048),
            pooled_prompt_embeds=torch.randn(8, 1280),
        )

    def __len__(self) -> int:
        return len(self._batch)

    def batch(self, indices: list[int], variants: object = None) -> Batch:  # noqa: ARG002
        return Batch(*(tensor[indices] for tensor in self._batch.tensors().values() if tensor is not None))

    def token_ids(self) -> Tensor:
        """Return the token ids of every caption, (8, 2, 77)."""
        return self._batch.token_ids

    def with_embeddings(self, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Self:
        """Return the same examples with these embeddings, one row each."""
        dataset = copy(self)
        dataset._batch = replace(
            self._batch, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds
        )
        return dataset
