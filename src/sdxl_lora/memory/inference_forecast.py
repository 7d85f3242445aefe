"""What encoding and sampling do to GPU memory, traced as for training: without weights, on a CPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

import torch
from torch import Tensor, nn

from sdxl_lora.adapters.lora import add_adapters, lora_parameters
from sdxl_lora.config import Params, SamplingConfig
from sdxl_lora.data.caption_encoder import embed_captions
from sdxl_lora.data.image_encoder import encode_images, tile_vae
from sdxl_lora.inference.pipeline import fuse_pipeline
from sdxl_lora.memory.caching_allocator import MIB, CachingAllocator
from sdxl_lora.memory.trace import Event, MemoryTrace
from sdxl_lora.memory.training_forecast import (
    CUBLAS_WORKSPACE,
    META,
    MemoryForecast,
    live_bytes,
    replay_events,
)
from sdxl_lora.models.architecture import SDXLArchitecture
from sdxl_lora.models.fused_vae import fuse_vae
from sdxl_lora.models.loading import DTYPES
from sdxl_lora.models.sdxl import predict
from sdxl_lora.models.text_encoders import embed_tokens

_RECORDED_SCRATCH = 3 * CUBLAS_WORKSPACE + 224 * MIB
"""What kernels take for themselves where a UNet is recorded: cuBLAS on each of three streams, and the rest as
measured: pictures took 10.85 and 10.90 GiB on an H100, forecast 10.75. (The VAE's decoder had diffusers' own
blocks then, which are forecast to take 0.7 GiB more than the fused ones.)"""


@dataclass(frozen=True)
class InferenceTrace:
    """What loaded modules and a run of them allocate."""

    loaded: Sequence[Event]
    recorded: Sequence[Event]
    """Of the run, what a CUDA graph keeps to itself for as long as the run lasts."""
    run: Sequence[Event]
    """The rest."""
    adapters: int
    """Bytes of the adapters among what is loaded."""


@torch.no_grad()
def trace_inference(
    modules: Sequence[nn.Module],
    adapters: Sequence[Tensor],
    run: Callable[[], object],
    recorded: Callable[[], object] = lambda: None,
) -> InferenceTrace:
    """Follows a run, while all of `modules`, with `adapters` among their parameters, stay on the GPU.

    Args:
        recorded: the part of it that a CUDA graph replays.
        run: the rest.
    """
    trace = MemoryTrace(META)
    with trace:
        for module in modules:
            trace.hold(module.parameters())
            trace.hold(module.buffers())
        loaded = len(trace.events)
        recorded()
        start = len(trace.events)
        run()
    events, num_adapters = trace.events, sum(tensor.nbytes for tensor in adapters)
    return InferenceTrace(events[:loaded], events[loaded:start], events[start:], num_adapters)


def forecast_inference(trace: InferenceTrace, budget: float = inf) -> MemoryForecast:
    """Peak memory of a run without training.

    Raises:
        MemoryError: `budget` bytes do not do.
    """
    workspace = _RECORDED_SCRATCH if trace.recorded else CUBLAS_WORKSPACE
    allocator = CachingAllocator(budget - workspace)
    replay_events(trace.loaded, allocator)
    held = allocator.allocated
    graph = CachingAllocator()
    replay_events(trace.recorded, graph)
    allocator.limit -= graph.reserved
    if allocator.reserved > allocator.limit:
        raise MemoryError(f"a recorded pass takes {allocator.reserved + graph.reserved} bytes")
    replay_events(trace.run, allocator)
    parts = {
        "weights": live_bytes(trace.loaded) - trace.adapters,
        "adapters": trace.adapters,
        "optimizer": 0,
        "activations": allocator.peak_allocated - held + graph.peak_allocated,
        "previews": 0,
    }
    cache = allocator.peak_reserved + graph.reserved - sum(parts.values())
    return MemoryForecast(**parts, cache=cache, workspace=workspace)


def fits(trace: InferenceTrace, budget: float) -> bool:
    """Whether a run goes through with `budget` bytes."""
    try:
        forecast_inference(trace, budget)
    except MemoryError:
        return False
    return True


def trace_encoding(shapes: SDXLArchitecture, params: Params) -> InferenceTrace:
    """What the stage encode_dataset takes for one batch."""
    config = params.encoding
    vae = shapes.make_vae(config.vae_precision, META)
    fuse_vae(vae)
    tile_vae(vae, config.vae_tile)
    frozen = params.model.text_encoders == "frozen"
    text_encoders = shapes.make_text_encoders(config.text_precision, META) if frozen else None

    levels = torch.zeros(config.batch_size, 3, config.resolution, config.resolution, dtype=torch.uint8)

    def run() -> None:
        encode_images(vae, levels)
        if text_encoders is not None:
            embed_captions(text_encoders, torch.zeros(config.batch_size, 2, 77, dtype=torch.long))

    return trace_inference([vae, *(text_encoders or ())], [], run)


def trace_sampling(shapes: SDXLArchitecture, params: Params) -> InferenceTrace:
    """What the stage sample_images takes for one batch: text, a recorded UNet, the VAE."""
    config = params.sampling
    unet = shapes.make_unet(config.precision, META)
    text_encoders = shapes.make_text_encoders(config.precision, META)
    vae = shapes.make_vae(config.precision, META)
    adapted = text_encoders if params.model.text_encoders != "frozen" else None
    add_adapters(unet, adapted, params.lora, seed=0)
    adapters = [p for module in (unet, *text_encoders) for p in lora_parameters(module)]
    for parameter in adapters:
        parameter.data = parameter.data.to(DTYPES[config.precision])

    fuse_pipeline(unet, text_encoders, vae, "sdpa")  # all fused attentions take the same
    size = config.batch_size * (2 if config.guidance_scale > 1 else 1)  # with and without the prompt
    side = config.resolution // shapes.pixels_per_latent

    def run() -> None:
        embed_tokens(text_encoders, torch.zeros(config.batch_size, 2, 77, dtype=torch.long, device=META))
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)  # as diffusers does
        latents = torch.empty(config.batch_size, 4, side, side, dtype=vae.dtype, device=META)
        torch.cat([vae.decode(latent[None]).sample for latent in latents])

    denoise = partial(_denoised, shapes, unet, config, size)
    return trace_inference([unet, *text_encoders, vae], adapters, run, recorded=denoise)


def _denoised(shapes: SDXLArchitecture, unet: nn.Module, config: SamplingConfig, size: int) -> Tensor:
    """What the UNet makes of a batch of `size`."""
    dtype, side = DTYPES[config.precision], config.resolution // shapes.pixels_per_latent
    width, pooled_width = shapes.embedding_widths
    return predict(
        unet,
        torch.empty(size, 4, side, side, dtype=dtype, device=META),
        torch.empty(size, dtype=torch.long, device=META),
        torch.empty(size, 77, width, dtype=dtype, device=META),
        torch.empty(size, pooled_width, dtype=dtype, device=META),
        torch.empty(size, 6, device=META),
    )
