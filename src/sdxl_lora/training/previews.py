"""Previews of the adapter while it trains: one held-out caption, sampled from the same noise each time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL.Image import Image
from torch import nn

from sdxl_lora import paths
from sdxl_lora.config import ModelConfig
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.models.vae import load_vae
from sdxl_lora.models.weights import open_base
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.storage.atomic_io import atomic_write
from sdxl_lora.training.denoiser import Denoiser

# A preview serves to see whether training works: time matters more than the last detail.
_NUM_INFERENCE_STEPS = 20
_GUIDANCE_SCALE = 5.0


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
        vae.enable_tiling()  # decoding 1024 px as a whole takes GiB
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

    def save(self, path: Path) -> Image:
        """Sample the image and write it as a PNG to `path`."""
        image = self.generate()
        with atomic_write(path) as partial:
            image.save(partial)
        return image

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
