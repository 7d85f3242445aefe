"""Writing of the encoded data set: shards of one image size each, and an index in the order of the captions.

`encoded_dataset` describes the format and reads it.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save

from sdxl_lora.config import EncodingConfig
from sdxl_lora.data.aspect_ratio_buckets import Size
from sdxl_lora.data.encoded_dataset import (
    CAPTION_TENSORS,
    FLIPPED_PREFIX,
    IMAGE_TENSORS,
    INDEX,
    MORE_PREFIX,
    Batch,
    Example,
    Split,
    Variant,
    text_digest,
)
from sdxl_lora.data.encoding_report import EncodingReport
from sdxl_lora.data.image_loader import CaptionedImage
from sdxl_lora.data.latent_cache import LatentCache
from sdxl_lora.storage.atomic_io import write_bytes, write_text


def write_shards(
    splits: dict[Split, list[CaptionedImage]],
    cache: LatentCache,
    config: EncodingConfig,
    folder: Path,
    report: EncodingReport,
) -> None:
    """Copy examples from the cache into shards and an index; `folder` is replaced once they are complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for split, members in splits.items():
        written: dict[str, Example] = {}
        for number, rows in enumerate(_shards_of_one_size(members, cache, config)):
            shard = f"{split}-{number:05d}.safetensors"
            encoded = [_EncodedRow(row, cache, config.flip) for row in rows]
            flipped = [batch for row in encoded for batch in row.flipped]
            more_captions = [batch for row in encoded for batch in row.more_captions]
            write_shard(
                partial,
                shard,
                Batch.cat([row.first for row in encoded]),
                Batch.cat(flipped) if flipped else None,
                Batch.cat(more_captions) if more_captions else None,
            )
            more_row = 0
            for position, (row, tensors) in enumerate(zip(rows, encoded, strict=True)):
                written[row.id] = tensors.index_line(split, shard, position, more_row)
                more_row += len(row.more_captions)
                report.note_size(row, tensors.first)
        # Shards are ordered by size. The index keeps the data set's order: evaluation.max_examples cuts it.
        report.examples += [written[row.id] for row in members]
    write_index(partial, report.examples)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


class _EncodedRow:
    """Everything that was encoded of a row: each field a batch of one, or a list of them."""

    def __init__(self, row: CaptionedImage, cache: LatentCache, flip: bool) -> None:
        self._row = row
        self.first = cache.example(row)
        """The image with its first caption."""
        self.flipped = [cache.example(row, Variant(flipped=True))] if flip else []
        """The mirrored image with the first caption; empty without encoding.flip."""
        numbers = range(1, len(row.captions))
        self.more_captions = [cache.example(row, Variant(caption=number)) for number in numbers]
        """The image with each further caption."""

    def index_line(self, split: Split, shard: str, position: int, more_row: int) -> Example:
        """Return the line of the index for these rows of the shard."""
        return Example(
            id=self._row.id,
            image=self._row.image,
            caption=self._row.caption,
            split=split,
            shard=shard,
            row=position,
            digest=self.first.digest(),
            flipped_digest="".join(batch.digest() for batch in self.flipped),
            more_captions=self._row.more_captions,
            more_row=more_row,
            more_digests=tuple(text_digest(batch) for batch in self.more_captions),
        )


def _shards_of_one_size(
    rows: Sequence[CaptionedImage], cache: LatentCache, config: EncodingConfig
) -> Iterator[list[CaptionedImage]]:
    """Yield the rows of each shard, size by size, in the order of the data set within each size."""
    by_size: dict[Size, list[CaptionedImage]] = defaultdict(list)
    for row in rows:
        by_size[cache.size(row)].append(row)
    for size in sorted(by_size):
        members = by_size[size]
        for start in range(0, len(members), config.shard_size):
            yield members[start : start + config.shard_size]


def write_shard(
    folder: Path, name: str, batch: Batch, flipped: Batch | None = None, more: Batch | None = None
) -> None:
    """Write the examples of `batch` as rows 0, 1, ... of shard `name`.

    Args:
        flipped: the same examples with their images mirrored.
        more: examples with their further captions, those of the first example first.
    """
    stored = batch.tensors()
    if flipped is not None:
        stored |= {FLIPPED_PREFIX + key: getattr(flipped, key) for key in IMAGE_TENSORS}
    if more is not None:
        stored |= {MORE_PREFIX + key: getattr(more, key) for key in CAPTION_TENSORS}
    tensors = {key: tensor.contiguous() for key, tensor in stored.items() if tensor is not None}
    write_bytes(folder / name, save(tensors))


def write_index(folder: Path, examples: Iterable[Example]) -> None:
    lines = (json.dumps(asdict(example), ensure_ascii=False, sort_keys=True) + "\n" for example in examples)
    write_text(folder / INDEX, "".join(lines))
