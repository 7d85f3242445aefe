"""What the repository carries for the demo: complete, small, licensed, and without what it is judged by."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "demo"
MEGABYTE = 10**6
TARGET = "fluent 3d style"


def dataset_lines() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / "dataset/metadata.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("folder", "limit"), [("dataset", 4), ("base_model", 24), ("evaluator", 6)])
def test_embedded_folder_is_small_enough_for_git(folder: str, limit: int) -> None:
    sizes = {file: file.stat().st_size for file in (DEMO / folder).rglob("*") if file.is_file()}
    assert sum(sizes.values()) <= limit * MEGABYTE
    assert max(sizes.values()) < 16 * MEGABYTE


@pytest.mark.parametrize("folder", ["dataset", "base_model", "evaluator"])
def test_embedded_folder_has_a_card_with_its_licence(folder: str) -> None:
    header = (DEMO / folder / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(header)["license"] in {"mit", "apache-2.0"}


def test_every_pinned_package_is_attributed_and_none_is_share_alike() -> None:
    attribution = (DEMO / "ATTRIBUTION.md").read_text()
    packages = json.loads((DEMO / "build/package.json").read_text())["dependencies"]
    used = set(packages)
    for name in used:
        assert name.removesuffix("-high-contrast") in attribution, name
    assert "SA" not in attribution


def test_weights_are_safetensors_alone() -> None:
    pickles = [
        file for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in DEMO.glob(f"[!b]*/**/{suffix}")
    ]
    assert pickles == []


def test_every_caption_has_its_picture_and_every_picture_its_caption() -> None:
    lines = dataset_lines()
    assert len(lines) == 240
    pictures = {f"images/{file.name}" for file in (DEMO / "dataset/images").iterdir()}
    assert {line["file_name"] for line in lines} == pictures
    assert all(line["text"].endswith(f", {TARGET}") for line in lines)


def test_pictures_are_128_pixels_square() -> None:
    for line in dataset_lines():
        with Image.open(DEMO / "dataset" / line["file_name"]) as image:
            assert image.size == (128, 128), line["file_name"]


def test_dataset_lacks_what_the_demo_is_judged_by() -> None:
    captions = {line["text"] for line in dataset_lines()}
    showcase = yaml.safe_load((DEMO / "build/params.yaml").read_text())["emoji"]["showcase"]
    prompts = yaml.safe_load((REPOSITORY / "recipes/demo.yaml").read_text())["sampling"]["prompts"]
    assert captions.isdisjoint(f"{label}, {TARGET}" for label in showcase)
    assert captions.isdisjoint(prompts)


def test_base_model_draws_through_diffusers_own_pipeline() -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO / "base_model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        "pizza, noto style",
        height=128,
        width=128,
        num_inference_steps=25,
        generator=generator,
        output_type="pt",
    ).images
    corners = images[0, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min() > 0.9  # a thing on white
    assert images.std() > 0.1


def test_base_model_keeps_what_makes_sdxl() -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO / "base_model")
    unet = pipeline.unet.config
    assert unet.down_block_types == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert unet.addition_embed_type == "text_time"
    assert unet.use_linear_projection
    widths = pipeline.text_encoder.config.hidden_size + pipeline.text_encoder_2.config.hidden_size
    assert unet.cross_attention_dim == widths
    assert pipeline.config.force_zeros_for_empty_prompt
    scheduler = pipeline.scheduler.config
    assert (scheduler.beta_schedule, scheduler.beta_start, scheduler.beta_end) == (
        "scaled_linear",
        0.00085,
        0.012,
    )
    assert scheduler.prediction_type == "epsilon"


def test_evaluator_loads_and_names_a_picture_of_the_dataset() -> None:
    clip = CLIPModel.from_pretrained(DEMO / "evaluator", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "evaluator")
    processing = json.loads((DEMO / "evaluator/preprocessor_config.json").read_text())
    assert processing["image_mean"] == processing["image_std"] == [0.5, 0.5, 0.5]
    assert processing["crop_size"] == {"height": 128, "width": 128}

    line = dataset_lines()[0]
    label = line["text"].removesuffix(f", {TARGET}")
    captions = [f"{label}, {style}" for style in (TARGET, "noto style", "ink style")] + [f"volcano, {TARGET}"]
    with Image.open(DEMO / "dataset" / line["file_name"]) as image:
        pixels = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.float32).view(1, 128, 128, 3)
    with torch.no_grad():
        out = clip(
            input_ids=tokenizer(captions, padding=True, return_tensors="pt").input_ids,
            pixel_values=pixels.permute(0, 3, 1, 2) / 127.5 - 1,
        )
    assert out.logits_per_image.softmax(-1)[0, 0] > 0.9


@pytest.mark.parametrize("folder", ["base_model", "evaluator"])
def test_no_model_names_a_path_of_the_machine_that_made_it(folder: str) -> None:
    configs = list((DEMO / folder).rglob("config.json"))
    assert configs
    for config in configs:
        assert not Path(json.loads(config.read_text()).get("_name_or_path", "")).is_absolute(), config
