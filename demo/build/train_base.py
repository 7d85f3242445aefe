"""Stage train_base: latents and captions -> the UNet and both text encoders, from random weights."""

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from captions import loose_captions
from diffusers import AutoencoderKL
from image_set import ImageSet, load_image_set
from models import IMAGE_SIZE, LATENT_SIZE, make_scheduler, make_text_encoders, make_unet
from optimise import Budget, FlatModel, train
from torch import Tensor, nn
from train_evaluator import tokenize
from train_vae import DEVICE, DTYPE, encode
from transformers import CLIPTokenizer

from sdxl_lora.models.diffusion import add_noise, min_snr_weight, squared_error
from sdxl_lora.models.sdxl import predict
from sdxl_lora.models.text_encoders import embed_tokens

HERE = Path(__file__).parent
OUT = HERE / "out/base"


def main() -> None:
    params = yaml.safe_load((HERE / "params.yaml").read_text())["base"]
    budget = Budget(**params["budget"])
    torch.manual_seed(budget.seed)
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "out/tokenizer")
    model = FlatModel([make_unet(), *make_text_encoders(tokenizer)], DEVICE, DTYPE)
    batches = Batches(
        encode_image_set(load_image_set(HERE / "out/images"), tokenizer, params), params, budget
    )
    loss = denoising_loss(model.modules, batches, params)

    OUT.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (OUT / "curve.csv").open("w", newline="") as file:
        curve = csv.writer(file)
        curve.writerow(["step", "seconds", "loss", "squared_error"])
        for report in train(model, loss, batches.fill, budget, params["report_every"]):
            curve.writerow([report.step, round(time.monotonic() - start, 1), *report.losses])
            file.flush()
            print("base", report, round(time.monotonic() - start), flush=True)
            if report.step % (params["report_every"] * 20) == 0:
                save(model, tokenizer)
    save(model, tokenizer)


@dataclass(frozen=True)
class EncodedImageSet:
    """Latents and token ids of the images; rows belong together."""

    means: Tensor
    """Means of the VAE's posterior, (N, 4, h, w)."""
    deviations: Tensor
    token_ids: Tensor
    """Token ids of each image's captions: the full one, then the loose ones, int64, (N, 1 + loose, 77)."""
    originals: Tensor
    """Indices of originals to train on, int64."""
    shaded: Tensor
    """Indices of shaded copies to train on, int64."""


def encode_image_set(
    image_set: ImageSet, tokenizer: CLIPTokenizer, params: dict[str, Any]
) -> EncodedImageSet:
    vae = AutoencoderKL.from_pretrained(HERE / "out/vae/model").to(DEVICE).eval().requires_grad_(False)
    encoded = [encode(vae, chunk.to(DEVICE)) for chunk in image_set.pixels.split(1024)]
    texts = []
    for full, label, style in zip(image_set.captions(), image_set.labels, image_set.styles, strict=True):
        texts += [full, *loose_captions(label, style, params["loose_captions"], "base")]
    token_ids = tokenize(tokenizer, texts).view(len(image_set.labels), -1, 77)
    return EncodedImageSet(
        torch.cat([mean for mean, _ in encoded]),
        torch.cat([deviation for _, deviation in encoded]),
        token_ids.to(DEVICE),
        image_set.where({"base"}, shaded=False).to(DEVICE),
        image_set.where({"base"}, shaded=True).to(DEVICE),
    )


class Batches:
    """The tensors of one batch, refilled in place for each step."""

    def __init__(self, data: EncodedImageSet, params: dict[str, Any], budget: Budget) -> None:
        size = budget.batch_size
        self.data, self.params, self.size = data, params, size
        self.latents = torch.zeros(size, 4, LATENT_SIZE, LATENT_SIZE, device=DEVICE)
        self.noise = torch.zeros_like(self.latents)
        self.timesteps = torch.zeros(size, dtype=torch.long, device=DEVICE)
        self.token_ids = torch.zeros(size, 77, dtype=torch.long, device=DEVICE)
        self.captioned = torch.ones(size, device=DEVICE)

    def fill(self, _: int) -> None:
        data, params = self.data, self.params
        shaded = self.random() < params["shaded"]
        indices = torch.where(shaded, self.choice(data.shaded), self.choice(data.originals))
        self.noise.normal_()
        self.latents.copy_(data.means[indices] + data.deviations[indices] * torch.randn_like(self.noise))
        # One timestep from each of `size` equal intervals: uniform, with less variance than independent ones.
        strata = torch.arange(self.size, device=DEVICE)
        self.timesteps.copy_(((strata + self.random()) * (1000 / self.size)).long().clamp(max=999))
        self.captioned.copy_(self.random() >= params["caption_dropout"])

        kind = self.random()
        loose = 2 + (self.random() * (params["loose_captions"] - 1)).long()  # an invented style
        loose = torch.where(kind < params["label_only"], 1, loose)
        variant = torch.where(kind < params["label_only"] + params["unknown_style"], loose, 0)
        self.token_ids.copy_(data.token_ids[indices, variant])

    def random(self) -> Tensor:
        """Return uniform random numbers in [0, 1), (B,)."""
        return torch.rand(self.size, device=DEVICE)

    def choice(self, indices: Tensor) -> Tensor:
        return indices[torch.randint(len(indices), (self.size,), device=DEVICE)]


def denoising_loss(
    modules: Sequence[nn.Module], batches: Batches, params: dict[str, Any]
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function for the weighted and the plain squared error of the noise prediction on a batch."""
    unet, text_encoder, text_encoder_2 = modules
    if params["compile"] and DEVICE.type == "cuda":
        unet.compile(dynamic=False)
    alphas_cumprod = make_scheduler().alphas_cumprod.to(DEVICE)
    size = [IMAGE_SIZE, IMAGE_SIZE]
    time_ids = torch.tensor([[*size, 0, 0, *size]] * batches.size, dtype=torch.float32, device=DEVICE)

    def loss() -> tuple[Tensor, Tensor]:
        alpha_bar = alphas_cumprod[batches.timesteps]
        noisy_latents = add_noise(batches.latents, batches.noise, alpha_bar).to(DTYPE)
        noisy_latents = noisy_latents.contiguous(memory_format=torch.channels_last)
        captioned = batches.captioned.to(DTYPE)
        token_ids = batches.token_ids[:, None].expand(-1, 2, -1)
        prompt_embeds, pooled_prompt_embeds = embed_tokens((text_encoder, text_encoder_2), token_ids)
        prompt_embeds = prompt_embeds * captioned[:, None, None]
        pooled_prompt_embeds = pooled_prompt_embeds * captioned[:, None]
        prediction = predict(
            unet, noisy_latents, batches.timesteps, prompt_embeds, pooled_prompt_embeds, time_ids
        )
        error = squared_error(prediction, batches.noise)
        weighted = error * min_snr_weight(alpha_bar, params["min_snr_gamma"], "epsilon")
        return weighted.mean(), error.mean()

    return loss


def save(model: FlatModel, tokenizer: CLIPTokenizer) -> None:
    names = ("unet", "text_encoder", "text_encoder_2")
    for name, module in zip(names, model.export([make_unet(), *make_text_encoders(tokenizer)]), strict=True):
        module.half().save_pretrained(OUT / name)


if __name__ == "__main__":
    main()
