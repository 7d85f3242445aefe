"""Previews of the adapter while it trains: one held-out caption, sampled from the same noise each time."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL.Image import Image
from torch import nn

from sdxl_lora import paths
from sdxl_lora.config import ModelConfig
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.models.vae import load_vae, tile_vae
from sdxl_lora.models.weights import open_base
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.storage.atomic_io import atomic_write
from sdxl_lora.training.denoiser import Denoiser

# A preview serves to see whether training works: time matters more than the last detail.
_NUM_INFERENCE_STEPS = 20
_GUIDANCE_SCALE = 5.0
PREVIEW_TILE = 512
"""Side of the tiles that the VAE decodes, pixels: 1024 px as a whole did not fit into the 16 GB recipe."""

logger = logging.getLogger(__name__)


def make_previewer(denoiser: Denoiser, config: ModelConfig, every: int | None) -> "Previewer | None":
    """Return a previewer of the first held-out example; None without previews, `every` None."""
    if every is None:
        return None
    return Previewer(denoiser, EncodedDataset(paths.ENCODED, "held_out"), config)


class Previewer:
    """Samples the first held-out caption with the UNet in training, and its present weights."""

    def __init__(self, denoiser: Denoiser, dataset: EncodedDataset, config: ModelConfig) -> None:
        """Load the VAE in addition to `denoiser` (0.16 GiB in fp16)."""
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline  # only previews need them

        vae = load_vae(config, denoiser.precision, denoiser.device)
        tile_vae(vae, PREVIEW_TILE)
        self._denoiser = denoiser
        self._batch = dataset[0].to(denoiser.device)
        self._pipeline = StableDiffusionXLPipeline(
            vae=vae,
            unet=denoiser.unet,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            scheduler=EulerDiscreteScheduler.from_pretrained(open_base(config) / "scheduler"),
            add_watermarker=False,
        )
        self._pipeline.set_progress_bar_config(disable=True)

    def save_or_warn(self, path: Path) -> Image | None:
        """Sample the image and write it as a PNG to `path`; return it.

        Training must not end because of a preview. If one fails, log a warning and return None, with the
        memory that the attempt took given back.
        """
        try:
            image = self.generate()
            with atomic_write(path) as partial:
                image.save(partial)
        except (
            RuntimeError,
            ArithmeticError,
            ValueError,
            OSError,
        ) as error:  # out of memory is a RuntimeError
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            logger.warning("no preview %s (%s): training continues", path.name, reason)
        else:
            return image
        # Only here, since the exception keeps the frames and their tensors alive until its block has ended.
        if self._denoiser.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    @torch.no_grad()
    def generate(self) -> Image:
        """Sample the held-out caption at the resolution of training, without the adapters' dropout."""
        with _evaluating(self._denoiser.modules):
            return self._sample()

    def _sample(self) -> Image:
        denoiser = self._denoiser
        noise = torch.randn(self._batch.latents_mean.shape, generator=keyed_generator("preview"))
        prompt_embeds, pooled_prompt_embeds = denoiser.conditioning(self._batch)
        no_caption = denoiser.conditioning(self._batch, caption_mask=torch.zeros(1, device=denoiser.device))
        height, width = self._batch.time_ids[0, 4:].tolist()
        return self._pipeline(
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_prompt_embeds=no_caption[0],
            negative_pooled_prompt_embeds=no_caption[1],
            latents=noise.to(denoiser.device, prompt_embeds.dtype),
            height=height,
            width=width,
            num_inference_steps=_NUM_INFERENCE_STEPS,
            guidance_scale=_GUIDANCE_SCALE,
        ).images[0]


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Switch the modules to evaluation mode while the block runs."""
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in modules:
            module.train()
