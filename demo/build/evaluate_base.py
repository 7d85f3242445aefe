"""Stage evaluate_base: draws what the base model was trained on, what it was not, and an unknown style."""

import json
import random
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from emoji import TARGET_STYLE, caption
from export import assemble
from pictures import Pictures, grid, load_pictures, to_unit_range
from splits import Pair
from torch import Tensor
from train_evaluator import judge
from train_vae import DEVICE
from transformers import CLIPModel, CLIPTokenizer

HERE = Path(__file__).parent
OUT = HERE / "out/evaluation"


def main() -> None:
    pictures = load_pictures(HERE / "out/pictures")
    pipeline = assemble().to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "out/tokenizer")
    clip = CLIPModel.from_pretrained(HERE / "out/evaluator/model", dtype=torch.float32).to(DEVICE)

    OUT.mkdir(parents=True, exist_ok=True)
    scores, rows = {}, []
    for name, pairs in prompts(pictures).items():
        drawn = sample(pipeline, pairs)
        real = real_pictures(pictures, pairs)
        labels, styles = [label for label, _ in pairs], [style for _, style in pairs]
        scores[name] = judge(clip, tokenizer, drawn, labels, styles)
        scores[f"{name}_real"] = judge(clip, tokenizer, real, labels, styles)
        rows += [real[:12], drawn[:12]]
        print(name, {key: round(value, 3) for key, value in scores[name].items()}, flush=True)
    grid(rows, OUT / "samples.png")
    (OUT / "scores.json").write_text(json.dumps(scores, indent=2))


def prompts(pictures: Pictures) -> dict[str, list[Pair]]:
    """Seen pairs, lit twins, pairs held out of training, and the target style on the evaluation labels."""
    draw = random.Random(0)

    def pairs(split: str, shaded: bool, count: int) -> list[Pair]:
        indices = pictures.where({split}, shaded=shaded).tolist()
        chosen: dict[str, Pair] = {}  # one picture a label, so that retrieval has one right answer
        for index in draw.sample(indices, len(indices)):
            chosen.setdefault(pictures.labels[index], (pictures.labels[index], pictures.styles[index]))
        return list(chosen.values())[:count]

    return {
        "seen": pairs("base", False, 96),
        "seen_shaded": pairs("base", True, 24),
        "held_out": pairs("held_out", False, 60),
        "target": pairs("evaluation", False, 48),
    }


@torch.no_grad()
def sample(pipeline: StableDiffusionXLPipeline, pairs: list[Pair]) -> Tensor:
    """One image each, in [-1, 1], (N, 3, H, W); 25 Euler steps at guidance 5."""
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


def real_pictures(pictures: Pictures, pairs: list[Pair]) -> Tensor:
    at = {pair: index for index, pair in enumerate(zip(pictures.labels, pictures.styles, strict=True))}
    missing = [pair for pair in pairs if pair not in at]
    assert not missing, f"no picture of {missing} in {TARGET_STYLE} or another style"
    return to_unit_range(pictures.pixels[[at[pair] for pair in pairs]]).to(DEVICE)


if __name__ == "__main__":
    main()
