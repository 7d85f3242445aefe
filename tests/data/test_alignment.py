"""From files to batches: what training gets side by side belongs to one image and its caption."""

from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import ImageOps

from sdxl_lora.config import EncodingConfig, PredictionType, load_params
from sdxl_lora.data.aspect_ratio_buckets import bucket_sizes, nearest_size
from sdxl_lora.data.caption_encoder import embed_captions
from sdxl_lora.data.encoded_dataset import FIRST, Batch, EncodedDataset, Variant
from sdxl_lora.data.encoders import load_encoders
from sdxl_lora.data.encoding import encode_dataset
from sdxl_lora.data.encoding_report import EncodingReport
from sdxl_lora.data.image_encoder import encode_images
from sdxl_lora.data.images import decode_image, resize_and_crop, to_bytes
from sdxl_lora.data.latent_cache import LatentCache
from sdxl_lora.models.sdxl import NoiseSchedule
from sdxl_lora.models.tokenizers import tokenize
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.storage.content_store import ContentStore
from sdxl_lora.training import batches as examples_module
from sdxl_lora.training.batches import TrainingBatch, draw_variants, training_batches
from sdxl_lora.training.denoiser import Denoiser
from tests.support.patterns import pattern, row_of

COUNT = 23
MICRO_BATCH = 2
ACCUMULATION = 2
PROCESSES = 2
PER_STEP = MICRO_BATCH * ACCUMULATION * PROCESSES
EPOCHS = 3
SEED = 7
PARAMS = load_params(Path("recipes/demo.yaml"))
CONFIG = PARAMS.encoding.model_copy(
    update={"resolution": 64, "crop": "random", "batch_size": 5, "shard_size": 6, "held_out": 0.2}
)
TRAINING = PARAMS.training.model_copy(
    update={"batch_size": MICRO_BATCH * ACCUMULATION, "micro_batch_size": MICRO_BATCH}
)

Truth = tuple[EncodedDataset, dict[tuple[int, Variant], Batch]]


def number_of(batch: Batch, row: int) -> int:
    """The number of an example's image, which its original size holds: image n is 100 + n pixels wide."""
    return int(batch.time_ids[row, 1]) - 100


def height_of(number: int) -> int:
    """Upright, wide or nearly square, for each number another of them."""
    return (70 + number, 260 + number, 30 + number)[number % 3]


@pytest.fixture(scope="module", params=["square", "buckets"])
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """The training split, and each image with its caption, encoded one by one from the files.

    With buckets, of the mirrored images as well, and every other image has two captions.
    """
    folder = tmp_path_factory.mktemp("alignment")
    images = folder / "images"
    images.mkdir()
    buckets = request.param == "buckets"
    config: EncodingConfig = CONFIG.model_copy(update={"aspect_ratios": request.param, "flip": buckets})
    encoders = load_encoders(PARAMS.model, config, torch.device("cpu"))
    assert encoders.text_encoders is not None
    rows, expected = [], {}
    for number in range(COUNT):
        file = images / f"{COUNT - number}.png"  # an order of names that is not that of numbers
        pattern(number, (100 + number, height_of(number))).save(file)
        more = ["other words"] if buckets and number % 2 else []
        captions = [f"picture number {number}", *(f"{number} in {words}" for words in more)]
        rows.append(replace(row_of(file, captions[0]), more_captions=tuple(captions[1:])))
        image, identifier = decode_image(file.read_bytes()), rows[-1].id
        size = nearest_size(image.size, bucket_sizes(64, config.aspect_ratios))
        views = {False: (image, keyed_generator("crop", identifier))}
        if config.flip:
            views[True] = (ImageOps.mirror(image), keyed_generator("crop", identifier, "flipped"))
        for flipped, (view, random) in views.items():
            part, time_ids = resize_and_crop(view, size, "random", random)
            for choice, caption in enumerate(captions):
                token_ids = tokenize(encoders.tokenizers, [caption])
                expected[number, Variant(flipped, choice)] = Batch(
                    *encode_images(encoders.vae, to_bytes(part)[None]),
                    token_ids,
                    torch.tensor([time_ids], dtype=torch.int32),
                    *embed_captions(encoders.text_encoders, token_ids),
                )
    entries = LatentCache(ContentStore(folder / "store"), encoders, config, images)
    list(encode_dataset(rows, entries, config, folder / "encoded", EncodingReport()))
    return EncodedDataset(folder / "encoded", "train"), expected


