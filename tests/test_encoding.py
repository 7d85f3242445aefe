import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdxl_lora.config import EncodingConfig, ModelConfig, load_params
from sdxl_lora.dataset import EncodedDataset, example_order
from sdxl_lora.encoding import (
    CaptionedImage,
    Encoders,
    EncodingReport,
    embed_captions,
    encode_dataset,
    encode_images,
    load_encoders,
    read_captions,
    split_by_content,
)
from sdxl_lora.images import load_image, to_tensor
from sdxl_lora.sdxl import load_pipeline, tokenize

CPU = torch.device("cpu")
PARAMS = load_params(Path("recipes/demo.yaml"))
CONFIG = PARAMS.encoding.model_copy(update={"batch_size": 3, "shard_size": 4, "held_out": 0.3})


def grey(index: int) -> int:
    return 20 * index + 10


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return load_encoders(PARAMS.model, CONFIG, CPU)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(12):
        Image.new("RGB", (128, 128), (grey(index),) * 3).save(folder / f"{index}.png")
    return folder


def rows_of(images: Path) -> list[CaptionedImage]:
    files = sorted(images.iterdir(), key=lambda file: int(file.stem))
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return [
        CaptionedImage(digest, file.name, f"picture {file.stem}")
        for digest, file in zip(digests, files, strict=True)
    ]


def encode(
    images: Path,
    rows: list[CaptionedImage],
    encoders: Encoders,
    folder: Path,
    config: EncodingConfig = CONFIG,
) -> EncodingReport:
    report = EncodingReport()
    assert sum(encode_dataset(rows, images, encoders, config, folder, report)) == len(rows)
    return report


def test_every_row_pairs_an_image_with_its_own_caption(
    images: Path, encoders: Encoders, tmp_path: Path
) -> None:
    report = encode(images, rows_of(images), encoders, tmp_path / "encoded")
    assert sum(report.examples.values()) == 12
    for split in ("train", "held_out"):
        dataset = EncodedDataset(tmp_path / "encoded", split)
        indices = [int(Path(example.image).stem) for example in dataset.examples]
        assert indices == sorted(indices)
        for position, example in enumerate(dataset.examples):
            index = int(Path(example.image).stem)
            pixels = to_tensor(Image.open(images / f"{index}.png"))
            expected, _ = encode_images(encoders.vae, pixels[None])
            torch.testing.assert_close(dataset[position].latents_mean, expected, rtol=1e-3, atol=1e-4)
            ids = encoders.tokenizers[0](example.caption).input_ids
            assert dataset[position].token_ids[0, 0, : len(ids)].tolist() == ids
            assert example.caption == f"picture {index}"


def test_latents_decode_to_the_picture(encoders: Encoders) -> None:
    """The demo's small VAE gives this picture back at 34.5 dB."""
    pixels = to_tensor(load_image(Path("demo/dataset/images/alien-monster.webp")))[None]
    latents, std = encode_images(encoders.vae, pixels)
    with torch.no_grad():
        decoded = encoders.vae.decode(latents / encoders.vae.config.scaling_factor).sample
    assert 10 * torch.log10(4 / (decoded - pixels).square().mean()) > 33
    assert (std > 0).all()


def test_latents_are_what_diffusers_encodes_and_scales(encoders: Encoders) -> None:
    pixels = to_tensor(load_image(Path("demo/dataset/images/alien-monster.webp")))[None]
    mean, std = encode_images(encoders.vae, pixels)
    drawn = [
        encoders.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(s)) for s in range(64)
    ]
    samples = torch.cat(drawn) * encoders.vae.config.scaling_factor
    torch.testing.assert_close(samples.mean(0), mean[0], rtol=0, atol=float(std.max()) * 5 / 8)
    assert float((samples.std(0) / std[0]).mean()) == pytest.approx(1, abs=0.02)


def test_latents_are_shifted_and_scaled_as_the_vae_says() -> None:
    """The demo's VAE has a factor of 1, which would hide a factor left out."""
    vae = load_encoders(PARAMS.model, CONFIG, CPU).vae
    pixels = torch.zeros(1, 3, 64, 64)
    mean, std = encode_images(vae, pixels)
    factor = vae.config.scaling_factor
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    torch.testing.assert_close(encode_images(vae, pixels), ((mean / factor - 0.25) / 2, std / factor / 2))


def test_captions_are_read_as_the_pipeline_reads_them(encoders: Encoders) -> None:
    captions = ["red apple, noto style", "a very long caption " * 40]
    embeds = embed_captions(encoders.text_encoders, tokenize(encoders.tokenizers, captions))
    pipeline = load_pipeline(PARAMS.model, "fp32", CPU)
    expected, _, pooled, _ = pipeline.encode_prompt(captions, device=CPU, do_classifier_free_guidance=False)
    torch.testing.assert_close(embeds, (expected, pooled), rtol=0, atol=1e-5)


