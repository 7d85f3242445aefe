from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdxl_lora.images import load_image, resize_and_crop, to_tensor
from sdxl_lora.randomness import generator


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_transparency_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert load_image(save(image, tmp_path / "a.png")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = save(Image.new("RGB", (4, 4), "white").convert(mode), tmp_path / "a.png")
    image = load_image(path)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    path = save(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), tmp_path / "a.jpg")
    assert load_image(path).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_greys(tmp_path: Path) -> None:
    ramp = np.array([[0, 32767, 65535]], dtype=np.uint16)
    image = load_image(save(Image.fromarray(ramp), tmp_path / "a.png"))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (127, 127, 127), (255, 255, 255)]


def test_dark_sixteen_bit_pictures_stay_dark(tmp_path: Path) -> None:
    dark = Image.fromarray(np.full((4, 4), 2570, dtype=np.uint16))
    assert load_image(save(dark, tmp_path / "a.png")).getpixel((0, 0)) == (10, 10, 10)


def test_greys_without_a_known_white_are_refused(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.ones((4, 4), dtype=np.float32)), tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"a\.tiff: .* which value is white"):
        load_image(path)


def test_missing_file_is_not_taken_for_a_bad_image(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        load_image(tmp_path / "a.png")


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(save(Image.new("RGB", (8, 4)), tmp_path / "a.jpg", exif=exif)).size == (4, 8)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    whole = save(Image.effect_noise((64, 64), 50), tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    for name in ("cut.png", "empty.png", "text.png"):
        with pytest.raises(ValueError, match=rf"{name}: not a readable image"):
            load_image(tmp_path / name)


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(Image.new("1", (300, 300)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb.png: too many pixels"):
        load_image(path)


@given(width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 9), random=st.booleans())
def test_square_lies_inside_the_resized_image(width: int, height: int, seed: int, random: bool) -> None:
    image = Image.new("RGB", (width, height))
    crop = "random" if random else "center"
    square, sizes = resize_and_crop(image, 64, crop, generator(seed))  # type: ignore[arg-type]
    assert square.size == (64, 64)
    assert sizes[:2] == (height, width)
    assert sizes[4:] == (64, 64)
    longer = max(64, round(max(width, height) * 64 / min(width, height)))
    assert 0 <= max(sizes[2], sizes[3]) <= longer - 64
    assert min(sizes[2], sizes[3]) == 0


def test_crop_condition_says_where_the_square_was_cut_out() -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    square, sizes = resize_and_crop(Image.fromarray(ramp).convert("RGB"), 64, "random", generator(3))
    assert square.getpixel((0, 0)) == (sizes[3],) * 3


def test_random_squares_differ_and_the_centre_is_the_centre() -> None:
    image = Image.new("RGB", (164, 64))
    lefts = {resize_and_crop(image, 64, "random", generator(seed))[1][3] for seed in range(200)}
    assert min(lefts) < 10
    assert max(lefts) > 90
    assert resize_and_crop(image, 64, "center", generator(0))[1][2:4] == (0, 50)


def test_pixels_reach_from_minus_one_to_one() -> None:
    image = Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8))
    assert torch.equal(to_tensor(image)[:, 0], torch.tensor([[-1.0, 1.0]] * 3))
