"""Pictures on disk and what each was drawn from: what sampling writes and evaluation reads."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from sdxl_lora.config import SamplingConfig


@dataclass(frozen=True)
class Sample:
    """What one picture was drawn from; a line of the table."""

    file: str
    """Path below the folder of samples."""
    prompt: str
    seed: int
    strength: float
    """Factor of the adapter's update: 0 is the base model."""


def strength_name(value: float) -> str:
    """What people call a strength: 0 is the base model, 1 the adapter as it was trained."""
    return {0.0: "base", 1.0: "adapter"}.get(value, f"strength {value:g}")


def save_sample(folder: Path, sample: Sample, image: Image, config: SamplingConfig) -> None:
    """Writes the picture as a PNG whose text chunk `parameters` says in JSON what it was drawn from."""
    settings = config.model_dump(include={"negative_prompt", "num_inference_steps", "guidance_scale"})
    info = PngInfo()
    info.add_itxt("parameters", json.dumps({**asdict(sample), **settings}, ensure_ascii=False))
    path = folder / sample.file
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, pnginfo=info)


def save_table(path: Path, samples: Sequence[Sample]) -> None:
    """One line of JSON a picture."""
    lines = (json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    path.write_text("".join(lines), encoding="utf-8")


def load_table(path: Path) -> list[Sample]:
    """The samples that `save_table` put down.

    Raises:
        FileNotFoundError: nothing was sampled.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: run `dvc repro sample_images` first")
    return [Sample(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
