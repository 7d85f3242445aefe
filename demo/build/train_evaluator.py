"""Stage train_evaluator: images -> a small CLIP model that scores content and style.

It is trained on every split except `evaluation` and `held_out`, whose real images it scores.
"""

import csv
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL
from emoji import BASE_STYLES, SHADED_STYLES, TARGET_STYLE, caption
from image_set import ImageSet, load_image_set, to_unit_range
from models import IMAGE_SIZE, make_evaluator
from optimise import Budget, FlatModel, train
from torch import Tensor
from torch.nn import functional
from train_vae import DEVICE, DTYPE, decode, encode
from transformers import CLIPModel, CLIPTokenizer

HERE = Path(__file__).parent
OUT = HERE / "out/evaluator"
STYLES = [
    *(icons.style for icons in BASE_STYLES),
    *(f"shaded {style}" for style in SHADED_STYLES),
    TARGET_STYLE,
]


def main() -> None:
    params = yaml.safe_load((HERE / "params.yaml").read_text())["evaluator"]
    budget = Budget(**params["budget"])
    torch.manual_seed(budget.seed)
    image_set = load_image_set(HERE / "out/images")
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "out/tokenizer")
    vae = AutoencoderKL.from_pretrained(HERE / "out/vae/model").to(DEVICE).eval().requires_grad_(False)
    originals = image_set.pixels.to(DEVICE)
    versions = torch.stack([originals, reconstruct(vae, originals)])
    token_ids = tokenize(tokenizer, image_set.captions()).to(DEVICE)
    groups = by_label(
        image_set, {"base", "base_other", "finetune", "target_other"}, params["styles_per_label"]
    ).to(DEVICE)
    model = FlatModel([make_evaluator(tokenizer)], DEVICE, DTYPE)
    clip = model.modules[0]

    batch = torch.zeros(budget.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=DEVICE)
    batch_ids = token_ids[:1].repeat(budget.batch_size, 1)
    diagonal = torch.arange(budget.batch_size, device=DEVICE)
    num_labels = budget.batch_size // params["styles_per_label"]

    def next_batch(_: int) -> None:
        rows = groups[torch.randperm(len(groups), device=DEVICE)[:num_labels]]
        order = torch.rand(rows.shape, device=DEVICE).argsort(1)[:, : params["styles_per_label"]]
        indices = rows.gather(1, order).flatten()
        seen_through_vae = (torch.rand(len(indices), device=DEVICE) < params["reconstructed"]).long()
        batch.copy_(augment(to_unit_range(versions[seen_through_vae, indices]), params))
        batch_ids.copy_(token_ids[indices])

    def loss() -> tuple[Tensor, Tensor]:
        out = clip(input_ids=batch_ids, pixel_values=batch.to(DTYPE))
        scale = clip.logit_scale.float().clamp(max=4.6).exp()  # at most 100, as CLIP
        logits = scale * out.image_embeds.float() @ out.text_embeds.float().t()
        caption_loss = functional.cross_entropy(logits, diagonal)
        image_loss = functional.cross_entropy(logits.t(), diagonal)
        total = (caption_loss + image_loss) / 2
        return total, (logits.argmax(1) == diagonal).float().mean()

    OUT.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (OUT / "curve.csv").open("w", newline="") as file:
        curve = csv.writer(file)
        curve.writerow(["step", "seconds", "loss", "batch_accuracy"])
        for report in train(model, loss, next_batch, budget, params["report_every"]):
            curve.writerow([report.step, round(time.monotonic() - start, 1), *report.losses])
            file.flush()
            print("evaluator", report, round(time.monotonic() - start), flush=True)
    [trained] = model.export([make_evaluator(tokenizer)])
    trained.logit_scale.clamp_(max=4.6)
    report_quality(trained, tokenizer, vae, image_set)
    trained.half().save_pretrained(OUT / "model")
    tokenizer.save_pretrained(OUT / "model")
    (OUT / "model/preprocessor_config.json").write_text(json.dumps(PREPROCESSING, indent=2) + "\n")


