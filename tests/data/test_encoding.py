import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sdxl_lora.config import EncodingConfig, ModelConfig, load_params
from sdxl_lora.data.caption_encoder import embed_captions
from sdxl_lora.data.encoded_dataset import Batch, EncodedDataset, Variant, data_digest
from sdxl_lora.data.encoders import Encoders, load_encoders
from sdxl_lora.data.encoding import RankShare, encode_dataset, read_captioned_images
from sdxl_lora.data.encoding_report import EncodingReport
from sdxl_lora.data.image_encoder import encode_images
from sdxl_lora.data.image_loader import CaptionedImage
from sdxl_lora.data.images import decode_image, resize_and_crop, to_bytes, to_pixels
from sdxl_lora.data.latent_cache import LatentCache
from sdxl_lora.data.splits import split_by_content
from sdxl_lora.models.sdxl import load_pipeline
from sdxl_lora.models.tokenizers import tokenize
from sdxl_lora.storage.content_store import ContentStore
from tests.support.patterns import pattern, row_of, write_patterns

CPU = torch.device("cpu")
PARAMS = load_params(Path("recipes/demo.yaml"))
CONFIG = PARAMS.encoding.model_copy(update={"batch_size": 3, "shard_size": 4, "held_out": 0.3})
PICTURE = Path("demo/dataset/images/alien-monster.webp")
COUNT = 12


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return load_encoders(PARAMS.model, CONFIG, CPU)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def rows(images: Path) -> list[CaptionedImage]:
    return write_patterns(images, COUNT)


def encode(
    rows: list[CaptionedImage],
    images: Path,
    encoders: Encoders,
    folder: Path,
    config: EncodingConfig = CONFIG,
    store: Path | None = None,
    share: RankShare = RankShare(0, 1),  # noqa: B008
) -> EncodingReport:
    """Encodes into `folder`, with a store of its own beside it unless one is given."""
    report = EncodingReport()
    entries = LatentCache(ContentStore(store or folder.with_suffix(".store")), encoders, config, images)
    done = sum(encode_dataset(rows, entries, config, folder, report, share))
    assert done == len(rows) or not share.is_first
    return report


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def examples_of(folder: Path) -> dict[str, Batch]:
    """All examples of both sides, by the name of their image."""
    sides = [EncodedDataset(folder, split) for split in ("train", "held_out")]
    return {example.image: side[n] for side in sides for n, example in enumerate(side.examples)}


def entries_by_kind(store: Path) -> dict[str, set[str]]:
    kinds = ("image", "latents", "text")
    return {kind: {file.name for file in (store / kind).rglob("*") if file.is_file()} for kind in kinds}


def levels_of(file: Path) -> torch.Tensor:
    return to_bytes(decode_image(file.read_bytes()))[None]


def test_latents_decode_to_the_image(encoders: Encoders) -> None:
    """The demo's small VAE reproduces this image at 34.5 dB."""
    levels = levels_of(PICTURE)
    latents, std = encode_images(encoders.vae, levels)
    with torch.no_grad():
        decoded = encoders.vae.decode(latents / encoders.vae.config.scaling_factor).sample
    assert 10 * torch.log10(4 / (decoded - to_pixels(levels)).square().mean()) > 33
    assert (std > 0).all()


def test_latents_are_what_diffusers_encodes_and_scales(encoders: Encoders) -> None:
    levels = levels_of(PICTURE)
    mean, std = encode_images(encoders.vae, levels)
    pixels = to_pixels(levels)
    sampled = [
        encoders.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(s)) for s in range(64)
    ]
    samples = torch.cat(sampled) * encoders.vae.config.scaling_factor
    torch.testing.assert_close(samples.mean(0), mean[0], rtol=0, atol=float(std.max()) * 5 / 8)
    assert float((samples.std(0) / std[0]).mean()) == pytest.approx(1, abs=0.02)


