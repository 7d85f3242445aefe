"""What encoding and sampling do to GPU memory, traced as for training: without weights, on a CPU."""

from functools import partial

import torch

from sdxl_lora.config import Params, SamplingConfig
from sdxl_lora.drawing import fuse_all
from sdxl_lora.encoders import embed_captions, encode_images, tile_vae
from sdxl_lora.forecast import META, InferenceTrace, trace_inference
from sdxl_lora.fused import fuse_vae
from sdxl_lora.lora import add_adapters, lora_parameters
from sdxl_lora.sdxl import DTYPES, embed_tokens, predict
from sdxl_lora.shapes import Shapes


def trace_encoding(shapes: Shapes, params: Params) -> InferenceTrace:
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


def trace_sampling(shapes: Shapes, params: Params) -> InferenceTrace:
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

    fuse_all(unet, text_encoders, vae, "sdpa")  # all fused attentions take the same
    size = config.batch_size * (2 if config.guidance_scale > 1 else 1)  # with and without the prompt
    side = config.resolution // shapes.pixels_per_latent

    def run() -> None:
        embed_tokens(text_encoders, torch.zeros(config.batch_size, 2, 77, dtype=torch.long, device=META))
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)  # as diffusers does
        latents = torch.empty(config.batch_size, 4, side, side, dtype=vae.dtype, device=META)
        torch.cat([vae.decode(latent[None]).sample for latent in latents])

    denoise = partial(denoised, shapes, unet, config, size)
    return trace_inference([unet, *text_encoders, vae], adapters, run, recorded=denoise)


def denoised(shapes: Shapes, unet: torch.nn.Module, config: SamplingConfig, size: int) -> torch.Tensor:
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
