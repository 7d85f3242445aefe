"""Choice of the images that become examples, and of each one's split by the hash of its content.

Duplicates, unreadable images and held-out images that are near duplicates of training images are dropped
and reported.
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


def drop_duplicates(rows: Sequence[CaptionedImage], report: EncodingReport) -> list[CaptionedImage]:
    """Return the first row of each image file; report the others."""
    first: dict[str, CaptionedImage] = {}
    for row in rows:
        if row.id in first:
            detail = f"same file as {first[row.id].image}"
            report.findings.append(ImageFinding(row.image, "duplicate", True, detail))
        else:
            first[row.id] = row
    return list(first.values())


def drop_bad_images(
    rows: Sequence[CaptionedImage],
    faults: dict[str, BadImageError],
    config: EncodingConfig,
    report: EncodingReport,
) -> list[CaptionedImage]:
    """Return the rows whose image could be read; report the others.

    Raises:
        ValueError: an image is bad and encoding.strict is true; names all bad images.
    """
    bad = [
        ImageFinding(r.image, faults[r.id].fault, True, faults[r.id].reason) for r in rows if r.id in faults
    ]
    if bad and config.strict:
        lines = "".join(f"  {finding.image}: {finding.detail} ({finding.kind})\n" for finding in bad)
        raise ValueError(
            f"encoding.strict is true and {len(bad)} of {len(rows)} images are bad:\n{lines}Repair or remove "
            "them, or set encoding.strict to false to leave them out and report them"
        )
    report.findings += bad
    return [row for row in rows if row.id not in faults]


def split_by_content(rows: Sequence[CaptionedImage], held_out: float) -> dict[Split, list[CaptionedImage]]:
    """Hold out about the share `held_out` of the images, each by its hash alone, in the rows' order.

    An image's split therefore does not depend on the other images. The exception: if one split would be
    empty, the image nearest to the threshold moves there.
    """
    # SHA-256 is uniform: its first 60 bits over 2^60 are a position in [0, 1).
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


def require_no_empty_split(
    splits: dict[Split, list[CaptionedImage]], report: EncodingReport, num_rows: int
) -> None:
    """Raise ValueError, with the first images that were left out, if a split has no image."""
    left_out = [f"{finding.image} ({finding.kind})" for finding in report.findings if finding.left_out]
    for split, rows in splits.items():
        if not rows:
            raise ValueError(
                f"no usable image is left for the {split} split ({len(left_out)} of {num_rows} images were "
                f"left out: {', '.join(left_out[:3])}): add images, or correct the ones named here"
            )


def drop_leaked_images(
    splits: dict[Split, list[CaptionedImage]], cache: LatentCache, bits: int, report: EncodingReport
) -> list[CaptionedImage]:
    """Return the held-out rows that are not near duplicates of a training image; report all near duplicates.

    Args:
        bits: images whose perceptual hashes differ in at most this many bits are near duplicates.
    """
    # Training images first: `stop` then compares with training images only.
    rows = [*splits["train"], *splits["held_out"]]
    num_train = len(splits["train"])
    fingerprints = np.stack([cache.fingerprint(row).numpy() for row in rows])
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
