"""Whether the recipe works: pictures through the VAE, a step of training, its result saved and drawn with."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sdxl_lora import paths
from sdxl_lora.adapters.lora import WEIGHTS_FILE
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
_DRAWN_SIDE = 256  # pixels of pictures that are drawn, where there are none yet
_MAX_SHOWN = 3  # adapters that a line names


def check_vae(context: RunContext) -> Iterator[Check]:
    """Whether the VAE encodes three pictures into numbers: SDXL's own overflows in fp16."""
    context.require_models()
    config = context.params.encoding
    vae = load_vae(context.params.model, config.vae_precision, context.device)
    origin, pictures = _some_pictures(context.params.download)
    size = (config.resolution, config.resolution)
    for name, picture in pictures:
        part, _ = resize_and_crop(picture, size, config.crop, keyed_generator("doctor"))
        mean, std = encode_images(vae, to_bytes(part)[None])
        if not (mean.isfinite().all() and std.isfinite().all()):
            yield failed(
                "vae",
                f"latents of {name} are not finite in {config.vae_precision}",
                "set encoding.vae_precision to fp32, or model.vae to one that is safe, as sdxl-vae-fp16-fix",
            )
            return
    yield passed("vae", f"{len(pictures)} pictures ({origin}) give finite latents in {config.vae_precision}")


def _some_pictures(config: DownloadConfig) -> tuple[str, list[tuple[str, Image.Image]]]:
    """Where three pictures come from, and their names and contents: the data set's, else drawn ones."""
    folders = [paths.RAW_IMAGES, *([Path(config.repository)] if is_local_folder(config.repository) else [])]
    for folder in folders:
        files = sorted(path for path in folder.rglob("*") if path.suffix in _IMAGE_PATTERNS)[:_NUM_IMAGES]
        if files:
            return "of the data set", [(path.name, decode_image(path.read_bytes())) for path in files]
    levels = np.random.default_rng(0).integers(0, 256, (_DRAWN_SIDE, _DRAWN_SIDE, 3), dtype=np.uint8)
    side = (_DRAWN_SIDE, _DRAWN_SIDE)
    drawn = {
        "noise": Image.fromarray(levels),
        "black": Image.new("RGB", side, "black"),
        "white": Image.new("RGB", side, "white"),
    }
    return "drawn, as there is no data set yet", list(drawn.items())


def check_gradient(context: RunContext) -> Iterator[Check]:
    """Whether the loss moves every matrix of every adapter."""
    with deterministic_kernels(context.params.training.deterministic):
        gradients = context.dry_run.gradients()
    unmoved = [name for name, gradient in gradients.items() if not gradient.any()]
    if unmoved:
        yield failed(
            "gradient",
            f"none reaches {len(unmoved)} of {len(gradients)}: {', '.join(unmoved[:_MAX_SHOWN])}",
            "take these layers out of lora.unet_modules or lora.text_encoder_modules",
        )
    else:
        yield passed(
            "gradient", f"reaches all {len(gradients)} matrices; attention: {context.dry_run.attention}"
        )


def check_step(context: RunContext) -> Iterator[Check]:
    """Whether a step of the optimizer changes the adapters and leaves them finite."""
    with deterministic_kernels(context.params.training.deterministic):
        before = context.dry_run.state()["master"]
        update = context.dry_run.step()
        after = context.dry_run.state()["master"]
    moved = float((after - before).norm())
    if after.isfinite().all() and moved > 0:
        yield passed("step", f"loss {update.loss:.4f}, gradient {update.grad_norm:.3g}, moved by {moved:.3g}")
    else:
        yield failed(
            "step",
            f"loss {update.loss}, gradient {update.grad_norm}: the adapters are not finite, or did not move",
            "lower training.learning_rate, or set training.precision to bf16 or fp32",
        )


def check_resume(context: RunContext) -> Iterator[Check]:
    """Whether a step from a checkpoint is the step that followed it, to the bit."""
    with deterministic_kernels(context.params.training.deterministic):
        same = context.dry_run.resumes_bit_exactly(context.folder / "checkpoints")
    if same:
        yield passed("resume", "the step after a checkpoint is the same, to the bit")
    else:
        yield failed(
            "resume",
            "the step after a checkpoint is another one than without",
            "set training.deterministic to true, or expect a resumed training to differ",
        )


def check_save(context: RunContext) -> Iterator[Check]:
    """Whether the adapters can be written and read back, to the bit."""
    same = context.dry_run.round_trips(context.folder)
    size = (context.folder / WEIGHTS_FILE).stat().st_size
    context.release_model()
    if same:
        yield passed("save", f"{size / 1e6:.1f} MB, read back to the bit")
    else:
        yield failed("save", "what was read back is not what was trained", "check the disk")


def check_sample(context: RunContext) -> Iterator[Check]:
    """Whether a picture can be drawn with the saved adapter."""
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
