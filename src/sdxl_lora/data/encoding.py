"""Encoding of images and captions into latents, token ids, embeddings and size conditions, in shards.

A caption or an image passes through these modules:

    read_captioned_images   data/captions.jsonl -> rows
    latent_cache            encodes what its store lacks: image_loader decodes, encoders run the models
    splits                  drops bad and duplicate images, divides the rest into train and held_out
    shard_writer            copies the tensors from the cache into the encoded data set
    encoded_dataset         reads them in training
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdxl_lora.config import EncodingConfig
from sdxl_lora.data.encoding_report import EncodingReport
from sdxl_lora.data.image_loader import CaptionedImage
from sdxl_lora.data.images import BadImageError
from sdxl_lora.data.latent_cache import LatentCache
from sdxl_lora.data.shard_writer import write_shards
from sdxl_lora.data.splits import (
    drop_bad_images,
    drop_duplicates,
    drop_leaked_images,
    require_no_empty_split,
    split_by_content,
)
from sdxl_lora.runtime.distributed import distributed_state
from sdxl_lora.storage.atomic_io import require_disk_space


@dataclass(frozen=True)
class RankShare:
    """The rows that one of several processes encodes."""

    rank: int
    num_processes: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def of(self, rows: Sequence[CaptionedImage]) -> list[CaptionedImage]:
        """Return every n-th row; on rank 0 all other rows follow, in reverse.

        Rank 0 visits the other ranks' rows from their end and encodes what is still missing, so it needs no
        barrier, which would time out if another rank were slow or dead.
        """
        share = list(rows[self.rank :: self.num_processes])
        if not self.is_first:
            return share
        return share + [row for number, row in enumerate(rows) if number % self.num_processes][::-1]


_SINGLE_RANK = RankShare(0, 1)


def rank_share() -> RankShare:
    """Return the share of this process."""
    state = distributed_state()
    return RankShare(state.process_index, state.num_processes)


def encode_dataset(
    rows: Sequence[CaptionedImage],
    cache: LatentCache,
    config: EncodingConfig,
    folder: Path,
    report: EncodingReport,
    share: RankShare = _SINGLE_RANK,
) -> Iterator[int]:
    """Write the encoded data set into `folder`; yield the number of images finished since the last yield.

    An image's split does not depend on the other images. A bad image is left out and reported. `folder`
    appears when it is complete. Rank 0 writes it; other ranks only encode their share into the cache.

    Raises:
        ValueError: an image is bad and encoding.strict is true; latents are not finite; or a split has no
            image left.
        OSError: an image file is missing, or the disk is too full.
    """
    require_disk_space(folder, 2 * sum(map(cache.num_bytes, rows)))  # once in the cache, once in shards
    unique = drop_duplicates(rows, report)
    yield len(rows) - len(unique)
    faults: dict[str, BadImageError] = {}
    for row, fault in cache.encode(share.of(unique)):
        if fault is not None:
            faults[row.id] = fault
        yield 1
    if not share.is_first:
        return
    readable = drop_bad_images(unique, faults, config, report)
    splits = split_by_content(readable, config.held_out)
    require_no_empty_split(splits, report, len(rows))
    if config.near_duplicate_bits is not None:
        splits["held_out"] = drop_leaked_images(splits, cache, config.near_duplicate_bits, report)
        require_no_empty_split(splits, report, len(rows))
    write_shards(splits, cache, config, folder, report)


def read_captioned_images(path: Path) -> list[CaptionedImage]:
    """Read the images whose captions clean_captions kept, in their order; equal captions of an image are one.

    Raises:
        FileNotFoundError: clean_captions has not run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: run `dvc repro clean_captions` first")
    captions: dict[tuple[str, str], dict[str, None]] = {}  # the inner dict is an ordered set
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        captions.setdefault((line["id"], line["image"]), {})[line["caption"]] = None
    return [
        CaptionedImage(identifier, image, first, tuple(more))
        for (identifier, image), (first, *more) in captions.items()
    ]
