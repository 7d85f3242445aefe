"""Inputs that collections have and pipelines fail at, and what each of them is expected to get.

`python -m tests.support.bad_inputs` writes docs/bad-inputs.md from what the library really does with them.
"""

import hashlib
import io
import pickle
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from sdxl_lora.config import load_params
from sdxl_lora.data.captions import CaptionsReport, clean_captions
from sdxl_lora.data.encoders import load_encoders
from sdxl_lora.data.encoding import encode_dataset
from sdxl_lora.data.encoding_report import EncodingReport, ImageFinding
from sdxl_lora.data.image_loader import CaptionedImage
from sdxl_lora.data.latent_cache import LatentCache
from sdxl_lora.models.tokenizers import count_tokens, load_tokenizers
from sdxl_lora.storage.content_store import ContentStore
from tests.support.patterns import pattern
from tests.support.tables import table

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs/bad-inputs.md"
HELD_OUT = 0.5
GOOD = 12
ORIENTATION = 0x0112
COMMON_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000")
HEAD = """# Bad inputs and how they are handled

`python -m tests.support.bad_inputs` passes these inputs to the library and writes this page from the results.
`tests/pipeline/test_bad_inputs.py` checks every line. No input on this page stops the stage, unless
`encoding.strict` is true, and the {good} good images in the same data set are encoded.
"""


@dataclass(frozen=True)
class ImageCase:
    """An image file, and what must come of it."""

    name: str
    content: bytes
    kind: str | None
    """Of the finding that is reported; None: none is."""
    becomes: Image.Image | None = None
    """The picture that must be encoded; None: the file is left out."""
    tolerance: int = 0
    """Of that picture, levels."""
    id: str | None = None
    """If it is not the hash of `content`."""


@dataclass(frozen=True)
class CaptionCase:
    """A caption, and what must come of it."""

    name: str
    caption: str
    clean: str | None
    """None: rejected."""


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + checksum


def png_header(width: int, height: int) -> bytes:
    """A grey PNG that says it has this size, with next to no data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(b"")), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_damage(content: bytes, position: int) -> bytes:
    damaged = bytearray(content)
    damaged[position] ^= 0xFF
    return bytes(damaged)


def profile_with_red_and_green_swapped() -> bytes:
    """The sRGB profile but for the meaning of its first two channels."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


