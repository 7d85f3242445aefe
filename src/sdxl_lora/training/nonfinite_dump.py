"""The inputs of a training step whose loss is NaN or infinite, written to files for debugging."""

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
def dump_nonfinite_steps(root: Path, examples: Sequence[Example]) -> Iterator[None]:
    """Write the inputs of a step that fails in the block, and name their folder in the error.

    Args:
        root: the project's root.
        examples: of the data set that is trained on.

    Raises:
        FloatingPointError: a step's loss or gradient norm is not finite.
    """
    try:
        yield
    except NotFiniteError as error:
        folder = _write_nonfinite_step(root / paths.FAILED_STEPS, error, examples)
        raise FloatingPointError(f"{error}. Its inputs are in {folder.relative_to(root)}/") from error


def _write_nonfinite_step(folder: Path, error: NotFiniteError, examples: Sequence[Example]) -> Path:
    """Write the step's inputs as tensors, `<micro-batch>.<name>`, and its metrics and examples as JSON.

    Each process writes its share of the step, into its own folder.

    Returns:
        The folder that holds both files.
    """
    target = folder / f"step-{error.metrics.step:08d}-process-{distributed_state().process_index}"
    tensors = {
        f"{number}.{name}": tensor.contiguous()
        for number, batch in enumerate(error.batches)
        for name, tensor in batch.named_tensors().items()
    }
    write_bytes(target / _INPUTS_FILE, save(tensors))
    by_image: Mapping[str, Example] = {example.image: example for example in examples}
    used = [by_image[image] for batch in error.batches for image in batch.images]
    report = {
        "error": str(error),
        "report": asdict(error.metrics),
        "examples": [{"id": e.id, "image": e.image, "caption": e.caption} for e in used],
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    write_text(target / _REPORT_FILE, text + "\n")
    return target
