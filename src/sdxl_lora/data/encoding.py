"""Images and captions to what training reads: latents, token ids, embeddings, size conditions, in shards.

The store keeps what has been encoded; `selection` decides which examples there are, and on which side of the
split, and `shards` copies them into the encoded data set.
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
    refuse_empty_split,
    split_by_content,
    without_bad_images,
    without_duplicates,
    without_leakage,
)
from sdxl_lora.runtime.distributed import distributed_state
from sdxl_lora.storage.atomic_io import require_disk_space


@dataclass(frozen=True)
class RankShare:
    """What one of several processes, counted from 0, does of a job."""

    rank: int
    num_processes: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def of(self, rows: Sequence[CaptionedImage]) -> list[CaptionedImage]:
        """Every n-th row. The first process goes on with all others, those last that the others do first.

        It finds them done, or does them; so it waits for nobody, and there is no barrier to time out at.
        """
        own = list(rows[self.rank :: self.num_processes])
        if not self.is_first:
            return own
        return own + [row for number, row in enumerate(rows) if number % self.num_processes][::-1]


_SINGLE_RANK = RankShare(0, 1)


def rank_share() -> RankShare:
    """This process's."""
    state = distributed_state()
    return RankShare(state.process_index, state.num_processes)


def encode_dataset(
    rows: Sequence[CaptionedImage],
    entries: LatentCache,
    config: EncodingConfig,
    folder: Path,
    report: EncodingReport,
    share: RankShare = _SINGLE_RANK,
) -> Iterator[int]:
    """Writes the encoded data set into `folder`, yielding the number of images done since the last time.

    Every image falls on the same side of the split whatever else is in the data set. A bad image is left out
    and put down in `report`. `folder` appears once it is complete. Of several processes, the first writes it;
    the others put their share into the store and are done.

    Raises:
        ValueError: an image is bad and encoding.strict is true; latents are not finite; or a side of the
            split has no image left.
        OSError: an image file is missing, or the disk is too full.
    """
    require_disk_space(folder, 2 * sum(map(entries.num_bytes, rows)))  # the store, and the shards
    unique = without_duplicates(rows, report)
    yield len(rows) - len(unique)
    faults: dict[str, BadImageError] = {}
    for row, fault in entries.encode(share.of(unique)):
        if fault is not None:
            faults[row.id] = fault
        yield 1
    if not share.is_first:
        return
    readable = without_bad_images(unique, faults, config, report)
    sides = split_by_content(readable, config.held_out)
    refuse_empty_split(sides, report, len(rows))
    if config.near_duplicate_bits is not None:
        sides["held_out"] = without_leakage(sides, entries, config.near_duplicate_bits, report)
        refuse_empty_split(sides, report, len(rows))
    write_shards(sides, entries, config, folder, report)


def read_captioned_images(path: Path) -> list[CaptionedImage]:
    """The images whose captions clean_captions kept, in their order. Equal captions of an image are one.

    Raises:
        FileNotFoundError: it did not run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: run `dvc repro clean_captions` first")
    captions: dict[tuple[str, str], dict[str, None]] = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        captions.setdefault((line["id"], line["image"]), {})[line["caption"]] = None
    return [
        CaptionedImage(identifier, image, first, tuple(more))
        for (identifier, image), (first, *more) in captions.items()
    ]
