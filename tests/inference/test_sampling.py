import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image as Images
from PIL.Image import Image
from safetensors.torch import save_file

from sdxl_lora.adapters.lora_file import WEIGHTS_FILE
from sdxl_lora.config import Params, SamplingConfig, load_params
from sdxl_lora.data.encoded_dataset import Example, Split
from sdxl_lora.data.shard_writer import write_index
from sdxl_lora.inference.samples import Prompt, Sample, load_table, save_sample, save_table, strength_name
from sdxl_lora.inference.sampling import (
    generation_settings,
    image_grid,
    initial_noise,
    load_adapter,
    sample_images,
    sampled_captions,
)
from sdxl_lora.models.sdxl import load_pipeline
from sdxl_lora.runtime.rng import keyed_generator
from tests.support.adapters import write_adapter

CPU = torch.device("cpu")
PROMPTS = ["red apple, fluent 3d style", "pizza, noto style"]


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(Path("recipes/demo.yaml"))


@pytest.fixture(scope="module")
def pipeline(params: Params, tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionXLPipeline:
    """With adapters on UNet and text encoders."""
    folder = tmp_path_factory.mktemp("lora")
    write_adapter(folder, params.model.model_copy(update={"text_encoders": "trained"}), params.lora)
    pipeline = load_pipeline(params.model, "fp32", CPU)
    load_adapter(pipeline, folder)
    return pipeline


@pytest.fixture(scope="module")
def config(params: Params) -> SamplingConfig:
    changes = {
        "prompts": PROMPTS,
        "seeds": [0, 5],
        "strengths": [0.0, 0.5, 1.0],
        "resolution": 64,
        "num_inference_steps": 3,
        "batch_size": 1,
    }
    return params.sampling.model_copy(update=changes)


@pytest.fixture(scope="module")
def generated(pipeline: StableDiffusionXLPipeline, config: SamplingConfig) -> list[tuple[Sample, Image]]:
    return list(sample_images(pipeline, config))


def at(generated: list[tuple[Sample, Image]], value: float) -> list[Image]:
    return [image for sample, image in generated if sample.strength == value]


def by_diffusers(pipeline: StableDiffusionXLPipeline, config: SamplingConfig) -> list[Image]:
    """The same images by diffusers alone."""
    return [
        pipeline(
            prompt,
            negative_prompt=config.negative_prompt,
            latents=initial_noise(pipeline, config, number, seed)[None],
            height=config.resolution,
            width=config.resolution,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        ).images[0]
        for number, prompt in enumerate(config.prompts)
        for seed in config.seeds
    ]


def difference(first: Image, second: Image) -> int:
    """Largest difference of any pixel."""
    pairs = zip(first.tobytes(), second.tobytes(), strict=True)
    return max(abs(a - b) for a, b in pairs)


def test_every_prompt_seed_and_strength_is_sampled_once(
    generated: list[tuple[Sample, Image]], config: SamplingConfig
) -> None:
    sampled = [(sample.prompt, sample.seed, sample.strength) for sample, _ in generated]
    assert sorted(sampled) == sorted((p, s, v) for p in PROMPTS for s in [0, 5] for v in [0.0, 0.5, 1.0])
    assert len({sample.file for sample, _ in generated}) == 12
    assert {image.size for _, image in generated} == {(config.resolution, config.resolution)}


def test_strength_one_is_what_diffusers_draws_with_the_adapter(
    pipeline: StableDiffusionXLPipeline, generated: list[tuple[Sample, Image]], config: SamplingConfig
) -> None:
    expected = by_diffusers(pipeline, config)
    assert [a.tobytes() for a in at(generated, 1.0)] == [b.tobytes() for b in expected]


def test_strength_zero_is_the_base_model_to_the_bit(
    params: Params, generated: list[tuple[Sample, Image]], config: SamplingConfig
) -> None:
    expected = by_diffusers(load_pipeline(params.model, "fp32", CPU), config)
    assert [a.tobytes() for a in at(generated, 0.0)] == [b.tobytes() for b in expected]


def test_half_strength_is_what_diffusers_draws_with_half_the_weight(
    pipeline: StableDiffusionXLPipeline, generated: list[tuple[Sample, Image]], config: SamplingConfig
) -> None:
    name = pipeline.get_active_adapters()[0]
    pipeline.set_adapters(name, 0.5)
    expected = by_diffusers(pipeline, config)
    pipeline.set_adapters(name, 1.0)
    assert [a.tobytes() for a in at(generated, 0.5)] == [b.tobytes() for b in expected]


def test_each_strength_gives_another_image(generated: list[tuple[Sample, Image]]) -> None:
    for base, half, whole in zip(*(at(generated, value) for value in (0.0, 0.5, 1.0)), strict=True):
        assert difference(base, half) > 8
        assert difference(half, whole) > 8


def test_batch_size_changes_nothing_but_rounding(
    pipeline: StableDiffusionXLPipeline, generated: list[tuple[Sample, Image]], config: SamplingConfig
) -> None:
    batched = config.model_copy(update={"batch_size": 3, "strengths": [1.0]})
    images = [image for _, image in sample_images(pipeline, batched)]
    assert all(difference(a, b) <= 2 for a, b in zip(images, at(generated, 1.0), strict=True))


def test_adapter_is_as_before_when_sampling_is_left_half_way(
    pipeline: StableDiffusionXLPipeline, generated: list[tuple[Sample, Image]], config: SamplingConfig
) -> None:
    iterator = sample_images(pipeline, config.model_copy(update={"strengths": [0.0]}))
    next(iter(iterator))
    iterator.close()  # type: ignore[attr-defined]
    again = next(iter(sample_images(pipeline, config.model_copy(update={"strengths": [1.0]}))))[1]
    assert again.tobytes() == at(generated, 1.0)[0].tobytes()


def test_captions_are_sampled_after_the_prompts_and_say_where_they_come_from(
    pipeline: StableDiffusionXLPipeline, generated: list[tuple[Sample, Image]], config: SamplingConfig
) -> None:
    short = config.model_copy(update={"seeds": [5], "strengths": [1.0]})
    captions = [Prompt("pizza, noto style", "training"), Prompt("a lamp", "held_out")]
    sampled = list(sample_images(pipeline, short, captions))
    assert [(sample.prompt, sample.origin) for sample, _ in sampled] == [
        *((prompt, "free") for prompt in PROMPTS),
        ("pizza, noto style", "training"),
        ("a lamp", "held_out"),
    ]
    assert len({sample.file for sample, _ in sampled}) == 4
    known = {(s.prompt, s.seed, s.strength): image.tobytes() for s, image in generated}
    assert [image.tobytes() for _, image in sampled[:2]] == [known[prompt, 5, 1.0] for prompt in PROMPTS]
    assert sampled[2][1].tobytes() != sampled[1][1].tobytes()  # the same words, from noise of their own


def write_index_of(folder: Path, captions: Mapping[str, tuple[str, Split]]) -> None:
    """An index of examples that are never read: captions and splits by id."""
    folder.mkdir(exist_ok=True)
    save_file({"latents_mean": torch.zeros(1)}, folder / "shard")
    rows = [Example(id, f"{id}.png", caption, split, "shard", 0) for id, (caption, split) in captions.items()]
    write_index(folder, rows)


def test_captions_are_chosen_by_content_and_each_once(config: SamplingConfig, tmp_path: Path) -> None:
    captions: dict[str, tuple[str, Split]] = {
        "d": ("last", "train"),
        "b": ("first", "train"),
        "c": ("first", "train"),
        "a": ("unseen", "held_out"),
    }
    write_index_of(tmp_path, captions)
    asked = config.model_copy(update={"training_captions": 2, "held_out_captions": 5})
    chosen = sampled_captions(asked, tmp_path)
    assert chosen == [Prompt("first", "training"), Prompt("last", "training"), Prompt("unseen", "held_out")]
    one = asked.model_copy(update={"training_captions": 1, "held_out_captions": 0})
    assert sampled_captions(one, tmp_path) == chosen[:1]
    write_index_of(tmp_path, {**captions, "e": ("another", "train")})
    assert sampled_captions(asked, tmp_path) == chosen


def test_captions_that_nobody_wants_need_no_data_set(config: SamplingConfig, tmp_path: Path) -> None:
    none = config.model_copy(update={"training_captions": 0, "held_out_captions": 0})
    assert sampled_captions(none, tmp_path / "missing") == []


def test_noise_depends_on_prompt_place_and_seed_alone(
    pipeline: StableDiffusionXLPipeline, config: SamplingConfig
) -> None:
    noise = initial_noise(pipeline, config, 0, 0)
    torch.manual_seed(99)
    assert torch.equal(noise, initial_noise(pipeline, config, 0, 0))
    assert not torch.equal(noise, initial_noise(pipeline, config, 1, 0))
    assert not torch.equal(noise, initial_noise(pipeline, config, 0, 1))


def test_adapter_of_the_unet_alone_is_sampled_too(
    params: Params, config: SamplingConfig, tmp_path: Path
) -> None:
    write_adapter(tmp_path, params.model, params.lora)
    pipeline = load_pipeline(params.model, "fp32", CPU)
    load_adapter(pipeline, tmp_path)
    short = config.model_copy(update={"prompts": PROMPTS[:1], "seeds": [0], "strengths": [0.0, 1.0]})
    (_, base), (_, adapted) = sample_images(pipeline, short)
    assert difference(base, adapted) > 8
    assert adapted.tobytes() == by_diffusers(pipeline, short)[0].tobytes()


def test_dropout_is_off_when_drawing(pipeline: StableDiffusionXLPipeline) -> None:
    modules = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    assert not any(layer.training for module in modules for layer in module.modules())


def test_missing_adapter_names_the_stage_to_run(pipeline: StableDiffusionXLPipeline, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dvc repro train_lora"):
        load_adapter(pipeline, tmp_path)


def test_image_that_is_not_finite_is_refused(
    pipeline: StableDiffusionXLPipeline, config: SamplingConfig
) -> None:
    bias = pipeline.vae.decoder.conv_out.bias
    before = bias.data.clone()
    bias.data.fill_(float("nan"))
    try:
        with pytest.raises(FloatingPointError, match=r"'red apple.*sampling\.precision"):
            next(iter(sample_images(pipeline, config)))
    finally:
        bias.data.copy_(before)


def test_full_gpu_names_the_key_to_lower(
    pipeline: StableDiffusionXLPipeline, config: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline.vae, "decode", fail)
    with pytest.raises(ValueError, match=r"sampling\.batch_size is 1.*64 px.*CUDA out of memory.*make plan"):
        next(iter(sample_images(pipeline, config)))


def test_png_says_what_it_was_generated_from(tmp_path: Path, params: Params, config: SamplingConfig) -> None:
    sample = Sample("strength-0.5/07-seed-3.png", "naïve 寿司", 3, 0.5)
    model = params.model.model_copy(update={"base": str(Path("demo/base_model").resolve())})
    settings = generation_settings(config, model)
    save_sample(tmp_path, sample, Images.new("RGB", (8, 8), "red"), settings)
    with Images.open(tmp_path / sample.file) as image:
        settings = json.loads(image.info["parameters"])
    assert settings["prompt"] == "naïve 寿司"
    assert settings["strength"] == 0.5
    assert settings["num_inference_steps"] == config.num_inference_steps
    assert settings["noise_seed"] == keyed_generator("sample", 7, 3).initial_seed()
    assert settings["revision"] == params.model.revision
    assert str(Path.cwd()) not in str(settings)


REDRAW = """
import json, sys, torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

said = json.loads(Image.open("sample.png").info["parameters"])
pipeline = StableDiffusionXLPipeline.from_pretrained("base", dtype=torch.float32)
pipeline.load_lora_weights(".", weight_name="adapter.safetensors", adapter_name="a")
pipeline.set_adapters("a", said["strength"])
side = said["resolution"]
generator = torch.Generator().manual_seed(said["noise_seed"])
noise = torch.randn(1, 4, side // 8, side // 8, generator=generator)
options = {name: said[name] for name in ("negative_prompt", "num_inference_steps", "guidance_scale")}
pipeline(said["prompt"], latents=noise, height=side, width=side, **options).images[0].save("again.png")
assert not any(name.startswith("sdxl_lora") for name in sys.modules)
"""


def test_sample_is_reproduced_elsewhere_from_its_png_the_adapter_and_the_base_model(
    params: Params, config: SamplingConfig, tmp_path: Path
) -> None:
    """Within 2 of 255 levels, by diffusers alone, in a folder and an environment with nothing else."""
    write_adapter(tmp_path, params.model, params.lora)
    pipeline = load_pipeline(params.model, "fp32", CPU)
    load_adapter(pipeline, tmp_path)
    sampled = [pair for pair in sample_images(pipeline, config) if pair[0].strength == 0.5][-1]
    save_sample(tmp_path, *sampled, generation_settings(config, params.model))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(params.model.base, elsewhere / "base")
    shutil.copy(tmp_path / WEIGHTS_FILE, elsewhere / "adapter.safetensors")
    shutil.copy(tmp_path / sampled[0].file, elsewhere / "sample.png")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(elsewhere / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-I", "-c", REDRAW], cwd=elsewhere, env=environment, check=True)
    with Images.open(elsewhere / "again.png") as image:
        assert difference(image, sampled[1]) <= 2


def test_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    samples = [Sample("a.png", "naïve 寿司", 3, 0.5), Sample("b.png", 'a "quoted" prompt', 0, 1.0)]
    save_table(tmp_path / "samples.jsonl", samples)
    assert load_table(tmp_path / "samples.jsonl") == samples


def test_missing_table_names_the_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dvc repro sample_images"):
        load_table(tmp_path / "samples.jsonl")


@pytest.mark.parametrize("side", [128, 1024])
def test_grid_has_a_row_a_prompt_and_seed_and_a_column_a_strength(side: int) -> None:
    colours = {("a", 0, 0.0): "red", ("a", 0, 1.0): "lime", ("a", 1, 0.0): "blue", ("a", 1, 1.0): "yellow"}
    generated = [
        (Sample("x.png", prompt, seed, value), Images.new("RGB", (side, side), colour))
        for (prompt, seed, value), colour in colours.items()
    ]
    sheet = image_grid(generated)
    cell = {128: 192, 1024: 384}[side]
    found = {
        colour: sheet.getpixel((x, y))
        for colour, (x, y) in {
            "red": (cell // 2, cell),
            "lime": (cell // 2 + cell, cell),
            "blue": (cell // 2, 2 * cell),
            "yellow": (cell // 2 + cell, 2 * cell),
        }.items()
    }
    assert found == {
        "red": (255, 0, 0),
        "lime": (0, 255, 0),
        "blue": (0, 0, 255),
        "yellow": (255, 255, 0),
    }


def test_equal_words_of_two_origins_have_a_row_each() -> None:
    image = Images.new("RGB", (64, 64), "red")
    free = Sample("0.png", "pizza", 0, 1.0)
    alone, both = (
        image_grid([(s, image) for s in rows]) for rows in ([free], [free, replace(free, origin="training")])
    )
    assert both.height > 1.7 * alone.height


@pytest.mark.parametrize(("value", "name"), [(0.0, "base"), (0.5, "strength 0.5"), (1.0, "adapter")])
def test_columns_are_named_for_people(value: float, name: str) -> None:
    assert strength_name(value) == name
