"""Stage train_vae: images -> an autoencoder whose latents have mean 0 and deviation 1 in every channel."""

import csv
import json
import time
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL
from image_set import ImageSet, grid, load_image_set, psnr, to_unit_range
from models import IMAGE_SIZE, LATENT_SIZE, make_vae
from optimise import Budget, FlatModel, train
from torch import Tensor
from torch.nn import functional

HERE = Path(__file__).parent
OUT = HERE / "out/vae"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def main() -> None:
    params = yaml.safe_load((HERE / "params.yaml").read_text())["vae"]
    budget = Budget(**params["budget"])
    torch.manual_seed(budget.seed)
    image_set = load_image_set(HERE / "out/images")
    pixels = image_set.pixels.to(DEVICE)
    choices = image_set.where({"base", "base_other"}).to(DEVICE)
    model = FlatModel([make_vae()], DEVICE, DTYPE)
    vae = model.modules[0]
    if params["compile"] and DEVICE.type == "cuda":
        vae.encoder.compile(dynamic=False)
        vae.decoder.compile(dynamic=False)

    batch = torch.zeros(budget.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=DEVICE, dtype=torch.uint8)
    noise = torch.zeros(budget.batch_size, 4, LATENT_SIZE, LATENT_SIZE, device=DEVICE)

    def next_batch(_: int) -> None:
        batch.copy_(augment(pixels[choices[torch.randint(len(choices), (len(batch),), device=DEVICE)]]))
        noise.normal_()

    def loss() -> tuple[Tensor, Tensor, Tensor]:
        images = to_unit_range(batch).to(DTYPE).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (log_variance / 2).exp() * noise
        error = vae.decode(latents.to(DTYPE)).sample.float() - images.float()
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        total = error.abs().mean() + error.square().mean() / 2
        total = total + params["edge_weight"] * edge_loss(error) + params["kl_weight"] * kl
        return total, error.square().mean(), kl

    OUT.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (OUT / "curve.csv").open("w", newline="") as file:
        curve = csv.writer(file)
        curve.writerow(["step", "seconds", "loss", "squared_error", "kl"])
        for report in train(model, loss, next_batch, budget, params["report_every"]):
            curve.writerow([report.step, round(time.monotonic() - start, 1), *report.losses])
            file.flush()
            print("vae", report, round(time.monotonic() - start), flush=True)
    [trained] = model.export([make_vae()])
    standardise_latents(trained, pixels[choices])
    report_quality(trained, image_set)
    trained.half().save_pretrained(OUT / "model")


def augment(pixels: Tensor) -> Tensor:
    """Mirror half of the images and swap the colour channels of half, for more variety."""
    mirrored = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
    pixels = torch.where(mirrored, pixels.flip(3), pixels)
    recoloured = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
    return torch.where(recoloured, pixels[:, torch.randperm(3, device=pixels.device)], pixels)


def edge_loss(error: Tensor) -> Tensor:
    """Return the L1 norm of differences between neighbours, at full, half and quarter resolution."""
    total = error.new_zeros(())
    for scale in (1, 2, 4):
        coarse = functional.avg_pool2d(error, scale)
        total = total + (coarse[..., 1:] - coarse[..., :-1]).abs().mean()
        total = total + (coarse[..., 1:, :] - coarse[..., :-1, :]).abs().mean()
        if scale > 1:
            total = total + coarse.abs().mean()
    return total


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of the posterior of uint8 pixels, each (N, 4, h, w)."""
    posteriors = [vae.encode(to_unit_range(chunk)).latent_dist for chunk in pixels.split(64)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return images in [-1, 1], (N, 3, H, W)."""
    return torch.cat([vae.decode(chunk).sample for chunk in latents.split(64)])


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Fold a shift and a scale per latent channel into the 1x1 convolutions before and after the latents.

    Diffusion starts from standard normal noise, so every channel should have mean 0 and deviation 1 over the
    data. SDXL scales all four channels by one factor, without a shift; here `scaling_factor` becomes 1.
    """
    means, _ = encode(vae, pixels)
    shift, scale = means.mean((0, 2, 3)), means.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ shift
    after.weight *= scale.view(1, 4, 1, 1)
    before.weight[:4] /= scale.view(4, 1, 1, 1)
    before.bias[:4] = (before.bias[:4] - shift) / scale
    before.bias[4:] -= 2 * scale.log()  # the log-variance, in the new unit
    vae.register_to_config(scaling_factor=1.0)


def report_quality(vae: AutoencoderKL, image_set: ImageSet) -> None:
    """Write the PSNR of images outside the training data: held-out pairs, and an unseen style."""
    quality = {}
    rows = []
    for name, split in (("held_out", "held_out"), ("unseen_style", "evaluation")):
        pixels = image_set.pixels[image_set.where({split})].to(DEVICE)
        latents, deviations = encode(vae, pixels)
        decoded, images = decode(vae, latents), to_unit_range(pixels)
        quality[f"psnr_{name}"] = round(psnr(decoded, images).mean().item(), 2)
        quality[f"posterior_deviation_{name}"] = round(deviations.mean().item(), 4)
        rows += [images[:12], decoded[:12]]
    grid(rows, OUT / "reconstructions.png")
    (OUT / "quality.json").write_text(json.dumps(quality, indent=2))
    print("vae", quality, flush=True)


if __name__ == "__main__":
    main()
