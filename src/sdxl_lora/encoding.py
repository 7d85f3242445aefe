"""Images and captions to what training reads: latents, token ids, embeddings, size conditions, in shards."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sdxl_lora.config import EncodingConfig, ModelConfig
from sdxl_lora.dataset import Batch, Example, Split, write_index, write_shard
from sdxl_lora.hardware import require_disk_space
from sdxl_lora.images import load_image, resize_and_crop, to_tensor
from sdxl_lora.randomness import generator
from sdxl_lora.sdxl import (
    DTYPES,
    TextEncoders,
    Tokenizers,
    embed_tokens,
    load_text_encoders,
    load_tokenizers,
    load_vae,
    tokenize,
)


@dataclass(frozen=True)
class CaptionedImage:
    """One line of data/captions.jsonl."""

    id: str
    """SHA-256 of the image file."""
    image: str
    """File name of the image."""
    caption: str


@dataclass
class EncodingReport:
    """What became of the images."""

    examples: dict[Split, int] = field(default_factory=lambda: {"train": 0, "held_out": 0})
    rejected: list[dict[str, str]] = field(default_factory=list)
    """Image and reason of each that was left out."""
    upscaled: int = 0
    """Images smaller than the resolution."""

    def metrics(self) -> dict[str, object]:
        """The report as numbers."""
        return {"examples": self.examples, "rejected": len(self.rejected), "upscaled": self.upscaled}


@dataclass(frozen=True)
class Encoders:
    """The frozen models that turn images and captions into tensors."""

    vae: AutoencoderKL
    tokenizers: Tokenizers
    text_encoders: TextEncoders | None
    """None if they are trained, and so cannot be applied in advance."""


def load_encoders(model: ModelConfig, config: EncodingConfig, device: torch.device) -> Encoders:
    """VAE and tokenizers, and the text encoders if they are frozen."""
    frozen = model.text_encoders == "frozen"
    return Encoders(
        vae=load_vae(model, config.vae_precision, device),
        tokenizers=load_tokenizers(model),
        text_encoders=load_text_encoders(model, config.text_precision, device) if frozen else None,
    )


def encode_dataset(
    rows: Sequence[CaptionedImage],
    images: Path,
    encoders: Encoders,
    config: EncodingConfig,
    folder: Path,
    report: EncodingReport,
) -> Iterator[int]:
    """Writes the encoded data set into `folder`, yielding the number of images done since the last time.

    Every image falls on the same side of the split whatever else is in the data set; duplicates of a file are
    encoded once. A bad image is left out and put down in `report`.

    Raises:
        ValueError: latents are not finite, or a side of the split has no image left.
        OSError: the disk is too full.
    """
    require_disk_space(folder, len(rows) * bytes_per_example(encoders, config))
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    unique = without_duplicates(rows, report)
    yield len(rows) - len(unique)
    examples: list[Example] = []
    for split, members in split_by_content(unique, config.held_out).items():
        for number, start in enumerate(range(0, len(members), config.shard_size)):
            shard, kept, batches = f"{split}-{number:05d}.safetensors", [], []
            for rows_of_batch in in_batches(members[start : start + config.shard_size], config.batch_size):
                readable, batch = encode_batch(rows_of_batch, images, encoders, config, report)
                kept += readable
                batches += [batch] if batch is not None else []
                yield len(rows_of_batch)
            if batches:
                write_shard(partial, shard, Batch.cat(batches))
            examples += [Example(r.id, r.image, r.caption, split, shard, row) for row, r in enumerate(kept)]
            report.examples[split] += len(kept)
    refuse_empty_split(report, len(rows))
    write_index(partial, examples)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def encode_batch(
    rows: Sequence[CaptionedImage],
    images: Path,
    encoders: Encoders,
    config: EncodingConfig,
    report: EncodingReport,
) -> tuple[list[CaptionedImage], Batch | None]:
    """Those of `rows` whose image can be read, and their encoding, None if there are none."""
    kept, pixels, time_ids = [], [], []
    for row in rows:
        try:
            image = load_image(images / row.image)
        except ValueError as error:
            report.rejected.append({"image": row.image, "reason": str(error)})
            continue
        report.upscaled += min(image.size) < config.resolution
        crops = generator("crop", row.id)
        square, sizes = resize_and_crop(image, config.resolution, config.crop, crops)
        kept.append(row)
        pixels.append(to_tensor(square))
        time_ids.append(sizes)
    if not kept:
        return [], None
    mean, std = encode_images(encoders.vae, torch.stack(pixels))
    refuse_infinite_latents(kept, mean + std, config)
    token_ids = tokenize(encoders.tokenizers, [row.caption for row in kept])
    embeds = embed_captions(encoders.text_encoders, token_ids)
    return kept, Batch(mean, std, token_ids, torch.tensor(time_ids, dtype=torch.int32), *embeds)


def refuse_infinite_latents(rows: Sequence[CaptionedImage], latents: Tensor, config: EncodingConfig) -> None:
    for row, finite in zip(rows, latents.isfinite().flatten(1).all(1).tolist(), strict=True):
        if not finite:
            raise ValueError(
                f"{row.image}: its latents are not finite in {config.vae_precision}: "
                "set encoding.vae_precision to fp32, or model.vae to madebyollin/sdxl-vae-fp16-fix"
            )


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posterior, scaled as the UNet reads latents.

    Args:
        pixels: in [-1, 1], (B, 3, H, W).

    Returns:
        Two tensors in the VAE's precision, on the CPU, (B, 4, H/8, W/8).
    """
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    mean = (posterior.mean - shift) * vae.config.scaling_factor
    return mean.cpu(), (posterior.std * vae.config.scaling_factor).cpu()


