"""The encoded data set laid out: shards of one size each, and an index in the order of the captions."""

import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdxl_lora.config import EncodingConfig
from sdxl_lora.data.aspect_ratio_buckets import Size
from sdxl_lora.data.encoded_dataset import (
    Batch,
    Example,
    Split,
    Variant,
    text_digest,
    write_index,
    write_shard,
)
from sdxl_lora.data.encoding_report import EncodingReport
from sdxl_lora.data.image_loader import CaptionedImage
from sdxl_lora.data.latent_cache import LatentCache


def write_shards(
    sides: dict[Split, list[CaptionedImage]],
    entries: LatentCache,
    config: EncodingConfig,
    folder: Path,
    report: EncodingReport,
) -> None:
    """Copies examples from the store into shards and an index, which take the place of `folder` at once."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for split, members in sides.items():
        written: dict[str, Example] = {}
        for number, rows in enumerate(_shards_of_one_size(members, entries, config)):
            shard = f"{split}-{number:05d}.safetensors"
            examples = [_EncodedRow(row, entries, config.flip) for row in rows]
            flipped = [batch for example in examples for batch in example.flipped]
            more_captions = [batch for example in examples for batch in example.captioned_otherwise]
            write_shard(
                partial,
                shard,
                Batch.cat([example.first for example in examples]),
                Batch.cat(flipped) if flipped else None,
                Batch.cat(more_captions) if more_captions else None,
            )
            more = 0
            for position, (row, example) in enumerate(zip(rows, examples, strict=True)):
                written[row.id] = example.indexed(split, shard, position, more)
                more += len(row.more_captions)
                report.note_size(row, example.first)
        report.examples += [written[row.id] for row in members]
    write_index(partial, report.examples)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


class _EncodedRow:
    """All that was encoded of a row: each a batch of one."""

    def __init__(self, row: CaptionedImage, entries: LatentCache, flip: bool) -> None:
        self._row = row
        self.first = entries.example(row)
        """The image as it is with its first caption."""
        self.flipped = [entries.example(row, Variant(flipped=True))] if flip else []
        """Mirrored."""
        numbers = range(1, len(row.captions))
        self.captioned_otherwise = [entries.example(row, Variant(caption=number)) for number in numbers]
        """With its further captions."""

    def indexed(self, split: Split, shard: str, position: int, more_row: int) -> Example:
        """The line of the index, if it lies in these rows of the shard."""
        return Example(
            self._row.id,
            self._row.image,
            self._row.caption,
            split,
            shard,
            position,
            self.first.digest(),
            "".join(batch.digest() for batch in self.flipped),
            self._row.more_captions,
            more_row,
            tuple(text_digest(batch) for batch in self.captioned_otherwise),
        )


def _shards_of_one_size(
    rows: Sequence[CaptionedImage], entries: LatentCache, config: EncodingConfig
) -> Iterator[list[CaptionedImage]]:
    """The rows of each shard, size by size, in the order of the data set within each."""
    by_size: dict[Size, list[CaptionedImage]] = defaultdict(list)
    for row in rows:
        by_size[entries.size(row)].append(row)
    for size in sorted(by_size):
        members = by_size[size]
        for start in range(0, len(members), config.shard_size):
            yield members[start : start + config.shard_size]
