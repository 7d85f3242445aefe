"""Decoding and cropping of images: sRGB on white, one size, and SDXL's size conditions. Loads no model."""

import io
import warnings
from functools import cache
from typing import TYPE_CHECKING, Literal

import imagehash
import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_Crop = Literal["center", "random"]
_ImageFault = Literal[
    "empty", "not_an_image", "damaged", "too_many_pixels", "unknown_white", "bad_colour_profile", "changed"
]
TimeIds = tuple[int, int, int, int, int, int]

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are opened. Pillow supports more, and starts Ghostscript for some of them."""
_HASH_SIDE = 8
FINGERPRINT_BITS = 3 * _HASH_SIDE**2


class BadImageError(ValueError):
    """A file that cannot be used as an image: the kind of fault, and the reason in words."""

    def __init__(self, fault: _ImageFault, reason: str) -> None:
        super().__init__(fault, reason)
        self.fault = fault
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def decode_image(content: bytes) -> Image.Image:
    """Return the first frame of an image file, upright, in 8-bit sRGB, with transparency on white.

    Raises:
        BadImageError: the file is not an image, is truncated, would decompress to an absurd size, or has
            colours whose meaning is undefined.
    """
    if not content:
        raise BadImageError("empty", "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                image.seek(0)
                image.load()
                return _on_white(_in_srgb(_in_eight_bits(ImageOps.exif_transpose(image))))
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError("not_an_image", f"none of {', '.join(_FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError("too_many_pixels", str(error)) from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:  # what Pillow's decoders raise
        raise BadImageError("damaged", str(error)) from error


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit greys to 8 bits; Pillow's conversion would clip them at 255.

    Raises:
        BadImageError: 32-bit greys, for which no convention says which value is white.
    """
    if image.mode in ("I", "F"):
        raise BadImageError(
            "unknown_white", "32 bits a pixel, and which value is white is undefined: save it with 8 or 16"
        )
    if image.mode.startswith("I;16"):
        profile = image.info.get("icc_profile")
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        image.info["icc_profile"] = profile
    return image


def _in_srgb(image: Image.Image) -> Image.Image:
    """Convert from the embedded ICC profile to sRGB, keeping alpha; without a profile keep the colours.

    Raises:
        BadImageError: the profile cannot be read, or is for another colour mode.
    """
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode == "LA" else "RGBA")
    elif image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    if not profile:
        return image
    alpha = image.getchannel("A") if image.has_transparency_data else None
    colours = image.convert(image.mode.removesuffix("A")) if alpha else image
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(colours, embedded, _srgb(), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise BadImageError("bad_colour_profile", f"its colour profile does not fit it: {error}") from error
    assert converted is not None  # it is None only for conversions in place
    if alpha:
        converted.putalpha(alpha)
    return converted


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _on_white(image: Image.Image) -> Image.Image:
    """Convert to RGB, with transparent parts on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def resize_and_crop(
    image: Image.Image, size: tuple[int, int], crop: _Crop, generator: "torch.Generator"
) -> tuple[Image.Image, TimeIds]:
    """Resize and crop an image; return SDXL's size conditions too (Podell et al. 2023, section 2.2).

    The image is resized until it just covers `size`; the rest, on one axis, is cropped.

    Args:
        size: width and height of the result, pixels.
        crop: where the result is cut out.
        generator: source of a random crop's position.

    Returns:
        The crop, and original (height, width), crop (top, left) after resizing, target (height, width).

    Raises:
        BadImageError: the image is so narrow that covering `size` takes an absurd number of pixels.
    """
    width, height = image.size
    target_width, target_height = size
    scale = max(target_width / width, target_height / height)
    resized_width = max(target_width, round(width * scale))
    resized_height = max(target_height, round(height * scale))
    # The bomb check of decode_image saw the small original; a line of 1 x 6000 pixels grows only here.
    if resized_width * resized_height > (Image.MAX_IMAGE_PIXELS or float("inf")):
        raise BadImageError(
            "too_many_pixels",
            f"too narrow: {width} x {height} would become {resized_width} x {resized_height}",
        )
    room_down, room_right = resized_height - target_height, resized_width - target_width
    if crop == "center":
        top, left = room_down // 2, room_right // 2
    else:
        import torch  # seconds, which a page that only decodes images need not wait for

        top = int(torch.randint(room_down + 1, (), generator=generator))
        left = int(torch.randint(room_right + 1, (), generator=generator))
    resized = image.resize((resized_width, resized_height), Image.Resampling.LANCZOS)
    part = resized.crop((left, top, left + target_width, top + target_height))
    return part, (height, width, top, left, target_height, target_width)


def to_bytes(image: Image.Image) -> "Tensor":
    """Return an RGB image as uint8, (3, H, W)."""
    import torch  # as above

    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def to_pixels(levels: "Tensor") -> "Tensor":
    """Scale levels of 0 to 255 to the range that the VAE reads, fp32 in [-1, 1], in the same shape."""
    return levels.float().div(127.5).sub(1)


def fingerprint(image: Image.Image) -> "Tensor":
    """Return a hash that survives resizing and compression: packed bits, uint8, (24,).

    The perceptual hash (`imagehash.phash`: signs of low frequencies) of each colour channel. With greys
    alone, the emoji of a euro and of a yen banknote would count as one image.
    """
    import torch  # as above

    small = image.resize((4 * _HASH_SIDE, 4 * _HASH_SIDE), Image.Resampling.LANCZOS)
    bits = [imagehash.phash(channel, _HASH_SIDE).hash for channel in small.split()]
    return torch.from_numpy(np.packbits(np.concatenate(bits, axis=None)))
