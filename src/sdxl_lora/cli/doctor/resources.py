"""Whether memory and disk hold what the forecast says, and whether the models are whole."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from sdxl_lora import paths
from sdxl_lora.cli.doctor.context import CheckSkippedError, RunContext
from sdxl_lora.config import Params
from sdxl_lora.memory.training_forecast import META
from sdxl_lora.models.architecture import SDXLArchitecture
from sdxl_lora.models.loading import DTYPES
from sdxl_lora.reproducibility.checklist import Check, failed, passed, warned
from sdxl_lora.reproducibility.integrity import check_pin
from sdxl_lora.runtime.device import CUDA_CONTEXT
from sdxl_lora.storage.atomic_io import GIB
from sdxl_lora.storage.repository import is_local_folder

_WEIGHT_COPIES = 3  # of encoded data: the store of entries, the shards, DVC's cache
_TOKENS = 78  # embeddings of a caption: 77 and the pooled one


def check_gpu_memory(context: RunContext) -> Iterator[Check]:
    """Whether the GPU has free what training is forecast to take."""
    if not context.has_its_gpu:
        raise CheckSkippedError("there is no GPU, and this recipe is made for one")
    if context.device.type != "cuda":
        yield passed("gpu memory", "none is needed")
        return
    free, _ = torch.cuda.mem_get_info(context.device)
    yield _compare("gpu memory", free, needed_gpu_memory(context), "end what else runs on it (`nvidia-smi`)")


def needed_gpu_memory(context: RunContext) -> float:
    """Bytes at the peak of training, CUDA's own included."""
    assert context.plan.forecast is not None
    return context.plan.forecast.total + CUDA_CONTEXT


def check_memory(context: RunContext) -> Iterator[Check]:
    """Whether main memory holds the weights on their way to the GPU; on a CPU, all that training takes."""
    free = psutil.virtual_memory().available
    if context.device.type == "cuda" or not context.has_its_gpu:
        needed: float = _pipeline_bytes(context.shapes, context.params)
    else:
        assert context.plan.forecast is not None
        needed = context.plan.forecast.total
    yield _compare("memory", free, needed, "end other programs, or take a machine with more")


def _pipeline_bytes(shapes: SDXLArchitecture, params: Params) -> int:
    """Bytes of all weights of the base model, as they are loaded to draw samples."""
    precision = params.sampling.precision
    modules = (
        shapes.make_unet(precision, META),
        shapes.make_vae(precision, META),
        *shapes.make_text_encoders(precision, META),
    )
    return sum(weight.numel() * weight.element_size() for module in modules for weight in module.parameters())


def check_disk(context: RunContext) -> Iterator[Check]:
    """Whether the disk holds the encoded data set in all its copies."""
    free = shutil.disk_usage(Path()).free
    count = _number_of_examples(context.params)
    if count is None:
        yield warned(
            "disk",
            f"{free / GIB:.1f} GiB free; the data set's size is not known before it is downloaded",
            "`dvc repro download_dataset`, then again",
        )
        return
    needed = _WEIGHT_COPIES * count * example_bytes(context.shapes, context.params)
    yield _compare("disk", free, needed, "free some: `dvc gc --workspace` drops old results")


def _number_of_examples(params: Params) -> int | None:
    """Examples of the data set, at most; None if nothing tells."""
    if paths.RAW_CAPTIONS.is_file():
        return sum(1 for _ in paths.RAW_IMAGES.iterdir())
    if params.download.max_examples is not None:
        return params.download.max_examples
    if is_local_folder(params.download.repository):
        return sum(path.is_file() for path in Path(params.download.repository).rglob("*"))
    return None


def example_bytes(shapes: SDXLArchitecture, params: Params) -> int:
    """Bytes of an encoded example: two moments of the latents, embeddings if text encoders are frozen.

    No bucket has more pixels than the square. Mirrored images have latents of their own.
    """
    config = params.encoding
    latents = (1 + config.flip) * 2 * 4 * (config.resolution // shapes.pixels_per_latent) ** 2
    embeddings = _TOKENS * shapes.embedding_widths[0] if params.model.text_encoders == "frozen" else 0
    return (
        latents * DTYPES[config.vae_precision].itemsize + embeddings * DTYPES[config.text_precision].itemsize
    )


def _compare(name: str, free: float, needed: float, remedy: str) -> Check:
    text = f"{free / GIB:.2f} GiB free, {needed / GIB:.2f} needed"
    return passed(name, text) if free >= needed else failed(name, text, remedy)


def check_models(context: RunContext) -> Iterator[Check]:
    """Whether the files of base model and VAE are those that were published, or that the params pin."""
    model = context.params.model
    pins = {"model.base": (model.base, model.revision), "model.vae": (model.vae, model.vae_revision)}
    for key, folder in context.models.items():
        repository, revision = (str(value) for value in pins[key])
        yield check_pin(key, repository, revision, folder)
