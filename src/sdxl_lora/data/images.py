"""Pictures as the VAE wants them: sRGB on white, one size, size conditions kept. Knows no model."""

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
"""What is opened. Pillow knows more, and would start Ghostscript for some of it."""
_HASH_SIDE = 8
FINGERPRINT_BITS = 3 * _HASH_SIDE**2


class BadImageError(ValueError):
    """A file that cannot become a picture, and why."""

    def __init__(self, fault: _ImageFault, reason: str) -> None:
        super().__init__(fault, reason)
        self.fault = fault
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def decode_image(content: bytes) -> Image.Image:
    """The first frame of an image file, upright, 8-bit sRGB, transparency on white.

    Raises:
        BadImageError: the file is none, is cut off, would unpack to an absurd size, or has colours that
            nothing explains.
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
    """Greys of 16 bits as 8; Pillow's own conversion clips them at 255.

    Raises:
        BadImageError: 32-bit greys, whose white is not agreed upon.
    """
    if image.mode in ("I", "F"):
        raise BadImageError(
            "unknown_white", "32 bits a pixel, and nothing says which is white: save it with 8 or 16"
        )
    if image.mode.startswith("I;16"):
        profile = image.info.get("icc_profile")
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        image.info["icc_profile"] = profile
    return image


def _in_srgb(image: Image.Image) -> Image.Image:
    """Colours as the embedded ICC profile means them, as RGB with or without alpha; without a profile as is.

    Raises:
        BadImageError: the profile cannot be read, or is for another kind of colours.
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
    assert converted is not None  # None is for conversions in place
    if alpha:
        converted.putalpha(alpha)
    return converted


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _on_white(image: Image.Image) -> Image.Image:
    """`image` as RGB, its transparent parts white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def resize_and_crop(
    image: Image.Image, size: tuple[int, int], crop: _Crop, generator: "torch.Generator"
) -> tuple[Image.Image, TimeIds]:
    """The part that the model is shown, and SDXL's size conditions (Podell et al. 2023, section 2.2).

    The image is resized until it just covers `size`; what sticks out on one side is cropped.

    Args:
        size: width and height of the part, pixels.
        crop: where it is cut out.
        generator: what a random crop is drawn from.

    Returns:
        The part, and original (height, width), crop (top, left) after resizing, target (height, width).

    Raises:
        BadImageError: the image is so narrow that covering `size` takes an absurd number of pixels.
    """
    width, height = image.size
    target_width, target_height = size
    scale = max(target_width / width, target_height / height)
    resized_width = max(target_width, round(width * scale))
    resized_height = max(target_height, round(height * scale))
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
    """An RGB image as uint8, (3, H, W)."""
    import torch  # as above

    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def to_pixels(levels: "Tensor") -> "Tensor":
    """Levels of 0 to 255 as the VAE reads them, fp32 in [-1, 1], of the same shape."""
    return levels.float().div(127.5).sub(1)


def fingerprint(image: Image.Image) -> "Tensor":
    """A hash that survives resizing and compression: packed bits, uint8, (24,).

    The perceptual hash (`imagehash.phash`: signs of low frequencies) of each colour: of greys alone, a euro
    and a yen banknote would pass for one picture.
    """
    import torch  # as above

    small = image.resize((4 * _HASH_SIDE, 4 * _HASH_SIDE), Image.Resampling.LANCZOS)
    bits = [imagehash.phash(channel, _HASH_SIDE).hash for channel in small.split()]
    return torch.from_numpy(np.packbits(np.concatenate(bits, axis=None)))
