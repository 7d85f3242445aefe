"""Samples on disk: image files and a table of their prompts, seeds and strengths.

Sampling writes them, evaluation and reports read them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from sdxl_lora.storage.atomic_io import atomic_write, write_text

if TYPE_CHECKING:
    from torch import Generator

Origin = Literal["free", "training", "held_out"]
"""Where a prompt comes from: params, the caption of a training image, or that of a held-out one."""

ORIGINS: dict[Origin, str] = {
    "free": "free prompts",
    "training": "captions of training images",
    "held_out": "captions of held-out images",
}
"""Their names in reports."""


@dataclass(frozen=True)
class Prompt:
    """A text to sample from."""

    text: str
    origin: Origin


@dataclass(frozen=True)
class Sample:
    """The inputs that one image was generated from; a line of the table."""

    file: str
    """Path below the folder of samples."""
    prompt: str
    seed: int
    strength: float
    """Factor of the adapter's update: 0 is the base model."""
    origin: Origin = "free"
    """Origin of the prompt."""


def strength_name(value: float) -> str:
    """Return a strength's name in reports: 0 is the base model, 1 the adapter as trained."""
    return {0.0: "base", 1.0: "adapter"}.get(value, f"strength {value:g}")


def strength_key(value: float) -> str:
    """Return a strength's key in metrics.json: its name without spaces."""
    return strength_name(value).replace(" ", "_")


def sample_file(number: int, seed: int, strength: float) -> str:
    """Return the path, below the folder of samples, of the image of prompt `number`."""
    return f"strength-{strength:g}/{number:02d}-seed-{seed}.png"


def _prompt_number(file: str) -> int:
    """Return the prompt's number in a path that `sample_file` returned."""
    return int(Path(file).name.split("-")[0])


def sample_generator(number: int, seed: int) -> "Generator":
    """Return the generator of the initial noise for prompt `number`."""
    from sdxl_lora.runtime.rng import keyed_generator  # loads torch, which the table does not need

    return keyed_generator("sample", number, seed)


def save_sample(folder: Path, sample: Sample, image: Image, settings: Mapping[str, object]) -> None:
    """Write the image as a PNG whose text chunk `parameters` holds in JSON what it was generated from.

    With the adapter and the base model this suffices to reproduce the image in diffusers. Its `latents` are
    standard normal noise from a CPU torch.Generator with the seed `noise_seed`, (1, 4, H/8, W/8).
    """
    seed = sample_generator(_prompt_number(sample.file), sample.seed).initial_seed()
    info = PngInfo()
    parameters = {**asdict(sample), "noise_seed": seed, **settings}
    info.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
    with atomic_write(folder / sample.file) as partial:
        image.save(partial, pnginfo=info)


def save_table(path: Path, samples: Sequence[Sample]) -> None:
    """Write one line of JSON a sample."""
    lines = (json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    write_text(path, "".join(lines))


def load_table(path: Path) -> list[Sample]:
    """Read the samples that `save_table` wrote.

    Raises:
        FileNotFoundError: nothing was sampled.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: run `dvc repro sample_images` first")
    return [Sample(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