def swapped(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    return Image.merge("RGB", (green, red, blue))


def half_transparent(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The picture with its left half transparent, and what it looks like on white."""
    half = (0, 0, image.width // 2, image.height)
    transparent, on_white = image.convert("RGBA"), image.copy()
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, half)
    transparent.putalpha(alpha)
    on_white.paste((255, 255, 255), half)
    return transparent, on_white


def on_side(held_out: bool, variants: Iterator[bytes]) -> bytes:
    """The first variant of a file whose hash puts it on this side of the split."""
    return next(
        v for v in variants if (int(hashlib.sha256(v).hexdigest()[:15], 16) / 16**15 < HELD_OUT) == held_out
    )


def png_variants(image: Image.Image) -> Iterator[bytes]:
    """The same picture in files of different hashes."""
    for number in count():
        info = PngInfo()
        info.add_text("comment", str(number))
        yield saved(image, "PNG", pnginfo=info)


def files_that_are_no_images() -> list[ImageCase]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "a")
    contents = {
        "text": b"hello, I am a picture",
        "an error page": b"<!doctype html><html><body>404 Not Found</body></html>",
        "JSON": b'{"error": "quota exceeded"}',
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "EPS, which Pillow would give to Ghostscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "a ZIP archive": archive.getvalue(),
        "a pickle": pickle.dumps({"image": [1, 2, 3]}),
        "a video (MP4)": b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2" + bytes(64),
        "HEIC, which Pillow does not read": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00heicmif1" + bytes(64),
        "a PNG signature and nothing else": b"\x89PNG\r\n\x1a\n",
        "random bytes": np.random.default_rng(0).bytes(999),
    }
    empty = ImageCase("an empty file", b"", "empty")
    return [empty, *(ImageCase(name, content, "not_an_image") for name, content in contents.items())]


def damaged_images() -> list[ImageCase]:
    cases = []
    for number, kind in enumerate(COMMON_FORMATS):
        content = saved(pattern(200 + number), kind)
        fault = "not_an_image" if kind == "AVIF" else "damaged"  # its decoder looks at all of it first
        cases.append(ImageCase(f"{kind} cut off in the middle", content[: len(content) // 2], fault))
    png, jpeg = saved(pattern(210), "PNG"), saved(pattern(211), "JPEG")
    cases += [
        ImageCase("PNG with a flipped byte in its pixels", with_damage(png, len(png) // 2), "damaged"),
        ImageCase("JPEG without its last 200 bytes", jpeg[:-200], "damaged"),
        ImageCase("JPEG with only its header", jpeg[:170], "damaged"),
        ImageCase("PNG with a declared width of 0 pixels", png_header(0, 9), "not_an_image"),
    ]
    return cases


def hostile_images() -> list[ImageCase]:
    info = PngInfo()
    info.add_text("comment", "a" * 70_000_000, zip=True)
    return [
        ImageCase(
            "decompression bomb: PNG of 70 bytes with a declared size of 400 million pixels",
            png_header(20_000, 20_000),
            "too_many_pixels",
        ),
        ImageCase(
            "decompression bomb: PNG of 100 million pixels, one bit each",
            saved(Image.new("1", (10_000, 10_000)), "PNG"),
            "too_many_pixels",
        ),
        ImageCase(
            "decompression bomb: PNG with a compressed comment of 70 MB",
            saved(pattern(220), "PNG", pnginfo=info),
            "damaged",
        ),
        ImageCase(
            "extreme aspect ratio: 1 x 6000 pixels",
            saved(Image.new("RGB", (1, 6000)), "PNG"),
            "too_many_pixels",
        ),
    ]


def images_with_unknown_colours() -> list[ImageCase]:
    greys = np.random.default_rng(0).random((128, 128))
    return [
        ImageCase(
            "TIFF of 32-bit floats", saved(Image.fromarray(greys.astype(np.float32)), "TIFF"), "unknown_white"
        ),
        ImageCase(
            "TIFF of 32-bit integers",
            saved(Image.fromarray((greys * 1e6).astype(np.int32)), "TIFF"),
            "unknown_white",
        ),
        ImageCase(
            "invalid colour profile",
            saved(pattern(230), "PNG", icc_profile=b"not a profile"),
            "bad_colour_profile",
        ),
        ImageCase(
            "greyscale image with a profile for RGB",
            saved(pattern(231).convert("L"), "PNG", icc_profile=profile_with_red_and_green_swapped()),
            "bad_colour_profile",
        ),
    ]


def odd_images() -> list[ImageCase]:
    """What is unusual, and must come out as a viewer shows it."""
    p = [pattern(number) for number in range(240, 260)]
    exif_turned, exif_mirrored = Image.Exif(), Image.Exif()
    exif_turned[ORIENTATION], exif_mirrored[ORIENTATION] = 6, 2
    transparent, on_white = half_transparent(p[2])
    palette = p[3].quantize(64)
    palette_clear, _ = half_transparent(p[4])
    palette_clear = palette_clear.quantize(64, method=Image.Quantize.FASTOCTREE)
    grey = np.asarray(p[5].convert("L"))
    dark = (np.asarray(p[6].convert("L")) // 8).astype(np.uint16)
    profile = profile_with_red_and_green_swapped()
    gif = [p[8].quantize(256), p[9].quantize(256)]
    frames = [p[10], p[11]]
    turn, mirror = Image.Transpose.ROTATE_90, Image.Transpose.FLIP_LEFT_RIGHT
    return [
        ImageCase(
            "JPEG turned by 90 degrees (EXIF orientation 6)",
            saved(p[0].transpose(turn), "JPEG", quality=95, exif=exif_turned),
            None,
            p[0],
            20,
        ),
        ImageCase(
            "mirrored PNG (EXIF orientation 2)",
            saved(p[1].transpose(mirror), "PNG", exif=exif_mirrored),
            None,
            p[1],
        ),
        ImageCase("PNG, half transparent: on white", saved(transparent, "PNG"), None, on_white),
        ImageCase("PNG with a palette", saved(palette, "PNG"), None, palette.convert("RGB")),
        ImageCase(
            "PNG with a palette, half transparent: on white",
            saved(palette_clear, "PNG"),
            None,
            on_white_of(palette_clear),
        ),
        ImageCase(
            "PNG with 16-bit greyscale",
            saved(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
            None,
            Image.fromarray(grey).convert("RGB"),
        ),
        ImageCase(
            "PNG with 16-bit greyscale, dark: stays dark",
            saved(Image.fromarray(dark * 257), "PNG"),
            None,
            Image.fromarray(dark.astype(np.uint8)).convert("RGB"),
        ),
        ImageCase("TIFF in CMYK", saved(p[7].convert("CMYK"), "TIFF"), None, p[7], 1),
        ImageCase(
            "JPEG in CMYK, inverted as Adobe does",
            saved(p[12].convert("CMYK"), "JPEG", quality=95),
            None,
            p[12],
            30,
        ),
        ImageCase(
            "animated GIF: its first frame",
            saved(gif[0], "GIF", save_all=True, append_images=gif[1:]),
            None,
            gif[0].convert("RGB"),
        ),
        ImageCase(
            "animated WebP: its first frame",
            saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
            None,
            frames[0],
        ),
        ImageCase(
            "animated PNG: its first frame",
            saved(p[13], "PNG", save_all=True, append_images=[p[14]]),
            None,
            p[13],
        ),
        ImageCase(
            "PNG with another colour profile: converted to sRGB",
            saved(swapped(p[15]), "PNG", icc_profile=profile),
            None,
            p[15],
            2,
        ),
        ImageCase(
            "PNG, half transparent, with another colour profile",
            saved(half_transparent(swapped(p[16]))[0], "PNG", icc_profile=profile),
            None,
            half_transparent(p[16])[1],
            2,
        ),
        ImageCase(
            "JPEG followed by 1,000 bytes of other data",
            saved(p[17], "JPEG", quality=95) + bytes(1000),
            None,
            p[17],
            20,
        ),
        ImageCase(
            "PNG in black and white, one bit per pixel",
            saved(p[18].convert("1"), "PNG"),
            None,
            p[18].convert("1").convert("RGB"),
        ),
    ]


def on_white_of(image: Image.Image) -> Image.Image:
    """By pasting with a mask, not as the library does."""
    white, transparent = Image.new("RGB", image.size, "white"), image.convert("RGBA")
    white.paste(transparent, mask=transparent.getchannel("A"))
    return white


def images_beside_others() -> list[ImageCase]:
    """What is bad because of the data set that it is in."""
    original, trained, near = pattern(0), pattern(1), pattern(2)
    small, narrow = pattern(260, (40, 64)), pattern(262, (640, 128))
    larger = near.resize((160, 160))
    return [
        ImageCase("a duplicate file", saved(original, "PNG"), "duplicate"),
        ImageCase(
            "an enlarged copy of a training image",
            on_side(False, png_variants(larger)),
            "near_duplicate",
            larger,
        ),
        ImageCase(
            "a copy of a training image, held out",
            on_side(True, png_variants(trained.resize((200, 200)))),
            "leakage",
        ),
        ImageCase("an image of 40 x 64 pixels", saved(small, "PNG"), "upscaled", small),
        ImageCase("an image of 640 x 128 pixels", saved(narrow, "PNG"), "cropped", narrow),
        ImageCase(
            "a file that was changed after the download", saved(pattern(261), "PNG"), "changed", id="0" * 64
        ),
    ]


def good_images() -> list[ImageCase]:
    """Pictures without fault; the first are trained on, since others are near them."""
    first = [ImageCase("good", saved(pattern(0), "PNG"), None, pattern(0))]
    first += [
        ImageCase("good", on_side(False, png_variants(pattern(number))), None, pattern(number))
        for number in (1, 2)
    ]
    return first + [ImageCase("good", saved(pattern(n), "PNG"), None, pattern(n)) for n in range(3, GOOD)]


GROUPS: dict[str, Callable[[], list[ImageCase]]] = {
    "Files that are not images": files_that_are_no_images,
    "Damaged images": damaged_images,
    "Hostile images": hostile_images,
    "Images with ambiguous colours": images_with_unknown_colours,
    "Unusual images": odd_images,
    "Images that conflict with other images": images_beside_others,
}

CAPTIONS = [
    CaptionCase("empty", "", None),
    CaptionCase("white space", " \n\t ", None),
    CaptionCase("a single word", "cat", None),
    CaptionCase("only a word invented by a captioning model", "an arafed", None),
    CaptionCase("a word invented by a captioning model", "an arafed man with a hat", "a man with a hat"),
    CaptionCase("a repeated phrase", "a man in a hat in a hat in a hat in a hat", "a man in a hat"),
    CaptionCase("repeated words", "a a man with with a hat", "a man with a hat"),
    CaptionCase("UTF-8 read as Latin-1", "a cafÃ© in paris", "a café in paris"),
    CaptionCase("HTML entities", "Naruto&#39;s friend &amp; his dog", "Naruto's friend & his dog"),
    CaptionCase("control characters", "a man\x00 with\x07 a hat", "a man with a hat"),
    CaptionCase("letters of two code points", "a cafe\u0301 at night", "a café at night"),
    CaptionCase("white space inside", "a  man ,\n smiling", "a man, smiling"),
    CaptionCase(
        "a script: kept as words, escaped in reports",
        "<script>alert(1)</script> by a man",
        "<script>alert(1)</script> by a man",
    ),
]


def image_cases() -> dict[str, list[ImageCase]]:
    return {title: make() for title, make in GROUPS.items()}


def encode_all(folder: Path, cases: list[ImageCase]) -> tuple[EncodingReport, Path]:
    """Encodes one data set of all cases, whose files are named by their number; its report and folder."""
    params = load_params(REPOSITORY / "recipes/demo.yaml")
    model = params.model.model_copy(update={"base": str(REPOSITORY / params.model.base)})
    config = params.encoding.model_copy(update={"held_out": HELD_OUT, "batch_size": 4})
    images = folder / "images"
    images.mkdir()
    rows = []
    for number, case in enumerate(cases):
        name = f"{number:03d}.img"
        (images / name).write_bytes(case.content)
        digest = case.id or hashlib.sha256(case.content).hexdigest()
        rows.append(CaptionedImage(digest, name, f"picture {number}"))
    encoders = load_encoders(model, config, torch.device("cpu"))
    report = EncodingReport()
    entries = LatentCache(ContentStore(folder / "store"), encoders, config, images)
    list(encode_dataset(rows, entries, config, folder / "encoded", report))
    return report, folder / "encoded"


def clean_all(cases: list[CaptionCase]) -> tuple[pd.DataFrame, CaptionsReport]:
    """Cleans all captions of the cases, whose images are named by their number."""
    params = load_params(REPOSITORY / "recipes/demo.yaml")
    model = params.model.model_copy(update={"base": str(REPOSITORY / params.model.base)})
    tokenizers = load_tokenizers(model)
    rows = [{"id": str(n), "image": str(n), "caption": case.caption} for n, case in enumerate(cases)]
    return clean_captions(pd.DataFrame(rows), params.captions, lambda texts: count_tokens(tokenizers, texts))


def verdict(findings: list[ImageFinding]) -> str:
    left_out = any(finding.left_out for finding in findings)
    reasons = "; ".join(f"`{finding.kind}`: {without_counts(finding.detail)}" for finding in findings)
    return ("left out, " if left_out else "encoded, " if findings else "encoded") + reasons


def without_counts(detail: str) -> str:
    """Pillow's messages, without numbers that depend on how a file was compressed."""
    return re.sub(r" \(\d+ bytes not processed\)", "", detail)


def document() -> str:
    """The page, from what happens to the cases now."""
    groups = image_cases()
    good = good_images()
    cases = good + [case for group in groups.values() for case in group]
    with TemporaryDirectory() as folder:
        report, _ = encode_all(Path(folder), cases)
    lines, number = [HEAD.format(good=len(good))], len(good)
    for title, group in groups.items():
        rows = []
        for case in group:
            own = [finding for finding in report.findings if finding.image == f"{number:03d}.img"]
            rows.append((case.name, verdict(own)))
            number += 1
        lines.append(f"\n## {title}\n\n{table(('input', 'result'), rows)}")
    frame, captions = clean_all(CAPTIONS)
    cleaned = dict(zip(frame["image"], frame["caption"], strict=True))
    reasons = {entry["image"]: entry["reason"] for entry in captions.rejections}
    said = []
    for position, caption in enumerate(CAPTIONS):
        key = str(position)
        text = f"`{cleaned[key]}`" if key in cleaned else f"rejected: {reasons[key]}"
        said.append((caption.name, f"`{ascii(caption.caption)[1:-1]}`", text))
    lines.append(f"\n## Captions\n\n{table(('input', 'caption', 'result'), said)}")
    return "".join(lines)


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
    sys.stdout.write(f"{DOCUMENT.relative_to(REPOSITORY)} written\n")
