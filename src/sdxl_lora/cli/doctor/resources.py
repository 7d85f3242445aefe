"""Checks of free memory and disk space against the forecast, and of the models' files."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from sdxl_lora import paths
from sdxl_lora.cli.doctor.context import CheckSkippedError, RunContext
from sdxl_lora.config import Params
from sdxl_lora.data.latent_cache import max_example_bytes
from sdxl_lora.memory.training_trace import META
from sdxl_lora.models.architecture import SDXLArchitecture
from sdxl_lora.reproducibility.checklist import Check, failed, passed, warned
from sdxl_lora.reproducibility.integrity import check_pin
from sdxl_lora.runtime.device import CUDA_CONTEXT
from sdxl_lora.storage.atomic_io import GIB
from sdxl_lora.storage.repository import is_local_folder

_DATA_COPIES = 3  # of encoded data: the latent cache, the shards, DVC's cache


def check_gpu_memory(context: RunContext) -> Iterator[Check]:
    """Check that the GPU has as much free memory as training is forecast to use."""
    if not context.has_its_gpu:
        raise CheckSkippedError("there is no GPU, and this recipe needs one")
    if context.device.type != "cuda":
        yield passed("gpu memory", "this recipe needs none")
        return
    free, _ = torch.cuda.mem_get_info(context.device)
    remedy = "end other processes on this GPU (`nvidia-smi` lists them)"
    yield _compare("gpu memory", free, needed_gpu_memory(context), remedy)


def needed_gpu_memory(context: RunContext) -> float:
    """Return the forecast peak of GPU memory in training, including CUDA's context, in bytes."""
    return context.plan.forecast.total + CUDA_CONTEXT


def check_memory(context: RunContext) -> Iterator[Check]:
    """Check that main memory holds the weights before they move to the GPU; on a CPU, the whole training."""
    free = psutil.virtual_memory().available
    if context.device.type == "cuda" or not context.has_its_gpu:
        needed: float = _pipeline_bytes(context.shapes, context.params)
    else:
        needed = context.plan.forecast.total
    yield _compare("memory", free, needed, "end other programs, or use a machine with more memory")


def _pipeline_bytes(shapes: SDXLArchitecture, params: Params) -> int:
    """Return the bytes of all weights of the base model in the precision of sampling."""
    precision = params.sampling.precision
    modules = (
        shapes.make_unet(precision, META),
        shapes.make_vae(precision, META),
        *shapes.make_text_encoders(precision, META),
    )
    return sum(weight.numel() * weight.element_size() for module in modules for weight in module.parameters())


def check_disk(context: RunContext) -> Iterator[Check]:
    """Check that the disk has space for all copies of the encoded data set."""
    free = shutil.disk_usage(Path()).free
    count = _number_of_examples(context.params)
    if count is None:
        yield warned(
            "disk",
            f"{free / GIB:.1f} GiB free; the size of the data set is unknown before it is downloaded",
            "`dvc repro download_dataset`, then run `doctor` again",
        )
        return
    needed = _DATA_COPIES * count * example_bytes(context.shapes, context.params)
    yield _compare("disk", free, needed, "free some space: `dvc gc --workspace` deletes old results")


def _number_of_examples(params: Params) -> int | None:
    """Return an upper bound of the number of examples; None if it is unknown."""
    if paths.RAW_CAPTIONS.is_file():
        return sum(1 for _ in paths.RAW_IMAGES.iterdir())
    if params.download.max_examples is not None:
        return params.download.max_examples
    if is_local_folder(params.download.repository):
        return sum(path.is_file() for path in Path(params.download.repository).rglob("*"))
    return None


def example_bytes(shapes: SDXLArchitecture, params: Params) -> int:
    """Return an upper bound of an encoded example with one caption, bytes."""
    width = shapes.embedding_widths[0] if params.model.text_encoders == "frozen" else 0
    return max_example_bytes(params.encoding, shapes.pixels_per_latent, width)


def _compare(name: str, free: float, needed: float, remedy: str) -> Check:
    """Return a check that fails if fewer bytes are free than needed."""
    text = f"{free / GIB:.2f} GiB free, {needed / GIB:.2f} needed"
    return passed(name, text) if free >= needed else failed(name, text, remedy)


def check_models(context: RunContext) -> Iterator[Check]:
    """Check that the files of base model and VAE are those that the params pin."""
    model = context.params.model
    pins = {"model.base": (model.base, model.revision), "model.vae": (model.vae, model.vae_revision)}
    for key, folder in context.models.items():
        repository, revision = (str(value) for value in pins[key])
        yield check_pin(key, repository, revision, folder)
