"""SDXL in its real shapes with random weights: time and memory do not depend on their values.

The shapes are those of SDXL base 1.0 (Podell et al. 2023, arXiv:2307.01952, section 2).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_lora.config import Precision, Quantization
from sdxl_lora.dataset import Batch, Example
from sdxl_lora.denoising import Denoiser
from sdxl_lora.quantization import quantize
from sdxl_lora.sdxl import DTYPES, NoiseSchedule, TextEncoders

UNET = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
SPECIAL_TOKENS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
TEXT_ENCODER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
TEXT_ENCODER_2 = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}


def random_denoiser(
    precision: Precision,
    device: torch.device,
    trained_text_encoders: bool,
    quantization: Quantization = "none",
) -> Denoiser:
    """A frozen SDXL with random weights, made on `device` in `precision`: 3.4 billion parameters."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[precision])
    try:
        with device, quantized_as_made(quantization, device):
            unet = UNet2DConditionModel(**UNET)
            text_encoders = random_text_encoders() if trained_text_encoders else None
    finally:
        torch.set_default_dtype(default)
    for module in (unet, *(text_encoders or ())):
        module.eval().requires_grad_(False)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    schedule = NoiseSchedule(scheduler.alphas_cumprod.to(device), "epsilon")
    return Denoiser(unet, text_encoders, schedule, precision)


@contextmanager
def quantized_as_made(quantization: Quantization, device: torch.device) -> Iterator[None]:
    """Quantises layers as they are made in the block, each before the next.

    So `device` never holds all of them in full, no more than when `load_denoiser` loads them, and the peak of
    its memory is that of training.
    """

    def quantize_child(_parent: nn.Module, _name: str, child: nn.Module | None) -> None:
        if child is not None:
            quantize(child.requires_grad_(False), quantization, device)

    handle = register_module_module_registration_hook(quantize_child)
    try:
        yield
    finally:
        handle.remove()


def random_text_encoders() -> TextEncoders:
    first = CLIPTextConfig(vocab_size=49408, **TEXT_ENCODER, **SPECIAL_TOKENS)
    second = CLIPTextConfig(vocab_size=49408, **TEXT_ENCODER_2, **SPECIAL_TOKENS)
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


class RandomDataset:
    """Stands in for an encoded data set: eight examples of noise at `resolution` pixels a side."""

    def __init__(self, resolution: int = 1024) -> None:
        side = resolution // 8
        self.examples = [Example(str(n), f"{n}.png", "", "train", "random", n) for n in range(8)]
        token_ids = torch.randint(0, 49000, (8, 2, 77))
        token_ids[..., -1] = SPECIAL_TOKENS["eos_token_id"]
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

    def batch(self, indices: list[int]) -> Batch:
        return Batch(*(tensor[indices] for tensor in self._batch.tensors().values() if tensor is not None))
