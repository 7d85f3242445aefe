"""Drawing prompts: base model and adapter from the same noise, side by side.

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

_GRID_MARGIN = 8  # pixels between the pictures of a grid
SMALLEST_CELL, LARGEST_CELL = 192, 384  # pixels a side that a picture takes in the grid


def sample_images(
    pipeline: StableDiffusionXLPipeline, config: SamplingConfig, captions: Sequence[Prompt] = ()
) -> Iterator[tuple[Sample, Image]]:
    """Draws every prompt with every seed at every strength of the adapter that `pipeline` carries.

    The prompts of `config` come first, then the `captions` of a data set.

    A picture's noise depends on its prompt's place and its seed alone: it is the same at every strength, in
    any batch and on any device. Strength 0 leaves the adapter out and is the base model to the bit. On a GPU
    the UNet is recorded once per strength and shape.

    Raises:
        FloatingPointError: a picture has pixels that are not finite.
        ValueError: the GPU's memory does not hold a batch.
    """
    prompts = [*(Prompt(text, "free") for text in config.prompts), *captions]
    jobs = [(number, prompt, seed) for number, prompt in enumerate(prompts) for seed in config.seeds]
    for value in config.strengths:
        with adapter_strength(adapted_modules(pipeline), value), use_cuda_graph(pipeline.unet):
            for start in range(0, len(jobs), config.batch_size):
                batch = jobs[start : start + config.batch_size]
                texts = [prompt.text for _, prompt, _ in batch]
                noise = [initial_noise(pipeline, config, number, seed) for number, _, seed in batch]
                with _explain_out_of_memory(config):
                    images = generate_images(pipeline, config, texts, torch.stack(noise))
                for (number, prompt, seed), image in zip(batch, images, strict=True):
                    file = sample_file(number, seed, value)
                    yield Sample(file, prompt.text, seed, value, prompt.origin), image


@contextmanager
def _explain_out_of_memory(config: SamplingConfig) -> Iterator[None]:
    """Turns a full GPU into an error that names the key to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"sampling.batch_size is {config.batch_size}: so many pictures of {config.resolution} px do not "
            f"fit into the GPU's memory ({error}). Lower it; `make plan` says what a batch takes"
        ) from error


def sampled_captions(config: SamplingConfig, folder: Path) -> list[Prompt]:
    """The captions that `config` wants drawn, as many as there are, from the encoded data set in `folder`.

    Those whose image files have the least SHA-256: a draw of each split that other images do not change.

    Raises:
        FileNotFoundError: captions are wanted, and nothing was encoded into `folder`.
    """
    prompts: list[Prompt] = []
    wanted: list[tuple[Origin, Split, int]] = [
        ("training", "train", config.training_captions),
        ("held_out", "held_out", config.held_out_captions),
    ]
    for origin, split, count in wanted:
        if count:
            examples = sorted(EncodedDataset(folder, split).examples, key=attrgetter("id"))
            captions = dict.fromkeys(example.caption for example in examples)
            prompts += [Prompt(caption, origin) for caption in list(captions)[:count]]
    return prompts


def generation_settings(config: SamplingConfig, model: ModelConfig) -> dict[str, object]:
    """What all samples have in common, for their files: no place on this machine."""
    drawn_with = {
        "base": public_name(model.base),
        "revision": model.revision,
        "vae": None if model.vae is None else public_name(model.vae),
        "vae_revision": model.vae_revision,
    }
    of_all = {"negative_prompt", "num_inference_steps", "guidance_scale", "resolution", "precision"}
    return {**drawn_with, **config.model_dump(include=of_all)}


def load_adapter(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """Puts the saved adapter onto `pipeline` as any user of diffusers would.

    Raises:
        FileNotFoundError: nothing was saved in `folder`.
    """
    path = saved_lora(folder)  # diffusers would look for a missing file on the Hub
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=ADAPTER_NAME)
    for module in adapted_modules(pipeline):
        module.eval()  # adapters arrive in training mode


def adapted_modules(pipeline: StableDiffusionXLPipeline) -> tuple[nn.Module, ...]:
    return pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2


def initial_noise(
    pipeline: StableDiffusionXLPipeline, config: SamplingConfig, number: int, seed: int
) -> Tensor:
    """Standard normal noise of the prompt at place `number`, on the CPU, (4, H/8, W/8)."""
    side = config.resolution // pipeline.vae_scale_factor
    shape = (pipeline.unet.config.in_channels, side, side)
    return torch.randn(shape, generator=sample_generator(number, seed))


def image_grid(pictures: Sequence[tuple[Sample, Image]]) -> Image:
    """All pictures with their prompts: a row for each prompt and seed, a column for each strength.

    Rows of captions say of which images.
    """
    strengths = list(dict.fromkeys(sample.strength for sample, _ in pictures))
    rows = list(dict.fromkeys((sample.origin, sample.prompt, sample.seed) for sample, _ in pictures))
    side = min(max(pictures[0][1].width, SMALLEST_CELL), LARGEST_CELL)
    font = ImageFont.load_default(size=side // 12)
    line = side // 12 + _GRID_MARGIN
    step_x, step_y = side + _GRID_MARGIN, side + line + _GRID_MARGIN
    sheet = Images.new("RGB", (_GRID_MARGIN + step_x * len(strengths), line + step_y * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, value in enumerate(strengths):
        pen.text((_GRID_MARGIN + column * step_x, _GRID_MARGIN // 2), strength_name(value), "black", font)
    for row, (origin, prompt, seed) in enumerate(rows):
        source = "" if origin == "free" else f"{origin.replace('_', '-')}: "
        label = _shortened(f"{source}{prompt} (seed {seed})", sheet.width - 2 * _GRID_MARGIN, font)
        pen.text((_GRID_MARGIN, line + row * step_y), label, "dimgray", font)
    for sample, image in pictures:
        column, row = (
            strengths.index(sample.strength),
            rows.index((sample.origin, sample.prompt, sample.seed)),
        )
        place = (_GRID_MARGIN + column * step_x, 2 * line + row * step_y)
        sheet.paste(image.resize((side, side), Resampling.LANCZOS), place)
    return sheet


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text`, cut so that it is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
