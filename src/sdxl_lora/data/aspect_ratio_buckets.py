"""The sizes that images are cropped to: one square, or buckets with nearly its area and other aspect ratios.

Sizes are (width, height) in pixels. This module handles numbers only, no image and no model.
"""

from collections.abc import Sequence

from sdxl_lora.config import AspectRatios

Size = tuple[int, int]

LEAST_STEP = 32
"""Sides are multiples of this many pixels: SDXL's VAE halves them three times, its UNet twice more."""
_SDXL_RESOLUTION = 1024
SDXL_TALL_SIZES: tuple[Size, ...] = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664),
    (640, 1600), (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280),
    (832, 1216), (832, 1152), (896, 1152), (896, 1088), (960, 1088), (960, 1024),
)  # fmt: skip
SDXL_WIDE_SIZES: tuple[Size, ...] = (
    (1024, 960), (1088, 960), (1088, 896), (1152, 896), (1152, 832), (1216, 832), (1280, 768),
    (1344, 768), (1408, 704), (1472, 704), (1536, 640), (1600, 640), (1664, 576), (1728, 576),
    (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
)  # fmt: skip
SDXL_SIZES = (*SDXL_TALL_SIZES, (_SDXL_RESOLUTION, _SDXL_RESOLUTION), *SDXL_WIDE_SIZES)
"""The 40 sizes that SDXL was trained on (Podell et al. 2023, arXiv:2307.01952, appendix I).

The paper lists 704 x 1344 but not 1344 x 704."""


def bucket_sizes(resolution: int, aspect_ratios: AspectRatios) -> tuple[Size, ...]:
    """Return the sizes that images of a data set may have, from tall to wide.

    No size has more pixels than the square, so whatever memory holds the square holds all of them.

    Args:
        resolution: side of the square, pixels, a multiple of 64.
        aspect_ratios: `square` gives the square only. `buckets` gives SDXL's sizes at 1024; at another
            resolution, for every long side up to twice the square's, the longest short side that does not
            exceed the square's area.
    """
    square = (resolution, resolution)
    if aspect_ratios == "square":
        return (square,)
    if resolution == _SDXL_RESOLUTION:
        return SDXL_SIZES
    step = LEAST_STEP if resolution < _SDXL_RESOLUTION else 2 * LEAST_STEP
    long_sides = range(resolution + step, 2 * resolution + 1, step)
    wide = [(side, resolution**2 // side // step * step) for side in long_sides]
    return (*((height, width) for width, height in reversed(wide)), square, *wide)


def nearest_size(image: Size, sizes: Sequence[Size]) -> Size:
    """Return the size that cuts off least of an image; of two equally good ones, the larger one."""
    return max(sizes, key=lambda size: (share_kept(image, size), size[0] * size[1]))


def share_kept(image: Size, size: Size) -> float:
    """Return the share of an image's area left after resizing it to cover `size` and cropping, in (0, 1].

    This is the smaller of the two aspect ratios over the larger one.
    """
    (width, height), (target_width, target_height) = image, size
    products = width * target_height, height * target_width
    return min(products) / max(products)
