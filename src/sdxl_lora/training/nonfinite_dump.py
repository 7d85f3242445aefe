"""What a step was made from whose loss is no number, in files for whoever looks into it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save

from sdxl_lora import paths
from sdxl_lora.data.encoded_dataset import Example
from sdxl_lora.runtime.distributed import distributed_state
from sdxl_lora.storage.atomic_io import write_bytes, write_text
from sdxl_lora.training.trainer import NotFiniteError

_INPUTS_FILE = "inputs.safetensors"
_REPORT_FILE = "report.json"


@contextmanager
def dump_nonfinite_steps(root: Path, dataset: Sequence[Example]) -> Iterator[None]:
    """Writes what a step was made from that fails in the block, and adds to its error where that is.

    Args:
        root: of the project.
        dataset: the examples that are trained on.

    Raises:
        FloatingPointError: a step failed.
    """
    try:
        yield
    except NotFiniteError as error:
        folder = _write_nonfinite_step(root / paths.FAILED_STEPS, error, dataset)
        raise FloatingPointError(f"{error}. Its inputs are in {folder.relative_to(root)}/") from error


def _write_nonfinite_step(folder: Path, error: NotFiniteError, dataset: Sequence[Example]) -> Path:
    """Writes the step's inputs as tensors, `<micro-batch>.<name>`, and its report and examples as JSON.

    Each process writes those of its own examples.

    Returns:
        The folder that holds both files.
    """
    target = folder / f"step-{error.report.step:08d}-process-{distributed_state().process_index}"
    tensors = {
        f"{number}.{name}": tensor.contiguous()
        for number, part in enumerate(error.examples)
        for name, tensor in part.named_tensors().items()
    }
    write_bytes(target / _INPUTS_FILE, save(tensors))
    by_image: Mapping[str, Example] = {example.image: example for example in dataset}
    examples = [by_image[image] for part in error.examples for image in part.images]
    report = {
        "error": str(error),
        "report": asdict(error.report),
        "examples": [{"id": e.id, "image": e.image, "caption": e.caption} for e in examples],
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    write_text(target / _REPORT_FILE, text + "\n")
    return target