def micro_batches(
    dataset: EncodedDataset, rank: int, stop_at: list[int], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, TrainingBatch]]:
    """What a process trains on, stopped and resumed at these steps, with the number of each one's step."""
    state = SimpleNamespace(process_index=rank, num_processes=PROCESSES)
    monkeypatch.setattr(examples_module, "distributed_state", lambda: state)
    prediction_type: PredictionType = "epsilon"
    schedule = NoiseSchedule(torch.zeros(1000), prediction_type)
    denoiser = Denoiser(torch.nn.Identity(), None, schedule, "fp32")
    found = []
    for first, last in zip([0, *stop_at], [*stop_at, EPOCHS * len(dataset) // PER_STEP], strict=True):
        batches = training_batches(denoiser, dataset, TRAINING, SEED, first)
        for number, examples in enumerate(islice(batches, (last - first) * ACCUMULATION)):
            found.append((first + number // ACCUMULATION, examples))
    return found


def test_every_tensor_of_an_example_belongs_to_one_image_and_its_caption(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, expected = truth
    seen: list[tuple[int, Variant]] = []
    shapes: dict[int, set[torch.Size]] = {}
    by_image = {example.image: example for example in dataset.examples}
    varied = bool(dataset.examples[0].flipped_digest)
    for rank in range(PROCESSES):
        for number_of_batch, (step, examples) in enumerate(micro_batches(dataset, rank, [2, 5], monkeypatch)):
            shapes.setdefault(step, set()).add(examples.batch.latents_mean.shape)
            part = number_of_batch % ACCUMULATION * PROCESSES + rank
            start = step * PER_STEP + part * MICRO_BATCH
            variants = draw_variants([by_image[image] for image in examples.images], start, SEED)
            for row, (image, variant) in enumerate(zip(examples.images, variants, strict=True)):
                number = number_of(examples.batch, row)
                seen.append((number, variant))
                assert by_image[image].caption == f"picture number {number}"
                assert image == f"{COUNT - number}.png"
                for name, tensor in expected[number, variant].tensors().items():
                    found = examples.batch.tensors()[name]
                    assert tensor is not None
                    assert found is not None
                    torch.testing.assert_close(found[row], tensor[0], rtol=1e-3, atol=1e-4)
    assert all(len(found) == 1 for found in shapes.values())
    assert len(set(dataset.latents_shapes)) == (3 if varied else 1)
    assert {variant for _, variant in seen} == ({*product((False, True), (0, 1))} if varied else {FIRST})
    visits = [number for number, _ in seen]
    assert len(set(visits)) == len(dataset)
    if not varied:
        assert {visits.count(number) for number in visits} <= {EPOCHS - 1, EPOCHS}


def test_examples_are_told_apart(truth: Truth) -> None:
    """Otherwise the test above would prove nothing."""
    _, expected = truth
    for name in ("latents_mean", "prompt_embeds", "pooled_prompt_embeds", "time_ids"):
        rows: dict[torch.Size, list[torch.Tensor]] = {}
        for (_, variant), batch in expected.items():
            tensor = batch.tensors()[name]
            assert tensor is not None
            of_image = name in ("latents_mean", "time_ids")
            repeated = variant.caption if of_image else variant.flipped
            if not repeated and (name != "time_ids" or not variant.flipped):  # its crop may be the same
                rows.setdefault(tensor.shape, []).append(tensor.flatten().float())
        for alike in map(torch.stack, rows.values()):
            distances = torch.cdist(alike, alike) + torch.eye(len(alike)) * 1e9
            assert distances.min() > 0.1, name
