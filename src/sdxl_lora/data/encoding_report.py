"""What the encoding of a data set found out: sizes, and what is wrong with images."""

from collections import Counter
from dataclasses import dataclass, field

from sdxl_lora.data.aspect_ratio_buckets import Size, share_kept
from sdxl_lora.data.encoded_dataset import Batch, Example
from sdxl_lora.data.image_loader import CaptionedImage

_LEAST_KEPT = 0.5
"""Share of an image's area below which it is reported that the rest is cut off."""


@dataclass(frozen=True)
class ImageFinding:
    """Something about an image that whoever collected it should know."""

    image: str
    kind: str
    """A fault of the file (images.Fault), `duplicate`, `near_duplicate`, `leakage`, `upscaled`, `cropped`."""
    left_out: bool
    detail: str


@dataclass
class EncodingReport:
    """What became of the images."""

    findings: list[ImageFinding] = field(default_factory=list)
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

    def note_size(self, row: CaptionedImage, batch: Batch) -> None:
        """Puts down an encoded image's size, and that it is too small or too narrow, if it is."""
        height, width, _, _, target_height, target_width = batch.time_ids[0].tolist()
        self.sizes.append((width, height))
        self.encoded_sizes[target_width, target_height] += 1
        factor = max(target_height / height, target_width / width)
        if factor > 1:
            detail = f"{width} x {height}, enlarged {factor:.2f} times"
            self.findings.append(ImageFinding(row.image, "upscaled", False, detail))
        kept = share_kept((width, height), (target_width, target_height))
        if kept < _LEAST_KEPT:
            detail = f"{width} x {height}, of which {1 - kept:.0%} are cut off"
            self.findings.append(ImageFinding(row.image, "cropped", False, detail))