def test_latents_are_shifted_and_scaled_as_the_vae_says() -> None:
    """The demo's VAE has a factor of 1, which would hide a factor left out."""
    vae = load_encoders(PARAMS.model, CONFIG, CPU).vae
    levels = torch.full((1, 3, 64, 64), 90, dtype=torch.uint8)
    mean, std = encode_images(vae, levels)
    factor = vae.config.scaling_factor
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    torch.testing.assert_close(encode_images(vae, levels), ((mean / factor - 0.25) / 2, std / factor / 2))


def test_tiles_give_nearly_the_latents_of_the_whole_image() -> None:
    """Images of 256 px in tiles of 128: latents off by a tenth of their spread, 0.9 dB worse decoded."""
    whole, tiled = (
        load_encoders(PARAMS.model, CONFIG.model_copy(update={"vae_tile": tile}), CPU).vae
        for tile in (None, 128)
    )
    levels = torch.stack([to_bytes(four_images(number)) for number in range(4)])
    expected, expected_std = encode_images(whole, levels)
    found, found_std = encode_images(tiled, levels)
    assert found.shape == expected.shape == (4, 4, 32, 32)
    assert 0.01 < (found - expected).square().mean().sqrt() / expected.std() < 0.15
    assert (found_std - expected_std).abs().mean() < 0.01 * expected.std()
    psnr = [decoded_psnr(whole, latents, levels) for latents in (expected, found)]
    assert psnr[1] > psnr[0] - 1.5
    small = levels[:, :, :128, :128].contiguous()
    assert torch.equal(encode_images(tiled, small)[0], encode_images(whole, small)[0])


