"""Stage evaluate_base: samples trained pairs, held-out pairs and an unknown style from the base model."""

import json
import random
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from emoji import TARGET_STYLE, caption
from export import assemble
from image_set import ImageSet, grid, load_image_set, to_unit_range
from splits import Pair
from torch import Tensor
from train_evaluator import score_images
from train_vae import DEVICE
from transformers import CLIPModel, CLIPTokenizer

HERE = Path(__file__).parent
OUT = HERE / "out/evaluation"


def main() -> None:
    image_set = load_image_set(HERE / "out/images")
    pipeline = assemble().to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "out/tokenizer")
    clip = CLIPModel.from_pretrained(HERE / "out/evaluator/model", dtype=torch.float32).to(DEVICE)

    OUT.mkdir(parents=True, exist_ok=True)
    scores, rows = {}, []
    for name, pairs in prompts(image_set).items():
        sampled = sample(pipeline, pairs)
        real = real_images(image_set, pairs)
        labels, styles = [label for label, _ in pairs], [style for _, style in pairs]
        scores[name] = score_images(clip, tokenizer, sampled, labels, styles)
        scores[f"{name}_real"] = score_images(clip, tokenizer, real, labels, styles)
        rows += [real[:12], sampled[:12]]
        print(name, {key: round(value, 3) for key, value in scores[name].items()}, flush=True)
    grid(rows, OUT / "samples.png")
    (OUT / "scores.json").write_text(json.dumps(scores, indent=2))


def prompts(image_set: ImageSet) -> dict[str, list[Pair]]:
    """Return trained pairs, shaded copies, held-out pairs, and the target style of evaluation labels."""
    rng = random.Random(0)

    def pairs(split: str, shaded: bool, count: int) -> list[Pair]:
        indices = image_set.where({split}, shaded=shaded).tolist()
        chosen: dict[str, Pair] = {}  # one image per label, so that retrieval has one right answer
        for index in rng.sample(indices, len(indices)):
            chosen.setdefault(image_set.labels[index], (image_set.labels[index], image_set.styles[index]))
        return list(chosen.values())[:count]

    return {
        "seen": pairs("base", False, 96),
        "seen_shaded": pairs("base", True, 24),
        "held_out": pairs("held_out", False, 60),
        "target": pairs("evaluation", False, 48),
    }


@torch.no_grad()
def sample(pipeline: StableDiffusionXLPipeline, pairs: list[Pair]) -> Tensor:
    """Generate one image per pair, in [-1, 1], (N, 3, H, W); 25 Euler steps at guidance 5."""
    images = []
    for start in range(0, len(pairs), 48):
        chunk = pairs[start : start + 48]
        noise = [torch.Generator().manual_seed(start + index) for index in range(len(chunk))]
        texts = [caption(label, style) for label, style in chunk]
        out = pipeline(
            texts,
            height=128,
            width=128,
            num_inference_steps=25,
            guidance_scale=5.0,
            generator=noise,
            output_type="pt",
        )
        images.append(out.images.float() * 2 - 1)
    return torch.cat(images)


def real_images(image_set: ImageSet, pairs: list[Pair]) -> Tensor:
    at = {pair: index for index, pair in enumerate(zip(image_set.labels, image_set.styles, strict=True))}
    missing = [pair for pair in pairs if pair not in at]
    assert not missing, f"there are no images of {missing} in {TARGET_STYLE} or another style"
    return to_unit_range(image_set.pixels[[at[pair] for pair in pairs]]).to(DEVICE)


if __name__ == "__main__":
    main()
