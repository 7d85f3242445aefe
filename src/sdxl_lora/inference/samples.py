"""Pictures on disk and what each was drawn from: what sampling writes and evaluation reads."""

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
"""What people call them."""


@dataclass(frozen=True)
class Prompt:
    """A text to sample from."""

    text: str
    origin: Origin


@dataclass(frozen=True)
class Sample:
    """What one picture was drawn from; a line of the table."""

    file: str
    """Path below the folder of samples."""
    prompt: str
    seed: int
    strength: float
    """Factor of the adapter's update: 0 is the base model."""
    origin: Origin = "free"
    """Of the prompt."""


def strength_name(value: float) -> str:
    """What people call a strength: 0 is the base model, 1 the adapter as it was trained."""
    return {0.0: "base", 1.0: "adapter"}.get(value, f"strength {value:g}")


def sample_file(number: int, seed: int, strength: float) -> str:
    """Where the picture of the prompt at place `number` lies below the folder of samples."""
    return f"strength-{strength:g}/{number:02d}-seed-{seed}.png"


def _prompt_number(file: str) -> int:
    """The place of the prompt that a file of `sample_file` was drawn from."""
    return int(Path(file).name.split("-")[0])


def sample_generator(number: int, seed: int) -> "Generator":
    """Of the noise that the prompt at place `number` is drawn from."""
    from sdxl_lora.runtime.rng import keyed_generator  # loads torch, which the table does not need

    return keyed_generator("sample", number, seed)


def save_sample(folder: Path, sample: Sample, image: Image, settings: Mapping[str, object]) -> None:
    """Writes the picture as a PNG whose text chunk `parameters` says in JSON what it was drawn from.

    With the adapter and the base model that is enough for diffusers to draw it again. Its `latents` are
    standard normal draws on the CPU, (1, 4, H/8, W/8), by a torch.Generator with the seed `noise_seed`.
    """
    seed = sample_generator(_prompt_number(sample.file), sample.seed).initial_seed()
    info = PngInfo()
    parameters = {**asdict(sample), "noise_seed": seed, **settings}
    info.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
    with atomic_write(folder / sample.file) as partial:
        image.save(partial, pnginfo=info)


def save_table(path: Path, samples: Sequence[Sample]) -> None:
    """One line of JSON a picture."""
    lines = (json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    write_text(path, "".join(lines))


def load_table(path: Path) -> list[Sample]:
    """The samples that `save_table` put down.

    Raises:
        FileNotFoundError: nothing was sampled.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: run `dvc repro sample_images` first")
    return [Sample(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