# Input of the evaluator: 128 pixels, in [-1, 1].
PREPROCESSING = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": IMAGE_SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_convert_rgb": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def augment(images: Tensor, params: dict[str, Any]) -> Tensor:
    """Return images in [-1, 1], (B, 3, H, W), each randomly moved, zoomed, turned, tinted and made noisy.

    Images are not mirrored, because arrows point left or right. Without augmentation, the model memorizes
    a few thousand images.
    """
    count, device = len(images), images.device

    def between(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, device=device) * (high - low) + low

    zoom = 1 / between(1 - params["zoom"], 1 + params["zoom"])
    angle = between(-params["turn"], params["turn"]) * (torch.pi / 180)
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    move = between(-params["move"], params["move"], 2) * 2
    affine = torch.stack([cosine, -sine, move[:, 0], sine, cosine, move[:, 1]], 1).view(-1, 2, 3)
    positions = functional.affine_grid(affine, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images - 1, positions, align_corners=False) + 1  # outside is white
    tinted = (moved + 1) * between(1 - params["tint"], 1 + params["tint"], 3, 1, 1) - 1
    noise = torch.randn_like(tinted) * between(0, params["noise"], 1, 1, 1)
    return (tinted + noise).clamp(-1, 1)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Return token ids, int64, (B, 77)."""
    return tokenizer(
        texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids


def reconstruct(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Return images after encoding and decoding by the VAE, uint8."""
    decoded = [decode(vae, encode(vae, chunk)[0]) for chunk in pixels.split(1024)]
    return torch.cat([((images.clamp(-1, 1) + 1) * 127.5).round().byte() for images in decoded])


def by_label(image_set: ImageSet, splits: set[str], at_least: int) -> Tensor:
    """Return the indices of images per label with `at_least` images, (labels, most images per label).

    Shorter rows repeat their images.
    """
    groups: dict[str, list[int]] = {}
    for index in image_set.where(splits).tolist():
        groups.setdefault(image_set.labels[index], []).append(index)
    longest = max(map(len, groups.values()))
    rows = [(group * longest)[:longest] for group in groups.values() if len(group) >= at_least]
    return torch.tensor(rows)


@torch.no_grad()
def score_images(
    clip: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor, labels: list[str], styles: list[str]
) -> dict[str, float]:
    """Return scores of how well images match their labels and styles.

    Args:
        images: in [-1, 1], (N, 3, H, W).
        labels, styles: those of each image's prompt.

    Returns:
        `style_probability` and `style_accuracy`: of the right style among all, for the given label.
        `retrieval`: share of images whose caption is the nearest of the N. `content_retrieval`: the same with
        all captions in the image's style, so that only the label can be wrong.
    """
    device = clip.device
    image_embeds = clip(
        input_ids=tokenize(tokenizer, ["a"]).to(device), pixel_values=images.to(device)
    ).image_embeds

    def text_embeds(texts: list[str]) -> Tensor:
        return clip(
            input_ids=tokenize(tokenizer, texts).to(device), pixel_values=images[:1].to(device)
        ).text_embeds

    scale = clip.logit_scale.exp()
    of_styles = torch.stack([text_embeds([caption(label, style) for label in labels]) for style in STYLES], 1)
    probabilities = (scale * (image_embeds[:, None] * of_styles).sum(-1)).softmax(-1)  # (N, styles)
    wanted = torch.tensor([STYLES.index(style) for style in styles], device=device)
    order = torch.arange(len(labels), device=device)
    own_style = of_styles[:, wanted]  # caption j in the style of image i: (j, i)
    content = torch.einsum("id,jid->ij", image_embeds, own_style)
    caption_embeds = of_styles[order, wanted]
    return {
        "style_probability": probabilities[order, wanted].mean().item(),
        "style_accuracy": (probabilities.argmax(1) == wanted).float().mean().item(),
        "retrieval": ((image_embeds @ caption_embeds.t()).argmax(1) == order).float().mean().item(),
        "content_retrieval": (content.argmax(1) == order).float().mean().item(),
    }


def report_quality(
    clip: CLIPModel, tokenizer: CLIPTokenizer, vae: AutoencoderKL, image_set: ImageSet
) -> None:
    """Write the scores of real images outside the training data, before and after the VAE."""
    quality = {}
    for split in ("evaluation", "held_out"):
        indices = image_set.where({split}, shaded=False)
        pixels = image_set.pixels[indices].to(DEVICE)
        labels = [image_set.labels[index] for index in indices]
        styles = [image_set.styles[index] for index in indices]
        for version, seen in (("real", pixels), ("through_vae", reconstruct(vae, pixels))):
            scores = score_images(clip, tokenizer, to_unit_range(seen), labels, styles)
            quality[f"{split}_{version}"] = {name: round(value, 4) for name, value in scores.items()}
    (OUT / "quality.json").write_text(json.dumps(quality, indent=2))
    print("evaluator", json.dumps(quality, indent=2), flush=True)


if __name__ == "__main__":
    main()
