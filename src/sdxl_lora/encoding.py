"""Images and captions to what training reads: latents, token ids, embeddings, size conditions, in shards.

The store keeps what has been encoded; this decides which examples there are, on which side of the split, and
copies them into the encoded data set in the order of the captions.
"""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sdxl_lora.buckets import Size, share_kept
from sdxl_lora.config import EncodingConfig
from sdxl_lora.dataset import Batch, Example, Split, Variant, text_digest, write_index, write_shard
from sdxl_lora.duplicates import nearest_earlier
from sdxl_lora.entries import Entries
from sdxl_lora.hardware import require_disk_space
from sdxl_lora.images import FINGERPRINT_BITS, BadImageError
from sdxl_lora.pictures import CaptionedImage
from sdxl_lora.processes import processes

LEAST_KEPT = 0.5
"""Share of an image's area below which it is reported that the rest is cut off."""


@dataclass(frozen=True)
class Share:
    """What one of several processes, counted from 0, does of a job."""

    rank: int
    processes: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def of(self, rows: Sequence[CaptionedImage]) -> list[CaptionedImage]:
        """Every n-th row. The first process goes on with all others, those last that the others do first.

        It finds them done, or does them; so it waits for nobody, and there is no barrier to time out at.
        """
        own = list(rows[self.rank :: self.processes])
        if not self.is_first:
            return own
        return own + [row for number, row in enumerate(rows) if number % self.processes][::-1]


WHOLE = Share(0, 1)


@dataclass(frozen=True)
class Finding:
    """Something about an image that whoever collected it should know."""

    image: str
    kind: str
    """A fault of the file (images.Fault), `duplicate`, `near_duplicate`, `leakage`, `upscaled`, `cropped`."""
    left_out: bool
    detail: str


@dataclass
class EncodingReport:
    """What became of the images."""

    findings: list[Finding] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    """Width and height of each example's image, pixels."""
    encoded_sizes: Counter[Size] = field(default_factory=Counter)
    """How many images were encoded at each width and height."""

    def metrics(self) -> dict[str, object]:
        """The report as numbers."""
        sides = Counter(example.split for example in self.examples)
        kinds = Counter(finding.kind for finding in self.findings)
        return {
            "examples": {"train": sides["train"], "held_out": sides["held_out"]},
            "captions": sum(1 + len(example.more_captions) for example in self.examples),
            "left_out": sum(finding.left_out for finding in self.findings),
            "findings": dict(sorted(kinds.items())),
            "sizes": {f"{width}x{height}": n for (width, height), n in sorted(self.encoded_sizes.items())},
        }


