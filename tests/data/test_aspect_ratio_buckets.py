import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sdxl_lora.config import load_params
from sdxl_lora.data.aspect_ratio_buckets import (
    LEAST_STEP,
    SDXL_SIZES,
    SDXL_TALL_SIZES,
    SDXL_WIDE_SIZES,
    bucket_sizes,
    nearest_size,
    share_kept,
)
from sdxl_lora.models.architecture import SDXL_BASE, SDXLArchitecture, read_architecture
from sdxl_lora.paths import PARAMS

RESOLUTIONS = st.integers(1, 40).map(lambda number: 64 * number)
SIDES = st.integers(1, 20_000)


@given(RESOLUTIONS)
def test_buckets_have_nearly_the_squares_area_and_sides_that_the_model_can_halve(resolution: int) -> None:
    sizes = bucket_sizes(resolution, "buckets")
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes)
    ratios = [width / height for width, height in sizes]
    assert ratios == sorted(ratios)
    assert len(set(ratios)) == len(ratios)
    for width, height in sizes:
        assert width % LEAST_STEP == height % LEAST_STEP == 0
        assert resolution**2 / 2 < width * height <= resolution**2
    if resolution >= 1024:
        assert all(side % 64 == 0 for size in sizes for side in size)


@given(RESOLUTIONS)
def test_square_is_the_only_size_without_buckets(resolution: int) -> None:
    assert bucket_sizes(resolution, "square") == ((resolution, resolution),)


def test_buckets_at_1024_are_those_of_the_paper() -> None:
    """Appendix I has 40, from 0.25 to 4, none of which loses more than a tenth of the square's area."""
    sizes = bucket_sizes(1024, "buckets")
    assert sizes == SDXL_SIZES
    assert len(sizes) == 40
    assert {sizes[0], sizes[20], sizes[-1]} == {(512, 2048), (1024, 1024), (2048, 512)}
    assert {(height, width) for width, height in SDXL_WIDE_SIZES} == {*SDXL_TALL_SIZES} - {(704, 1344)}
    assert all(width * height > 0.88 * 1024**2 for width, height in sizes)


@given(SIDES, SIDES, RESOLUTIONS)
def test_an_image_goes_to_the_size_nearest_in_aspect_ratio(width: int, height: int, resolution: int) -> None:
    sizes = bucket_sizes(resolution, "buckets")
    chosen = nearest_size((width, height), sizes)

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(width / height) - math.log(size[0] / size[1]))

    assert chosen in sizes
    assert distance(chosen) <= min(map(distance, sizes)) + 1e-9
    assert share_kept((width, height), chosen) == pytest.approx(math.exp(-distance(chosen)))


@given(SIDES, SIDES, RESOLUTIONS)
def test_less_than_half_is_cut_off_unless_the_image_is_very_narrow(
    width: int, height: int, resolution: int
) -> None:
    assume(1 / 8 < width / height < 8)
    kept = share_kept((width, height), nearest_size((width, height), bucket_sizes(resolution, "buckets")))
    assert kept > 0.5


@pytest.mark.parametrize(
    "shapes", [SDXL_BASE, read_architecture(load_params(PARAMS.parent / "recipes/demo.yaml").model)]
)
def test_sides_are_what_vae_and_unet_halve(shapes: SDXLArchitecture) -> None:
    assert shapes.pixels_per_latent * 2 ** (len(shapes.unet["down_block_types"]) - 1) == LEAST_STEP