def test_missing_image_stops_the_stage(images: Path, encoders: Encoders, tmp_path: Path) -> None:
    rows = rows_of(images)
    (images / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.png"):
        encode(images, rows, encoders, tmp_path / "encoded")


def test_no_readable_image_is_an_error_that_names_some(
    images: Path, encoders: Encoders, tmp_path: Path
) -> None:
    rows = rows_of(images)
    for file in images.iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no readable image is left.*12 of 12.*\d+\.png"):
        encode(images, rows, encoders, tmp_path / "encoded")


def test_same_images_same_bytes(images: Path, encoders: Encoders, tmp_path: Path) -> None:
    for name in ("first", "second"):
        encode(images, rows_of(images), encoders, tmp_path / name)
    files = {file.name: file.read_bytes() for file in (tmp_path / "first").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "second").iterdir()}
    assert len(files) > 2
    assert not list(tmp_path.glob("*.partial"))


def test_bad_images_and_duplicates_are_left_out_and_named(
    images: Path, encoders: Encoders, tmp_path: Path
) -> None:
    rows = rows_of(images)
    (images / "3.png").write_bytes(b"no image")
    rows.append(CaptionedImage(rows[0].id, "copy.png", "a copy"))
    report = encode(images, rows, encoders, tmp_path / "encoded")
    assert {entry["image"] for entry in report.rejected} == {"3.png", "copy.png"}
    assert report.metrics()["rejected"] == 2
    splits = [EncodedDataset(tmp_path / "encoded", split) for split in ("train", "held_out")]
    names = {example.image for split in splits for example in split.examples}
    assert names == {f"{index}.png" for index in range(12) if index != 3}


def test_latents_that_are_not_finite_are_refused(images: Path, tmp_path: Path) -> None:
    broken = load_encoders(PARAMS.model, CONFIG, CPU)
    with torch.no_grad():
        next(broken.vae.encoder.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"\d+.png: its latents are not finite.*sdxl-vae-fp16-fix"):
        encode(images, rows_of(images), broken, tmp_path / "encoded")
    assert not (tmp_path / "encoded").exists()


@pytest.mark.parametrize("text_encoders", ["trained", "trained_then_frozen"])
def test_trained_text_encoders_leave_tokens_alone(images: Path, tmp_path: Path, text_encoders: str) -> None:
    model: ModelConfig = PARAMS.model.model_copy(update={"text_encoders": text_encoders})
    encode(images, rows_of(images), load_encoders(model, CONFIG, CPU), tmp_path / "encoded")
    batch = EncodedDataset(tmp_path / "encoded", "train")[0]
    assert batch.prompt_embeds is None
    assert batch.token_ids.shape == (1, 2, 77)


@given(st.lists(st.integers(0, 2**60), min_size=2, max_size=30, unique=True), st.floats(0.01, 0.99))
def test_both_sides_of_the_split_have_an_image(numbers: list[int], held_out: float) -> None:
    rows = [CaptionedImage(hashlib.sha256(f"{n}".encode()).hexdigest(), f"{n}.png", "") for n in numbers]
    sides = split_by_content(rows, held_out)
    assert sides["train"]
    assert sides["held_out"]
    assert sorted(r.image for side in sides.values() for r in side) == sorted(r.image for r in rows)


def test_an_image_stays_on_its_side_when_others_come_and_go() -> None:
    rows = [CaptionedImage(hashlib.sha256(f"{n}".encode()).hexdigest(), f"{n}.png", "") for n in range(400)]
    held_out = {row.image for row in split_by_content(rows, 0.1)["held_out"]}
    some = split_by_content(rows[::2], 0.1)["held_out"]
    assert {row.image for row in some} == held_out & {row.image for row in rows[::2]}
    assert 20 < len(held_out) < 60


def test_missing_captions_name_the_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dvc repro clean_captions"):
        read_captions(tmp_path / "captions.jsonl")


def test_missing_dataset_names_the_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dvc repro encode_dataset"):
        EncodedDataset(tmp_path, "train")


def test_order_visits_every_example_once_an_epoch_and_can_start_anywhere() -> None:
    order = example_order(7, seed=0, start=0)
    whole = [next(order) for _ in range(21)]
    assert all(sorted(whole[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert whole[:7] != whole[7:14]
    late = example_order(7, seed=0, start=10)
    assert [next(late) for _ in range(11)] == whole[10:]
