"""Peak GPU memory of encoding and sampling, forecast as for training: without weights, on a CPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

import torch
from torch import Tensor, nn

from sdxl_lora.adapters.lora import add_adapters, lora_parameters, named_parts
from sdxl_lora.config import Params, SamplingConfig
from sdxl_lora.data.caption_encoder import embed_captions
from sdxl_lora.data.image_encoder import encode_images
from sdxl_lora.inference.pipeline import fuse_pipeline
from sdxl_lora.memory.caching_allocator import MIB, CachingAllocator
from sdxl_lora.memory.trace import Event, MemoryTrace, live_bytes
from sdxl_lora.memory.training_forecast import CUBLAS_WORKSPACE, MemoryForecast, replay_events
from sdxl_lora.memory.training_trace import META
from sdxl_lora.models.architecture import SDXLArchitecture
from sdxl_lora.models.fused_vae import fuse_vae
from sdxl_lora.models.loading import DTYPES
from sdxl_lora.models.sdxl import predict
from sdxl_lora.models.text_encoders import embed_tokens
from sdxl_lora.models.vae import tile_vae

_GRAPH_SCRATCH = 3 * CUBLAS_WORKSPACE + 224 * MIB
"""Scratch memory of kernels where a CUDA graph runs the UNet: cuBLAS on each of three streams, and the rest
as measured: sampling took 10.85 and 10.90 GiB on an H100, forecast 10.75. (The VAE's decoder then had the
blocks of diffusers, which are forecast to take 0.7 GiB more than the fused ones.)"""


@dataclass(frozen=True)
class InferenceTrace:
    """The memory events of loading modules and of a run of them."""

    loaded: Sequence[Event]
    graphed: Sequence[Event]
    """The part of the run that a CUDA graph runs, in a memory pool of the graph."""
    run: Sequence[Event]
    """The rest of the run."""
    adapters: int
    """Bytes of the adapters, which `loaded` includes."""


@torch.no_grad()
def trace_inference(
    modules: Sequence[nn.Module],
    adapters: Sequence[Tensor],
    run: Callable[[], object],
    graphed: Callable[[], object] = lambda: None,
) -> InferenceTrace:
    """Trace a run during which all of `modules` stay on the GPU.

    Args:
        modules: everything that is loaded.
        adapters: those of the modules' parameters that belong to adapters.
        run: the part of the run that no CUDA graph runs.
        graphed: the part that one runs.
    """
    trace = MemoryTrace(META)
    with trace:
        for module in modules:
            trace.hold(module.parameters())
            trace.hold(module.buffers())
        loaded = len(trace.events)
        graphed()
        start = len(trace.events)
        run()
    events, num_adapters = trace.events, sum(tensor.nbytes for tensor in adapters)
    return InferenceTrace(events[:loaded], events[loaded:start], events[start:], num_adapters)


def forecast_inference(trace: InferenceTrace, budget: float = inf) -> MemoryForecast:
    """Return the peak memory of a run without training.

    Raises:
        MemoryError: `budget` bytes are too few.
    """
    workspace = _GRAPH_SCRATCH if trace.graphed else CUBLAS_WORKSPACE
    main_pool = CachingAllocator(budget - workspace)
    replay_events(trace.loaded, main_pool)
    persistent_bytes = main_pool.allocated
    # Without a limit, since PyTorch returns no cached memory during a capture. What the graph reserves is
    # gone for good, and all else has to fit into the rest of the budget.
    graph_pool = CachingAllocator()
    replay_events(trace.graphed, graph_pool)
    main_pool.limit -= graph_pool.reserved
    if main_pool.reserved > main_pool.limit:
        raise MemoryError(f"a captured pass takes {main_pool.reserved + graph_pool.reserved} bytes")
    replay_events(trace.run, main_pool)
    parts = {
        "weights": live_bytes(trace.loaded) - trace.adapters,
        "adapters": trace.adapters,
        "optimizer": 0,
        "activations": main_pool.peak_allocated - persistent_bytes + graph_pool.peak_allocated,
        "previews": 0,
    }
    cache = main_pool.peak_reserved + graph_pool.reserved - sum(parts.values())
    return MemoryForecast(**parts, cache=cache, workspace=workspace)


def fits(trace: InferenceTrace, budget: float) -> bool:
    """Return whether `budget` bytes suffice for a run."""
    try:
        forecast_inference(trace, budget)
    except MemoryError:
        return False
    return True


def trace_encoding(shapes: SDXLArchitecture, params: Params) -> InferenceTrace:
    """Trace one batch of the stage encode_dataset."""
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
    """Trace one batch of the stage sample_images: text encoders, the UNet in a CUDA graph, the VAE."""
    config = params.sampling
    unet = shapes.make_unet(config.precision, META)
    text_encoders = shapes.make_text_encoders(config.precision, META)
    vae = shapes.make_vae(config.precision, META)
    adapted = text_encoders if params.model.text_encoders != "frozen" else None
    add_adapters(named_parts(unet, adapted), params.lora, seed=0)
    adapters = [p for module in (unet, *text_encoders) for p in lora_parameters(module)]
    for parameter in adapters:
        parameter.data = parameter.data.to(DTYPES[config.precision])

    fuse_pipeline(unet, text_encoders, vae, "sdpa")  # all fused attention kernels take the same memory
    size = config.batch_size * (2 if config.guidance_scale > 1 else 1)  # with and without the prompt
    side = config.resolution // shapes.pixels_per_latent

    def run() -> None:
        embed_tokens(text_encoders, torch.zeros(config.batch_size, 2, 77, dtype=torch.long, device=META))
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)  # as diffusers' pipeline does before it decodes
        latents = torch.empty(config.batch_size, 4, side, side, dtype=vae.dtype, device=META)
        torch.cat([vae.decode(latent[None]).sample for latent in latents])

    denoise = partial(_denoise, shapes, unet, config, size)
    return trace_inference([unet, *text_encoders, vae], adapters, run, graphed=denoise)


def _denoise(shapes: SDXLArchitecture, unet: nn.Module, config: SamplingConfig, size: int) -> Tensor:
    """Run the UNet once on a batch of `size`."""
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
