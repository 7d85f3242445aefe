"""Which images become examples, and on which side of the split: by each one's own content.

Leaves out what is there twice, cannot be read, or would give away a training image, and reports it.
"""

from collections.abc import Sequence

import numpy as np

from sdxl_lora.config import EncodingConfig
from sdxl_lora.data.encoded_dataset import Split
from sdxl_lora.data.encoding_report import EncodingReport, ImageFinding
from sdxl_lora.data.image_loader import CaptionedImage
from sdxl_lora.data.images import FINGERPRINT_BITS, BadImageError
from sdxl_lora.data.latent_cache import LatentCache
from sdxl_lora.data.near_duplicates import nearest_earlier


def without_duplicates(rows: Sequence[CaptionedImage], report: EncodingReport) -> list[CaptionedImage]:
    """The first row of each image file; the others are put down in `report`."""
    first: dict[str, CaptionedImage] = {}
    for row in rows:
        if row.id in first:
            detail = f"same file as {first[row.id].image}"
            report.findings.append(ImageFinding(row.image, "duplicate", True, detail))
        else:
            first[row.id] = row
    return list(first.values())


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
    bad = [
        ImageFinding(r.image, faults[r.id].fault, True, faults[r.id].reason) for r in rows if r.id in faults
    ]
    if bad and config.strict:
        lines = "".join(f"  {finding.image}: {finding.detail} ({finding.kind})\n" for finding in bad)
        raise ValueError(
            f"encoding.strict is true and {len(bad)} of {len(rows)} images are bad:\n{lines}Repair or remove "
            "them, or set encoding.strict to false: they are then left out and reported"
        )
    report.findings += bad
    return [row for row in rows if row.id not in faults]


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


def without_leakage(
    sides: dict[Split, list[CaptionedImage]], entries: LatentCache, bits: int, report: EncodingReport
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
            report.findings.append(ImageFinding(row.image, kind, leaks, detail))
        if number >= num_train and not leaks:
            kept.append(row)
    return kept
