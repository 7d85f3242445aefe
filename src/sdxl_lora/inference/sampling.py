"""Sampling of prompts by base model and adapter from the same noise.

One pipeline serves every strength of the adapter: there is never a second copy of the base model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image as Images
from PIL import ImageDraw, ImageFont
from PIL.Image import Image, Resampling
from torch import Tensor, nn

from sdxl_lora.adapters.lora import ADAPTER_NAME, adapter_strength
from sdxl_lora.adapters.lora_file import saved_lora
from sdxl_lora.config import ModelConfig, SamplingConfig
from sdxl_lora.data.encoded_dataset import EncodedDataset, Split
from sdxl_lora.inference.pipeline import generate_images, use_cuda_graph
from sdxl_lora.inference.samples import Origin, Prompt, Sample, sample_file, sample_generator, strength_name
from sdxl_lora.storage.repository import public_name

_GRID_MARGIN = 8  # pixels between the images of a grid
SMALLEST_CELL, LARGEST_CELL = 192, 384  # side of an image in the grid, pixels


def sample_images(
    pipeline: StableDiffusionXLPipeline, config: SamplingConfig, captions: Sequence[Prompt] = ()
) -> Iterator[tuple[Sample, Image]]:
    """Generate every prompt with every seed at every strength of the adapter loaded into `pipeline`.

    The prompts of `config` come first, then the `captions` of a data set.

    An image's noise depends only on its prompt's number and its seed: it is the same at every strength, in
    any batch and on any device. Strength 0 is bit-identical to the base model. On a GPU a CUDA graph of the
    UNet is captured once per strength and shape.

    Raises:
        FloatingPointError: an image has pixels that are not finite.
        ValueError: the GPU's memory does not hold a batch.
    """
    prompts = [*(Prompt(text, "free") for text in config.prompts), *captions]
    jobs = [(number, prompt, seed) for number, prompt in enumerate(prompts) for seed in config.seeds]
    for strength in config.strengths:
        # The strength has to be set first: the graph captures it, and is deleted with the block.
        with adapter_strength(adapted_modules(pipeline), strength), use_cuda_graph(pipeline.unet):
            for start in range(0, len(jobs), config.batch_size):
                batch = jobs[start : start + config.batch_size]
                texts = [prompt.text for _, prompt, _ in batch]
                noise = [initial_noise(pipeline, config, number, seed) for number, _, seed in batch]
                with _explain_out_of_memory(config):
                    images = generate_images(pipeline, config, texts, torch.stack(noise))
                for (number, prompt, seed), image in zip(batch, images, strict=True):
                    file = sample_file(number, seed, strength)
                    yield Sample(file, prompt.text, seed, strength, prompt.origin), image


@contextmanager
def _explain_out_of_memory(config: SamplingConfig) -> Iterator[None]:
    """Replace an out-of-memory error by one that names the key to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"sampling.batch_size is {config.batch_size}: that many images of {config.resolution} px do not "
            f"fit into the GPU's memory ({error}). Lower it; `make plan` forecasts what a batch needs"
        ) from error


def sampled_captions(config: SamplingConfig, folder: Path) -> list[Prompt]:
    """Choose the captions to sample from the encoded data set in `folder`: up to the numbers in `config`.

    Takes the images with the smallest SHA-256: a random choice that mostly stays when images are added.

    Raises:
        FileNotFoundError: captions are asked for, and nothing was encoded into `folder`.
    """
    prompts: list[Prompt] = []
    choices: list[tuple[Origin, Split, int]] = [
        ("training", "train", config.training_captions),
        ("held_out", "held_out", config.held_out_captions),
    ]
    for origin, split, count in choices:
        if count:
            examples = sorted(EncodedDataset(folder, split).examples, key=attrgetter("id"))
            captions = dict.fromkeys(example.caption for example in examples)
            prompts += [Prompt(caption, origin) for caption in list(captions)[:count]]
    return prompts


def generation_settings(config: SamplingConfig, model: ModelConfig) -> dict[str, object]:
    """Return the settings that all samples share, for their files; local paths become public names."""
    models = {
        "base": public_name(model.base),
        "revision": model.revision,
        "vae": None if model.vae is None else public_name(model.vae),
        "vae_revision": model.vae_revision,
    }
    shared = {"negative_prompt", "num_inference_steps", "guidance_scale", "resolution", "precision"}
    return {**models, **config.model_dump(include=shared)}


def load_adapter(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """Load the saved adapter into `pipeline` with diffusers' public function, as its users do.

    Raises:
        FileNotFoundError: nothing was saved in `folder`.
    """
    path = saved_lora(folder)  # fails first: diffusers would look for a missing file on the Hub
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=ADAPTER_NAME)
    for module in adapted_modules(pipeline):
        module.eval()  # PEFT adds adapters in training mode, in which their dropout is active


def adapted_modules(pipeline: StableDiffusionXLPipeline) -> tuple[nn.Module, ...]:
    return pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2


def initial_noise(
    pipeline: StableDiffusionXLPipeline, config: SamplingConfig, number: int, seed: int
) -> Tensor:
    """Draw the standard normal initial noise of prompt `number`, on the CPU, (4, H/8, W/8)."""
    side = config.resolution // pipeline.vae_scale_factor
    shape = (pipeline.unet.config.in_channels, side, side)
    return torch.randn(shape, generator=sample_generator(number, seed))


def image_grid(samples: Sequence[tuple[Sample, Image]]) -> Image:
    """Return one image of all samples: a row for each prompt and seed, a column for each strength.

    The label of a row is the prompt; before a caption it names the split of its image.
    """
    strengths = list(dict.fromkeys(sample.strength for sample, _ in samples))
    rows = list(dict.fromkeys((sample.origin, sample.prompt, sample.seed) for sample, _ in samples))
    side = min(max(samples[0][1].width, SMALLEST_CELL), LARGEST_CELL)
    font = ImageFont.load_default(size=side // 12)
    line = side // 12 + _GRID_MARGIN
    step_x, step_y = side + _GRID_MARGIN, side + line + _GRID_MARGIN
    sheet = Images.new("RGB", (_GRID_MARGIN + step_x * len(strengths), line + step_y * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, strength in enumerate(strengths):
        pen.text((_GRID_MARGIN + column * step_x, _GRID_MARGIN // 2), strength_name(strength), "black", font)
    for row, (origin, prompt, seed) in enumerate(rows):
        source = "" if origin == "free" else f"{origin.replace('_', '-')}: "
        label = _shortened(f"{source}{prompt} (seed {seed})", sheet.width - 2 * _GRID_MARGIN, font)
        pen.text((_GRID_MARGIN, line + row * step_y), label, "dimgray", font)
    for sample, image in samples:
        column, row = (
            strengths.index(sample.strength),
            rows.index((sample.origin, sample.prompt, sample.seed)),
        )
        place = (_GRID_MARGIN + column * step_x, 2 * line + row * step_y)
        sheet.paste(image.resize((side, side), Resampling.LANCZOS), place)
    return sheet


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut `text` so that it is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
