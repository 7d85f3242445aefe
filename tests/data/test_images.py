import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdxl_lora.config import load_params
from sdxl_lora.data.image_loader import FEW_IMAGES, CaptionedImage, DecodedImage, ImageDataset, decode_images
from sdxl_lora.data.images import (
    BadImageError,
    decode_image,
    fingerprint,
    resize_and_crop,
    to_bytes,
    to_pixels,
)
from sdxl_lora.runtime.rng import keyed_generator
from tests.support.patterns import row_of, write_patterns


def test_missing_file_is_not_taken_for_a_bad_image(tmp_path: Path) -> None:
    row = CaptionedImage("0" * 64, "a.png", "")
    config = load_params(Path("recipes/demo.yaml")).encoding
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        list(decode_images([row], tmp_path, config, lambda _: True))


def test_workers_decode_in_order_what_one_process_decodes(tmp_path: Path) -> None:
    rows = write_patterns(tmp_path, 2 * FEW_IMAGES)
    (tmp_path / "7.png").write_bytes(b"")
    rows[7] = row_of(tmp_path / "7.png")
    config = load_params(Path("recipes/demo.yaml")).encoding
    needed = {row.id for row in rows[::2]} | {rows[7].id}
    found = list(decode_images(rows, tmp_path, config, lambda row: row.id in needed))
    alone = ImageDataset(rows, tmp_path, config, lambda row: row.id in needed)
    assert len(found) == len(rows)
    for number, outcome in enumerate(found):
        if number == 7:
            assert isinstance(outcome, BadImageError)
            assert (outcome.fault, str(outcome)) == ("empty", "the file is empty")
        elif number % 2:
            assert outcome is None
        else:
            expected = alone[number]
            assert isinstance(outcome, DecodedImage)
            assert isinstance(expected, DecodedImage)
            assert torch.equal(outcome.views[0].levels, expected.views[0].levels)
            assert torch.equal(outcome.fingerprint, expected.fingerprint)
            assert outcome.views[0].time_ids == expected.views[0].time_ids


def bits_apart(first: Image.Image, second: Image.Image) -> int:
    return int(np.unpackbits((fingerprint(first) ^ fingerprint(second)).numpy()).sum())


def test_fingerprint_survives_resizing_and_compression_alone() -> None:
    images = [decode_image(file.read_bytes()) for file in sorted(Path("demo/dataset/images").iterdir())[:40]]
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        assert bits_apart(image, decode_image(buffer.getvalue())) <= 12
        assert bits_apart(image, image.resize((90, 90))) <= 12
    different = [bits_apart(a, b) for number, a in enumerate(images) for b in images[:number]]
    assert min(different) > 12


def test_fingerprint_sees_colours() -> None:
    notes = [
        decode_image(Path(f"demo/dataset/images/{name}-banknote.webp").read_bytes())
        for name in ("euro", "yen")
    ]
    assert bits_apart(*notes) > 12


@given(width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 9), random=st.booleans())
def test_square_lies_inside_the_resized_image(width: int, height: int, seed: int, random: bool) -> None:
    image = Image.new("RGB", (width, height))
    crop = "random" if random else "center"
    square, sizes = resize_and_crop(image, (64, 64), crop, keyed_generator(seed))  # type: ignore[arg-type]
    assert square.size == (64, 64)
    assert sizes[:2] == (height, width)
    assert sizes[4:] == (64, 64)
    longer = max(64, round(max(width, height) * 64 / min(width, height)))
    assert 0 <= max(sizes[2], sizes[3]) <= longer - 64
    assert min(sizes[2], sizes[3]) == 0


def test_crop_condition_says_where_the_square_was_cut_out() -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    square, sizes = resize_and_crop(
        Image.fromarray(ramp).convert("RGB"), (64, 64), "random", keyed_generator(3)
    )
    assert square.getpixel((0, 0)) == (sizes[3],) * 3


def test_random_squares_differ_and_the_centre_is_the_centre() -> None:
    image = Image.new("RGB", (164, 64))
    lefts = {resize_and_crop(image, (64, 64), "random", keyed_generator(seed))[1][3] for seed in range(200)}
    assert min(lefts) < 10
    assert max(lefts) > 90
    assert resize_and_crop(image, (64, 64), "center", keyed_generator(0))[1][2:4] == (0, 50)


def test_pixels_reach_from_minus_one_to_one() -> None:
    image = Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8))
    assert torch.equal(to_pixels(to_bytes(image))[:, 0], torch.tensor([[-1.0, 1.0]] * 3))
