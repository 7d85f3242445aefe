"""Images from prompts and noise by diffusers' pipeline; on a GPU with fused modules and a CUDA graph.

Handles neither files nor the choice of prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL.Image import Image
from torch import Tensor

from sdxl_lora.config import AttentionBackend, SamplingConfig
from sdxl_lora.kernels.attention import default_attention
from sdxl_lora.kernels.cuda_graph import GraphedCallable
from sdxl_lora.models.fused_text_encoder import fuse_text_encoder
from sdxl_lora.models.fused_unet import attention_shapes, fuse_unet
from sdxl_lora.models.fused_vae import fuse_vae
from sdxl_lora.models.sdxl import predict
from sdxl_lora.models.text_encoders import TextEncoders


@dataclass(frozen=True)
class _UNetInputs:
    """The UNet's inputs at one step; shapes as in `sdxl.predict`, except for the timestep."""

    noisy_latents: Tensor
    timestep: Tensor
    """One for all examples, ()."""
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    time_ids: Tensor

    def to(self, device: torch.device) -> Self:
        """Return a copy on `device`; the pipeline keeps using its own tensors."""
        return replace(self, **{name: t.to(device, copy=True) for name, t in vars(self).items()})

    def tensors(self) -> list[Tensor]:
        return list(vars(self).values())


def prepare_pipeline(pipeline: StableDiffusionXLPipeline, config: SamplingConfig) -> None:
    """Make the pipeline faster on a GPU; on a CPU, where nothing would be gained, leave it unchanged."""
    if pipeline.device.type == "cpu":
        return
    side = config.resolution // pipeline.vae_scale_factor
    shapes = attention_shapes(pipeline.unet, 1, side, side)
    backend = default_attention(shapes, pipeline.unet.dtype, pipeline.device)
    fuse_pipeline(pipeline.unet, (pipeline.text_encoder, pipeline.text_encoder_2), pipeline.vae, backend)


def fuse_pipeline(
    unet: UNet2DConditionModel, text_encoders: TextEncoders, vae: AutoencoderKL, backend: AttentionBackend
) -> None:
    """Replace the classes of a pipeline's modules by the fused ones, in channels_last on a GPU."""
    fuse_unet(unet, backend)
    for text_encoder in text_encoders:
        fuse_text_encoder(text_encoder)
    fuse_vae(vae)


@contextmanager
def use_cuda_graph(unet: UNet2DConditionModel) -> Iterator[None]:
    """Replay the UNet's kernels as a CUDA graph inside the block; on a CPU change nothing.

    A graph repeats what was captured: everything that affects the UNet except its inputs, such as the
    adapter's strength, must not change inside the block.
    """
    call: Callable[[_UNetInputs], Tensor] = partial(_call_unet, unet.forward)
    if unet.device.type == "cuda":
        call = GraphedCallable(call, unet.device)
    unet.forward = partial(_unet_forward, call)
    try:
        yield
    finally:
        del unet.forward, call  # and with them the graphs, whose memory only then can be given back
        if unet.device.type == "cuda":
            torch.cuda.empty_cache()


def _unet_forward(
    call: Callable[[_UNetInputs], Tensor],
    sample: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    added_cond_kwargs: dict[str, Tensor],
    **_: Any,
) -> tuple[Tensor]:
    """Call the UNet with the arguments that diffusers' pipeline passes."""
    conditions = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
    prediction = call(_UNetInputs(sample, timestep, encoder_hidden_states, *conditions))
    return (prediction.clone(),)  # schedulers may keep it, and the next replay overwrites the graph's output


def _call_unet(unet: Callable[..., Any], inputs: _UNetInputs) -> Tensor:
    """Return the prediction, (B, 4, H/8, W/8)."""
    return predict(unet, *inputs.tensors())


@torch.no_grad()
def generate_images(
    pipeline: StableDiffusionXLPipeline, config: SamplingConfig, prompts: Sequence[str], noise: Tensor
) -> list[Image]:
    """Generate one image a prompt from `noise`, (B, 4, H/8, W/8).

    Raises:
        FloatingPointError: an image has pixels that are not finite.
    """
    pixels = pipeline(
        list(prompts),
        negative_prompt=None if config.negative_prompt is None else [config.negative_prompt] * len(prompts),
        latents=noise.to(pipeline.device, pipeline.unet.dtype),
        height=config.resolution,
        width=config.resolution,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        output_type="pt",
    ).images
    for prompt, image in zip(prompts, pixels, strict=True):
        if not torch.isfinite(image).all():  # would be saved as black
            raise FloatingPointError(
                f"the image of {prompt!r} has pixels that are not finite: set sampling.precision to bf16 "
                "or fp32, or model.vae to one that is safe in fp16"
            )
    processor = pipeline.image_processor
    images: list[Image] = processor.numpy_to_pil(processor.pt_to_numpy(pixels))
    return images
