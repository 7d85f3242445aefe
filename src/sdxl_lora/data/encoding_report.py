"""Report of encoding a data set: image sizes, and findings about images."""

from collections import Counter
from dataclasses import dataclass, field

from sdxl_lora.data.aspect_ratio_buckets import Size, share_kept
from sdxl_lora.data.encoded_dataset import Batch, Example
from sdxl_lora.data.image_loader import CaptionedImage

_LEAST_KEPT = 0.5
"""Images that keep a smaller share of their area after cropping are reported."""


@dataclass(frozen=True)
class ImageFinding:
    """Something about an image that the owner of the data set should know."""

    image: str
    kind: str
    """`BadImageError.fault`, `duplicate`, `near_duplicate`, `leakage`, `upscaled` or `cropped`."""
    left_out: bool
    detail: str


@dataclass
class EncodingReport:
    """Findings, examples and sizes, collected while a data set is encoded."""

    findings: list[ImageFinding] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    """Width and height of each example's image, pixels."""
    encoded_sizes: Counter[Size] = field(default_factory=Counter)
    """Number of images encoded at each width and height."""

    def metrics(self) -> dict[str, object]:
        """Return the report as numbers."""
        splits = Counter(example.split for example in self.examples)
        kinds = Counter(finding.kind for finding in self.findings)
        return {
            "examples": {"train": splits["train"], "held_out": splits["held_out"]},
            "captions": sum(1 + len(example.more_captions) for example in self.examples),
            "left_out": sum(finding.left_out for finding in self.findings),
            "findings": dict(sorted(kinds.items())),
            "sizes": {f"{width}x{height}": n for (width, height), n in sorted(self.encoded_sizes.items())},
        }

    def note_size(self, row: CaptionedImage, batch: Batch) -> None:
        """Record an encoded image's size, with a finding if it was enlarged or mostly cut off."""
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
