"""The sizes that images are cropped to: a square, or buckets of nearly its area and of every aspect ratio.

Sizes are (width, height) in pixels. Knows no image and no model.
"""

from collections.abc import Sequence

from sdxl_lora.config import AspectRatios

Size = tuple[int, int]

LEAST_STEP = 32
"""What SDXL's sides are multiples of: its VAE halves them three times, its UNet twice more."""
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
"""The 40 that SDXL was trained on (Podell et al. 2023, arXiv:2307.01952, appendix I). 1344 x 704 is not among
them, though 704 x 1344 is."""


def bucket_sizes(resolution: int, aspect_ratios: AspectRatios) -> tuple[Size, ...]:
    """The sizes that images of a data set may have, from tall to wide.

    None has more pixels than the square, so what the square fits into, all do.

    Args:
        resolution: side of the square, pixels, a multiple of 64.
        aspect_ratios: `square` has this size alone. `buckets` are SDXL's own at 1024; elsewhere, for every
            long side up to twice the square's, the short side that keeps most of its area.
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
    """The size whose aspect ratio is nearest to that of an image, so that least of it is cut off.

    Of two that are equally near, the larger one.
    """
    return max(sizes, key=lambda size: (share_kept(image, size), size[0] * size[1]))


def share_kept(image: Size, size: Size) -> float:
    """Share of an image's area that is left of it, resized to cover `size` and cropped to it, in (0, 1].

    It is the smaller aspect ratio over the larger one.
    """
    (width, height), (target_width, target_height) = image, size
    products = width * target_height, height * target_width
    return min(products) / max(products)
