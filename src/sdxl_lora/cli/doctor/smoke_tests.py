"""Checks that run the recipe for a moment: VAE, gradient, training step, resume, saving and sampling."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sdxl_lora import paths
from sdxl_lora.adapters.lora_file import WEIGHTS_FILE
from sdxl_lora.cli.doctor.context import CheckSkippedError, RunContext
from sdxl_lora.config import DownloadConfig
from sdxl_lora.data.image_encoder import encode_images
from sdxl_lora.data.images import decode_image, resize_and_crop, to_bytes
from sdxl_lora.inference.sampling import load_adapter, sample_images
from sdxl_lora.models.sdxl import load_pipeline
from sdxl_lora.models.vae import load_vae
from sdxl_lora.reproducibility.checklist import Check, failed, passed
from sdxl_lora.runtime.device import deterministic_kernels
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.storage.repository import is_local_folder

_NUM_IMAGES = 3
_IMAGE_PATTERNS = {".png", ".jpg", ".jpeg", ".webp"}
_INFERENCE_STEPS = 2
_SYNTHETIC_SIDE = 256  # pixels
_MAX_SHOWN = 3  # adapters that a check names


def check_vae(context: RunContext) -> Iterator[Check]:
    """Check that the VAE encodes three images into finite latents: SDXL's VAE overflows in fp16."""
    context.require_models()
    config = context.params.encoding
    vae = load_vae(context.params.model, config.vae_precision, context.device)
    origin, images = _some_images(context.params.download)
    size = (config.resolution, config.resolution)
    for name, image in images:
        cropped, _ = resize_and_crop(image, size, config.crop, keyed_generator("doctor"))
        mean, std = encode_images(vae, to_bytes(cropped)[None])
        if not (mean.isfinite().all() and std.isfinite().all()):
            yield failed(
                "vae",
                f"latents of {name} are not finite in {config.vae_precision}",
                "set encoding.vae_precision to fp32, or model.vae to one for fp16 such as sdxl-vae-fp16-fix",
            )
            return
    yield passed("vae", f"{len(images)} images ({origin}) give finite latents in {config.vae_precision}")


def _some_images(config: DownloadConfig) -> tuple[str, list[tuple[str, Image.Image]]]:
    """Return the origin, names and contents of three images: of the data set, or else synthetic ones."""
    folders = [paths.RAW_IMAGES, *([Path(config.repository)] if is_local_folder(config.repository) else [])]
    for folder in folders:
        files = sorted(path for path in folder.rglob("*") if path.suffix in _IMAGE_PATTERNS)[:_NUM_IMAGES]
        if files:
            return "of the data set", [(path.name, decode_image(path.read_bytes())) for path in files]
    size = (_SYNTHETIC_SIDE, _SYNTHETIC_SIDE)
    levels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    synthetic = {
        "noise": Image.fromarray(levels),
        "black": Image.new("RGB", size, "black"),
        "white": Image.new("RGB", size, "white"),
    }
    return "synthetic, because there is no data set yet", list(synthetic.items())


def check_gradient(context: RunContext) -> Iterator[Check]:
    """Check that the loss has a nonzero gradient for every matrix of every adapter."""
    with deterministic_kernels(context.params.training.deterministic):
        gradients = context.dry_run.gradients()
    unmoved = [name for name, gradient in gradients.items() if not gradient.any()]
    if unmoved:
        yield failed(
            "gradient",
            f"zero for {len(unmoved)} of {len(gradients)} matrices: {', '.join(unmoved[:_MAX_SHOWN])}",
            "remove these layers from lora.unet_modules or lora.text_encoder_modules",
        )
    else:
        yield passed(
            "gradient",
            f"nonzero for all {len(gradients)} matrices; attention: {context.dry_run.attention}",
        )


def check_step(context: RunContext) -> Iterator[Check]:
    """Check that an optimizer step changes the adapters and leaves them finite."""
    with deterministic_kernels(context.params.training.deterministic):
        before = context.dry_run.state()["master"]
        result = context.dry_run.step()
        after = context.dry_run.state()["master"]
    moved = float((after - before).norm())
    if after.isfinite().all() and moved > 0:
        yield passed("step", f"loss {result.loss:.4f}, gradient {result.grad_norm:.3g}, moved by {moved:.3g}")
    else:
        yield failed(
            "step",
            f"loss {result.loss}, gradient {result.grad_norm}: the adapters are not finite, or did not move",
            "lower training.learning_rate, or set training.precision to bf16 or fp32",
        )


def check_resume(context: RunContext) -> Iterator[Check]:
    """Check that a step after resuming from a checkpoint is bit-identical to the step without."""
    with deterministic_kernels(context.params.training.deterministic):
        same = context.dry_run.resumes_bit_exactly(context.folder / "checkpoints")
    if same:
        yield passed("resume", "the step after resuming is bit-identical")
    else:
        yield failed(
            "resume",
            "the step after resuming differs from the step without",
            "set training.deterministic to true, or expect a resumed training to differ",
        )


def check_save(context: RunContext) -> Iterator[Check]:
    """Check that the adapters can be saved and read back bit-identically."""
    same = context.dry_run.round_trips(context.folder)
    size = (context.folder / WEIGHTS_FILE).stat().st_size
    context.release_model()
    if same:
        yield passed("save", f"{size / 1e6:.1f} MB, read back bit-identically")
    else:
        yield failed("save", "the saved adapters differ from the trained ones", "check the disk")


def check_sample(context: RunContext) -> Iterator[Check]:
    """Check that an image can be generated with the saved adapter."""
    context.require_models()
    if not (context.folder / WEIGHTS_FILE).is_file():
        raise CheckSkippedError("no adapter was saved")
    config = context.params.sampling
    one = {"prompts": config.prompts[:1], "seeds": config.seeds[:1], "strengths": [1.0]}
    config = config.model_copy(update={**one, "num_inference_steps": _INFERENCE_STEPS})
    pipeline = load_pipeline(context.params.model, config.precision, context.device)
    load_adapter(pipeline, context.folder)
    ((_, image),) = sample_images(pipeline, config)
    yield passed("sample", f"{image.width} x {image.height} pixels in {_INFERENCE_STEPS} steps, all finite")