def encode_dataset(
    rows: Sequence[CaptionedImage],
    entries: Entries,
    config: EncodingConfig,
    folder: Path,
    report: EncodingReport,
    share: Share = WHOLE,
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
    write_dataset(sides, entries, config, folder, report)


def write_dataset(
    sides: dict[Split, list[CaptionedImage]],
    entries: Entries,
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
        for number, rows in enumerate(shards_of_one_size(members, entries, config)):
            shard = f"{split}-{number:05d}.safetensors"
            examples = [Encoded(row, entries, config.flip) for row in rows]
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
                note_size(row, example.first, report)
        report.examples += [written[row.id] for row in members]
    write_index(partial, report.examples)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


class Encoded:
    """All that was encoded of a row: each a batch of one."""

    def __init__(self, row: CaptionedImage, entries: Entries, flip: bool) -> None:
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


def shards_of_one_size(
    rows: Sequence[CaptionedImage], entries: Entries, config: EncodingConfig
) -> Iterator[list[CaptionedImage]]:
    """The rows of each shard, size by size, in the order of the data set within each."""
    by_size: dict[Size, list[CaptionedImage]] = defaultdict(list)
    for row in rows:
        by_size[entries.size(row)].append(row)
    for size in sorted(by_size):
        members = by_size[size]
        for start in range(0, len(members), config.shard_size):
            yield members[start : start + config.shard_size]


def without_bad_images(
    rows: Sequence[CaptionedImage],
    faults: dict[str, BadImageError],
    config: EncodingConfig,
    report: EncodingReport,
) -> list[CaptionedImage]:
    """The rows whose image could be read; the others are put down in `report`.

    Raises:
        ValueError: there are others, and encoding.strict is true; names them all.
    """
    bad = [Finding(r.image, faults[r.id].fault, True, faults[r.id].reason) for r in rows if r.id in faults]
    if bad and config.strict:
        lines = "".join(f"  {finding.image}: {finding.detail} ({finding.kind})\n" for finding in bad)
        raise ValueError(
            f"encoding.strict is true and {len(bad)} of {len(rows)} images are bad:\n{lines}Repair or remove "
            "them, or set encoding.strict to false: they are then left out and reported"
        )
    report.findings += bad
    return [row for row in rows if row.id not in faults]


def note_size(row: CaptionedImage, batch: Batch, report: EncodingReport) -> None:
    """Puts the size of an image down in `report`, and that it is too small or too narrow, if it is."""
    height, width, _, _, target_height, target_width = batch.time_ids[0].tolist()
    report.sizes.append((width, height))
    report.encoded_sizes[target_width, target_height] += 1
    factor = max(target_height / height, target_width / width)
    if factor > 1:
        detail = f"{width} x {height}, enlarged {factor:.2f} times"
        report.findings.append(Finding(row.image, "upscaled", False, detail))
    kept = share_kept((width, height), (target_width, target_height))
    if kept < LEAST_KEPT:
        detail = f"{width} x {height}, of which {1 - kept:.0%} are cut off"
        report.findings.append(Finding(row.image, "cropped", False, detail))


def without_duplicates(rows: Sequence[CaptionedImage], report: EncodingReport) -> list[CaptionedImage]:
    """The first row of each image file; the others are put down in `report`."""
    first: dict[str, CaptionedImage] = {}
    for row in rows:
        if row.id in first:
            detail = f"same file as {first[row.id].image}"
            report.findings.append(Finding(row.image, "duplicate", True, detail))
        else:
            first[row.id] = row
    return list(first.values())


def without_leakage(
    sides: dict[Split, list[CaptionedImage]], entries: Entries, bits: int, report: EncodingReport
) -> list[CaptionedImage]:
    """The held-out rows whose picture is not nearly a training one; near duplicates go into `report`."""
    rows = [*sides["train"], *sides["held_out"]]
    num_train = len(sides["train"])
    fingerprints = np.stack([entries.fingerprint(row).numpy() for row in rows])
    nearest, distances = nearest_earlier(fingerprints)
    nearest_trained, distances_trained = nearest_earlier(fingerprints, stop=num_train)
    kept = []
    for number, row in enumerate(rows):
        leaks = number >= num_train and bool(distances_trained[number] <= bits)
        other, distance = (nearest_trained, distances_trained) if leaks else (nearest, distances)
        if distance[number] <= bits:
            detail = f"{distance[number]} of {FINGERPRINT_BITS} bits from {rows[other[number]].image}"
            kind = "leakage" if leaks else "near_duplicate"
            report.findings.append(Finding(row.image, kind, leaks, detail))
        if number >= num_train and not leaks:
            kept.append(row)
    return kept


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


def refuse_empty_split(
    sides: dict[Split, list[CaptionedImage]], report: EncodingReport, num_rows: int
) -> None:
    left_out = [f"{finding.image} ({finding.kind})" for finding in report.findings if finding.left_out]
    for split, rows in sides.items():
        if not rows:
            raise ValueError(
                f"no usable image is left for the {split} split ({len(left_out)} of {num_rows} images were "
                f"left out: {', '.join(left_out[:3])}): add images, or correct those that are named"
            )


def own_share() -> Share:
    """This process's."""
    state = processes()
    return Share(state.process_index, state.num_processes)


def read_captions(path: Path) -> list[CaptionedImage]:
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
