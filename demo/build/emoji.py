"""The demo's emoji: labels, styles and images from pinned npm packages.

An image is a (label, style) pair, e.g. ("red apple", "noto"), with the caption "red apple, noto style". This
module depends on npm package layouts and SVG, not on the use of the images.
"""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

# emojibase's group numbers: skin-tone components and flags do not show objects.
SKIPPED_GROUPS = {None, 2, 9}
# Near duplicates that look the same at 128 pixels: families, clock faces, and "man cook" and "woman cook" in
# addition to "cook".
NEAR_DUPLICATES = re.compile(r"family|(man|woman|men|women|mrs\.|mx) (?!and )|.*(o'clock|-thirty)")


@dataclass(frozen=True)
class IconSet:
    """One npm package of SVG icons, and its style name in captions."""

    package: str
    style: str


BASE_STYLES = (
    IconSet("@iconify-json/noto", "noto"),
    IconSet("@iconify-json/twemoji", "twemoji"),
    IconSet("@iconify-json/fluent-emoji-flat", "fluent flat"),
    IconSet("@iconify-json/emojione", "emojione"),
    IconSet("@iconify-json/fluent-emoji-high-contrast", "ink"),
)
# Base styles with a shaded copy, "shaded noto" (shading.py). Ink has no surfaces to shade.
SHADED_STYLES = ("noto", "twemoji", "fluent flat", "emojione")
TARGET_PACKAGE = "@lobehub/fluent-emoji-3d"
TARGET_STYLE = "fluent 3d"


def caption(label: str, style: str) -> str:
    return f"{label}, {style} style"


def normalise_codepoints(name: str) -> str:
    """Normalise codepoints, which packages write differently: "0023-FE0F-20E3" -> "23-20e3"."""
    return "-".join(part.lstrip("0") for part in name.lower().split("-") if part != "fe0f")


def slug(label: str) -> str:
    """Return an icon set's name for a Unicode label: "person's hat: red" -> "persons-hat-red"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['\u2019]", "", label.lower())).strip("-")


def load_labels(packages: Path) -> dict[str, str]:
    """Return the lower-case English label of every emoji in the demo, by codepoints."""
    data = packages / "emojibase-data"
    labels = {}
    for emoji in json.loads((data / "en/data.json").read_text()):
        if emoji.get("group") in SKIPPED_GROUPS:
            continue
        label = re.sub(r"[“”]", "", emoji["label"]).replace("\u2019", "'").lower()
        if NEAR_DUPLICATES.match(label):
            continue
        labels[normalise_codepoints(emoji["hexcode"])] = label
    return labels


def icon_svgs(packages: Path, icons: IconSet, labels: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (label, SVG document) for the labels that an icon set covers, in the order of `labels`."""
    folder = packages / icons.package
    content = json.loads((folder / "icons.json").read_text())
    names = icon_names(packages, icons)
    aliases = content.get("aliases", {})
    for codepoints, label in labels.items():
        name = names.get(codepoints, slug(label))
        icon = content["icons"].get(name) or content["icons"].get(aliases.get(name, {}).get("parent", ""))
        if icon is None:
            continue
        width = icon.get("width", content.get("width", 16))
        height = icon.get("height", content.get("height", 16))
        yield (
            label,
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="256" height="256">{icon["body"]}</svg>',
        )


def icon_names(packages: Path, icons: IconSet) -> dict[str, str]:
    """Return icon names by codepoints; empty for sets that name icons only after the labels."""
    table = json.loads((packages / icons.package / "chars.json").read_text())
    return {normalise_codepoints(codepoints): name for codepoints, name in table.items()}


def target_images(packages: Path, labels: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    """Yield (label, encoded image) in the target style, in the order of `labels`."""
    files = {
        normalise_codepoints(file.stem): file
        for file in (packages / TARGET_PACKAGE / "assets").glob("*.webp")
    }
    for codepoints, label in labels.items():
        if codepoints in files:
            yield label, files[codepoints].read_bytes()


def rasterise(svg: str) -> bytes:
    """Render an SVG document as PNG."""
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=svg))


def on_white(encoded: bytes, size: int) -> Image.Image:
    """Return an encoded image on a white square with sides of `size` pixels."""
    image = Image.open(io.BytesIO(encoded)).convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def encode_flat(image: Image.Image) -> bytes:
    """Encode as lossless WebP in 128 colours: a third of the bytes, enough for anti-aliased flat art."""
    palette = image.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    encoded = io.BytesIO()
    palette.convert("RGB").save(encoded, "WEBP", lossless=True, quality=60, method=4)
    return encoded.getvalue()


def encode_shaded(image: Image.Image) -> bytes:
    """Encode as WebP at quality 92: soft gradients would show bands in a palette; lossless takes 20 kB."""
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=92, method=4)
    return encoded.getvalue()