def four_images(number: int) -> Image.Image:
    """256 x 256 pixels of the demo's data set."""
    files = sorted(PICTURE.parent.glob("*.webp"))[4 * number : 4 * number + 4]
    sheet = Image.new("RGB", (256, 256))
    for place, file in enumerate(files):
        sheet.paste(
            decode_image(file.read_bytes()).resize((128, 128)), (128 * (place % 2), 128 * (place // 2))
        )
    return sheet


@torch.no_grad()
def decoded_psnr(vae: AutoencoderKL, latents: torch.Tensor, levels: torch.Tensor) -> float:
    decoded = vae.decode(latents / vae.config.scaling_factor).sample
    return float(10 * torch.log10(4 / (decoded - to_pixels(levels)).square().mean()))


def test_captions_are_read_as_the_pipeline_reads_them(encoders: Encoders) -> None:
    captions = ["red apple, noto style", "a very long caption " * 40]
    assert encoders.text_encoders is not None
    embeds = embed_captions(encoders.text_encoders, tokenize(encoders.tokenizers, captions))
    pipeline = load_pipeline(PARAMS.model, "fp32", CPU)
    expected, _, pooled, _ = pipeline.encode_prompt(captions, device=CPU, do_classifier_free_guidance=False)
    torch.testing.assert_close(embeds, (expected, pooled), rtol=0, atol=1e-5)


def test_missing_image_stops_the_stage(
    images: Path, rows: list[CaptionedImage], encoders: Encoders, tmp_path: Path
) -> None:
    (images / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.png"):
        encode(rows, images, encoders, tmp_path / "encoded")


def test_no_readable_image_is_an_error_that_names_some(
    images: Path, encoders: Encoders, tmp_path: Path
) -> None:
    write_patterns(images, COUNT)
    for number in range(COUNT):
        (images / f"{number}.png").write_bytes(b"no image %d" % number)
    rows = [row_of(images / f"{number}.png") for number in range(COUNT)]
    with pytest.raises(ValueError, match=r"no usable image is left.*12 of 12.*0\.png \(not_an_image\)"):
        encode(rows, images, encoders, tmp_path / "encoded")


def test_same_images_same_bytes(
    images: Path, rows: list[CaptionedImage], encoders: Encoders, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        encode(rows, images, encoders, tmp_path / name)
    assert content(tmp_path / "first") == content(tmp_path / "second")
    assert len(content(tmp_path / "first")) > 2
    assert not list(tmp_path.glob("*.partial"))


def test_an_example_has_the_same_bits_whatever_else_is_encoded(
    images: Path, rows: list[CaptionedImage], encoders: Encoders, tmp_path: Path
) -> None:
    encode(rows, images, encoders, tmp_path / "all")
    encode(rows[5:2:-1] + rows[8:], images, encoders, tmp_path / "some")
    whole, some = examples_of(tmp_path / "all"), examples_of(tmp_path / "some")
    assert len(some) == 7
    assert {name: batch.digest() for name, batch in some.items()} == {
        name: whole[name].digest() for name in some
    }


def test_bad_images_and_duplicates_are_left_out_and_named(
    images: Path, rows: list[CaptionedImage], encoders: Encoders, tmp_path: Path
) -> None:
    (images / "3.png").write_bytes(b"no image")
    rows[3] = row_of(images / "3.png")
    (images / "4.png").write_bytes(b"another image than the one that was downloaded")
    rows.append(CaptionedImage(rows[0].id, "copy.png", "a copy"))
    report = encode(rows, images, encoders, tmp_path / "encoded")
    assert [(finding.image, finding.kind, finding.left_out) for finding in report.findings] == [
        ("copy.png", "duplicate", True),
        ("3.png", "not_an_image", True),
        ("4.png", "changed", True),
    ]
    assert report.metrics()["left_out"] == 3
    assert examples_of(tmp_path / "encoded").keys() == {f"{n}.png" for n in range(COUNT) if n not in (3, 4)}


def test_strict_stops_at_bad_images_and_names_them_all(
    images: Path, rows: list[CaptionedImage], encoders: Encoders, tmp_path: Path
) -> None:
    for number in (3, 7):
        (images / f"{number}.png").write_bytes(b"")
        rows[number] = row_of(images / f"{number}.png")
    strict = CONFIG.model_copy(update={"strict": True})
    rows[7] = CaptionedImage("0" * 64, "7.png", "")
    with pytest.raises(ValueError, match=r"(?s)strict is true and 2 of 12.*3\.png.*7\.png.*\(changed\)"):
        encode(rows, images, encoders, tmp_path / "encoded", strict)
    assert not (tmp_path / "encoded").exists()


def test_small_images_are_flagged_with_their_factor(
    images: Path, rows: list[CaptionedImage], encoders: Encoders, tmp_path: Path
) -> None:
    pattern(50, (100, 64)).save(images / "small.png")
    rows.append(row_of(images / "small.png"))
    (finding,) = encode(rows, images, encoders, tmp_path / "encoded").findings
    assert (finding.image, finding.kind, finding.left_out) == ("small.png", "upscaled", False)
    assert finding.detail == "100 x 64, enlarged 2.00 times"


def test_buckets_keep_shapes_apart_and_the_order_of_the_data_set(
    images: Path, rows: list[CaptionedImage], encoders: Encoders, tmp_path: Path
) -> None:
    sizes = {"50.png": (300, 120), "51.png": (128, 128), "52.png": (120, 300), "53.png": (2000, 100)}
    for number, (name, size) in enumerate(sizes.items()):
        pattern(50 + number, size).save(images / name)
        rows.insert(3 * number, row_of(images / name))
    config = CONFIG.model_copy(update={"aspect_ratios": "buckets"})
    report = encode(rows, images, encoders, tmp_path / "encoded", config)
    assert report.encoded_sizes == {(64, 192): 1, (128, 128): COUNT + 1, (192, 64): 1, (256, 64): 1}
    assert report.metrics()["sizes"] == {"64x192": 1, "128x128": COUNT + 1, "192x64": 1, "256x64": 1}
    narrow = [(f.image, f.left_out, f.detail) for f in report.findings if f.kind == "cropped"]
    assert narrow == [("53.png", False, "2000 x 100, of which 80% are cut off")]
    for split in ("train", "held_out"):
        dataset = EncodedDataset(tmp_path / "encoded", split)
        in_order = [row.image for row in rows if row.image in dataset.images]
        assert dataset.images == in_order
        for index, shape in enumerate(dataset.latents_shapes):
            batch = dataset[index]
            assert batch.latents_mean.shape == batch.latents_std.shape == shape
            assert batch.time_ids[0, 4:].tolist() == [8 * side for side in shape[2:]]
    alone = encode([row_of(images / "50.png"), *rows[-2:]], images, encoders, tmp_path / "some", config)
    digests = {example.image: example.digest for example in report.examples}
    assert all(example.digest == digests[example.image] for example in alone.examples)


def test_mirrored_images_are_encoded_beside_the_others(
    images: Path, rows: list[CaptionedImage], encoders: Encoders, tmp_path: Path
) -> None:
    pattern(50, (200, 129)).save(images / "50.png")
    rows[0] = row_of(images / "50.png")
    encode(rows, images, encoders, tmp_path / "plain")
    config = CONFIG.model_copy(update={"flip": True})
    report = encode(rows, images, encoders, tmp_path / "flipped", config)
    plain, flipped = (EncodedDataset(tmp_path / name, "train") for name in ("plain", "flipped"))
    assert not any(example.flipped_digest for example in plain.examples)
    for index, example in enumerate(flipped.examples):
        as_it_is, mirrored = (flipped.example(index, Variant(value)) for value in (False, True))
        assert as_it_is.digest() == plain[index].digest() == example.digest
        part, time_ids = resize_and_crop(
            ImageOps.mirror(decode_image((images / example.image).read_bytes())),
            (128, 128),
            "center",
            torch.Generator(),
        )
        expected = encode_images(encoders.vae, to_bytes(part)[None])
        found = mirrored.latents_mean, mirrored.latents_std
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert mirrored.time_ids[0].tolist() == list(time_ids)
        assert not torch.equal(mirrored.latents_mean, as_it_is.latents_mean)
        assert mirrored.prompt_embeds is not None
        assert as_it_is.prompt_embeds is not None
        assert torch.equal(mirrored.prompt_embeds, as_it_is.prompt_embeds)
    assert data_digest(report.examples) != data_digest(plain.examples)


@pytest.mark.parametrize("frozen", [True, False])
def test_further_captions_lie_beside_the_first(
    images: Path, rows: list[CaptionedImage], encoders: Encoders, tmp_path: Path, frozen: bool
) -> None:
    encoders = replace(encoders, text_encoders=encoders.text_encoders if frozen else None)
    encode(rows, images, encoders, tmp_path / "plain")
    for number, row in enumerate(rows):
        more = tuple(f"{number} in words {n}" for n in range(number % 3))
        rows[number] = replace(row, more_captions=more)
    report = encode(rows, images, encoders, tmp_path / "encoded")
    assert report.metrics()["captions"] == 2 * COUNT
    plain, found = (examples_with_captions(tmp_path / name) for name in ("plain", "encoded"))
    for row in rows:
        assert found[row.image][0].digest() == plain[row.image][0].digest()
        assert len(found[row.image]) == len(row.captions)
        for caption, batch in zip(row.captions, found[row.image], strict=True):
            assert torch.equal(batch.token_ids, tokenize(encoders.tokenizers, [caption]))
            assert torch.equal(batch.latents_mean, plain[row.image][0].latents_mean)
            if encoders.text_encoders is not None:
                expected = embed_captions(encoders.text_encoders, batch.token_ids)
                embeds = batch.prompt_embeds, batch.pooled_prompt_embeds
                torch.testing.assert_close(embeds, expected, rtol=1e-3, atol=1e-4)


def examples_with_captions(folder: Path) -> dict[str, list[Batch]]:
    """All examples of both sides with each of their captions, by the name of their image."""
    sides = [EncodedDataset(folder, split) for split in ("train", "held_out")]
    return {
        example.image: [side.example(n, Variant(caption=m)) for m in range(1 + len(example.more_captions))]
        for side in sides
        for n, example in enumerate(side.examples)
    }


def test_lines_of_one_image_are_its_captions(tmp_path: Path) -> None:
    lines = [("a", "0.png", "one"), ("a", "0.png", "two"), ("b", "1.png", "x"), ("a", "0.png", "one")]
    content = [json.dumps(dict(zip(("id", "image", "caption"), line, strict=True))) for line in lines]
    (tmp_path / "captions.jsonl").write_text("\n".join(content))
    assert read_captioned_images(tmp_path / "captions.jsonl") == [
        CaptionedImage("a", "0.png", "one", ("two",)),
        CaptionedImage("b", "1.png", "x"),
    ]


def test_near_duplicates_are_reported_and_never_on_both_sides(
    images: Path, rows: list[CaptionedImage], encoders: Encoders, tmp_path: Path
) -> None:
    """Every image again as a small JPEG, whose hash of the file puts it on either side."""
    for number in range(COUNT):
        pattern(number).resize((100, 100)).save(images / f"again-{number}.jpg", quality=90)
    for number in range(COUNT, 2 * COUNT):
        pattern(number).save(images / f"{number}.png")
        rows.append(row_of(images / f"{number}.png"))
    again = [row_of(images / f"again-{number}.jpg") for number in range(COUNT)]
    sides = split_by_content(rows + again, CONFIG.held_out)
    train, held_out = ({row.image for row in sides[name]} for name in ("train", "held_out"))
    pairs = [(f"{number}.png", f"again-{number}.jpg") for number in range(COUNT)]
    crossing = {name for pair in pairs if len(train & set(pair)) == 1 for name in pair if name in held_out}
    assert crossing
    report = encode(rows + again, images, encoders, tmp_path / "encoded")
    found = {finding.image: finding.kind for finding in report.findings if finding.kind != "upscaled"}
    assert {image for image, kind in found.items() if kind == "leakage"} == crossing
    assert len(found) == COUNT
    left = {example.image for example in EncodedDataset(tmp_path / "encoded", "held_out").examples}
    assert left == held_out - crossing
    unlimited = CONFIG.model_copy(update={"near_duplicate_bits": None})
    report = encode(rows + again, images, encoders, tmp_path / "unlimited", unlimited)
    assert {finding.kind for finding in report.findings} == {"upscaled"}


def test_every_training_image_is_looked_for_among_the_held_out(
    images: Path, rows: list[CaptionedImage], encoders: Encoders, tmp_path: Path
) -> None:
    train = split_by_content(rows, CONFIG.held_out)["train"]
    copies = []
    for row in train:
        for quality in range(100, 60, -1):  # until the file's hash puts it among the held out
            copy = images / f"copy-of-{Path(row.image).stem}.jpg"
            pattern(int(Path(row.image).stem)).save(copy, quality=quality)
            if not split_by_content([*rows, row_of(copy)], CONFIG.held_out)["train"][len(train) :]:
                copies.append(row_of(copy))
                break
    assert len(copies) == len(train)
    report = encode(rows + copies, images, encoders, tmp_path / "encoded")
    leaked = {finding.image for finding in report.findings if finding.kind == "leakage"}
    assert leaked == {copy.image for copy in copies}


def test_latents_that_are_not_finite_are_refused_and_not_kept(
    images: Path, rows: list[CaptionedImage], tmp_path: Path
) -> None:
    broken = load_encoders(PARAMS.model, CONFIG, CPU)
    with torch.no_grad():
        next(broken.vae.encoder.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"\d+.png: its latents are not finite.*sdxl-vae-fp16-fix"):
        encode(rows, images, broken, tmp_path / "encoded", store=tmp_path / "store")
    assert not (tmp_path / "encoded").exists()
    assert entries_by_kind(tmp_path / "store")["latents"] == set()


def test_batches_are_encoded_while_those_before_them_are_written(
    images: Path, rows: list[CaptionedImage], tmp_path: Path
) -> None:
    """A GPU works on while files are written, so the next batches have to be with it by then."""
    events = []

    class Watched(ContentStore):
        def put(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
            events.append(key.partition("/")[0])
            super().put(key, tensors)

    encoders = replace(load_encoders(PARAMS.model, CONFIG, CPU), text_encoders=None)
    encoders.vae.encoder.register_forward_pre_hook(lambda *_: events.append("encode"))
    entries = LatentCache(Watched(tmp_path / "store"), encoders, CONFIG, images)
    assert all(fault is None for _, fault in entries.encode(rows))
    kept = [event for event in events if event != "image"]
    written = ["latents"] * CONFIG.batch_size
    assert kept == [*["encode"] * 3, *written, "encode", *written * 3]


def test_batch_that_does_not_fit_names_the_key(
    images: Path, rows: list[CaptionedImage], tmp_path: Path
) -> None:
    full = load_encoders(PARAMS.model, CONFIG, CPU)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    full.vae.encoder.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match=r"encoding\.batch_size is 3.*128 px.*CUDA out of memory"):
        encode(rows, images, full, tmp_path / "encoded")


@pytest.mark.parametrize("text_encoders", ["trained", "trained_then_frozen"])
def test_trained_text_encoders_leave_tokens_alone(
    images: Path, rows: list[CaptionedImage], tmp_path: Path, text_encoders: str
) -> None:
    model: ModelConfig = PARAMS.model.model_copy(update={"text_encoders": text_encoders})
    encode(rows, images, load_encoders(model, CONFIG, CPU), tmp_path / "encoded")
    batch = EncodedDataset(tmp_path / "encoded", "train")[0]
    assert batch.prompt_embeds is None
    assert batch.token_ids.shape == (1, 2, 77)


@dataclass
class Stored:
    """A data set that was encoded once, and what encoding it again adds to its store."""

    images: Path
    rows: list[CaptionedImage]
    encoders: Encoders
    folder: Path

    def __post_init__(self) -> None:
        self.store = self.folder / "store"
        encode(self.rows, self.images, self.encoders, self.folder / "encoded", store=self.store)
        self.before = entries_by_kind(self.store)
        assert [len(names) for names in self.before.values()] == [COUNT] * 3

    def again(self, encoders: Encoders | None = None, config: EncodingConfig = CONFIG) -> dict[str, int]:
        """Encodes it as it is now; how many entries are new, by kind."""
        encode(self.rows, self.images, encoders or self.encoders, self.folder / "again", config, self.store)
        return {kind: len(names - self.before[kind]) for kind, names in entries_by_kind(self.store).items()}

    def is_as_from_nothing(self, config: EncodingConfig = CONFIG) -> bool:
        """Whether `again` gave what it would have given without a store."""
        encode(self.rows, self.images, self.encoders, self.folder / "fresh", config)
        return content(self.folder / "fresh") == content(self.folder / "again")


class TestStore:
    """What is encoded again after a change, and what the shards then hold."""

    @pytest.fixture
    def stored(self, images: Path, rows: list[CaptionedImage], encoders: Encoders, tmp_path: Path) -> Stored:
        return Stored(images, rows, encoders, tmp_path)

    def test_unchanged_data_encodes_nothing_and_other_shards_are_cut_from_it(self, stored: Stored) -> None:
        config = CONFIG.model_copy(update={"shard_size": 2, "held_out": 0.5})
        assert stored.again(config=config) == {"image": 0, "latents": 0, "text": 0}
        assert stored.is_as_from_nothing(config)

    def test_edited_caption_encodes_its_text_alone(self, stored: Stored) -> None:
        stored.rows[5] = CaptionedImage(stored.rows[5].id, stored.rows[5].image, "another caption")
        assert stored.again() == {"image": 0, "latents": 0, "text": 1}
        assert stored.is_as_from_nothing()

    def test_edited_image_encodes_its_latents_alone(self, stored: Stored) -> None:
        file = stored.images / "5.png"
        pattern(99).save(file)
        stored.rows[5] = row_of(file)
        assert stored.again() == {"image": 1, "latents": 1, "text": 0}
        assert stored.is_as_from_nothing()

    def test_other_vae_encodes_all_latents_and_nothing_else(self, stored: Stored) -> None:
        other = load_encoders(PARAMS.model, CONFIG, CPU)
        with torch.no_grad():
            next(other.vae.encoder.parameters()).mul_(1.001)
        assert stored.again(other) == {"image": 0, "latents": COUNT, "text": 0}

    def test_other_text_encoder_encodes_all_texts_and_nothing_else(self, stored: Stored) -> None:
        other = load_encoders(PARAMS.model, CONFIG, CPU)
        assert other.text_encoders is not None
        other.text_encoders[1].bfloat16()
        assert stored.again(other) == {"image": 0, "latents": 0, "text": COUNT}

    @pytest.mark.parametrize(
        ("changes", "kinds"),
        [
            ({"crop": "random"}, {"latents"}),
            ({"aspect_ratios": "buckets"}, {"latents"}),
            ({"vae_tile": 64}, {"latents"}),
            ({"flip": True}, {"latents"}),  # of the mirrored images alone
            ({"resolution": 64}, {"latents"}),
            ({"batch_size": 4}, {"latents", "text"}),
            ({"held_out": 0.5, "shard_size": 3, "near_duplicate_bits": 2, "strict": True}, set()),
        ],
    )
    def test_other_params_encode_what_they_act_on(
        self, stored: Stored, changes: dict[str, object], kinds: set[str]
    ) -> None:
        new = stored.again(config=CONFIG.model_copy(update=changes))
        assert new == {kind: COUNT if kind in kinds else 0 for kind in stored.before}

    def test_damaged_entries_are_encoded_again(self, stored: Stored) -> None:
        for kind in stored.before:
            for file in sorted((stored.store / kind).rglob("*/*"))[:2]:
                file.write_bytes(file.read_bytes()[:-1] + b"?")
        assert stored.again() == {"image": 0, "latents": 0, "text": 0}
        assert content(stored.folder / "again") == content(stored.folder / "encoded")
        assert entries_by_kind(stored.store) == stored.before


def test_share_of_each_process_covers_the_rows_and_the_first_has_them_all() -> None:
    rows = [CaptionedImage(str(number), "", "") for number in range(10)]
    shares = [RankShare(rank, 3).of(rows) for rank in range(3)]
    assert [row.id for row in shares[0]] == ["0", "3", "6", "9", "8", "7", "5", "4", "2", "1"]
    assert [[row.id for row in share] for share in shares[1:]] == [["1", "4", "7"], ["2", "5", "8"]]


def test_processes_fill_one_store_and_the_first_writes_the_same_shards(
    images: Path, rows: list[CaptionedImage], encoders: Encoders, tmp_path: Path
) -> None:
    encode(rows, images, encoders, tmp_path / "alone")
    store = tmp_path / "store"
    encode(rows, images, encoders, tmp_path / "never", store=store, share=RankShare(1, 2))
    assert not (tmp_path / "never").exists()
    assert {len(names) for names in entries_by_kind(store).values()} == {COUNT // 2}
    encode(rows, images, encoders, tmp_path / "together", store=store, share=RankShare(0, 2))
    assert content(tmp_path / "together") == content(tmp_path / "alone")


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
        read_captioned_images(tmp_path / "captions.jsonl")


def test_missing_dataset_names_the_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dvc repro encode_dataset"):
        EncodedDataset(tmp_path, "train")