@torch.no_grad()
def embed_captions(
    text_encoders: TextEncoders | None, token_ids: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Prompt embeddings and pooled ones on the CPU, in their encoders' precision; both None without."""
    if text_encoders is None:
        return None, None
    prompt_embeds, pooled_prompt_embeds = embed_tokens(text_encoders, token_ids.to(text_encoders[0].device))
    return prompt_embeds.cpu(), pooled_prompt_embeds.cpu()


def without_duplicates(rows: Sequence[CaptionedImage], report: EncodingReport) -> list[CaptionedImage]:
    """The first row of each image file; the others are put down in `report`."""
    first: dict[str, CaptionedImage] = {}
    for row in rows:
        if row.id in first:
            report.rejected.append(
                {"image": row.image, "reason": f"{row.image}: same file as {first[row.id].image}"}
            )
        else:
            first[row.id] = row
    return list(first.values())


def split_by_content(rows: Sequence[CaptionedImage], held_out: float) -> dict[Split, list[CaptionedImage]]:
    """Puts about the share `held_out` of the images aside, each for its own hash, in the rows' order.

    Both sides get at least one: the image nearest to the other side moves over if one would be empty.
    """
    positions = {row.id: int(row.id[:15], 16) / 16**15 for row in rows}
    in_order = sorted(positions.values())
    if len(in_order) > 1 and in_order[0] >= held_out:
        held_out = in_order[1]
    elif len(in_order) > 1 and in_order[-1] < held_out:
        held_out = in_order[-1]
    return {
        "train": [row for row in rows if positions[row.id] >= held_out],
        "held_out": [row for row in rows if positions[row.id] < held_out],
    }


def refuse_empty_split(report: EncodingReport, num_rows: int) -> None:
    for split, count in report.examples.items():
        if count == 0:
            raise ValueError(
                f"no readable image is left for the {split} split ({len(report.rejected)} of {num_rows} "
                f"images were rejected, {report.rejected[:3]}): add images, or correct those that are named"
            )


def in_batches(rows: Sequence[CaptionedImage], size: int) -> Iterator[Sequence[CaptionedImage]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def bytes_per_example(encoders: Encoders, config: EncodingConfig) -> int:
    """Upper bound of an encoded example's size."""
    latents = 2 * 4 * (config.resolution // 8) ** 2 * DTYPES[config.vae_precision].itemsize
    if encoders.text_encoders is None:
        return latents + 2**12
    widths = [text_encoder.config.hidden_size for text_encoder in encoders.text_encoders]
    return latents + 2**12 + 78 * sum(widths) * DTYPES[config.text_precision].itemsize


def read_captions(path: Path) -> list[CaptionedImage]:
    """The lines that clean_captions wrote.

    Raises:
        FileNotFoundError: it did not run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: run `dvc repro clean_captions` first")
    return [CaptionedImage(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
