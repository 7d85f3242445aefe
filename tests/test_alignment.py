"""From files to batches: what training gets side by side belongs to one image and its caption."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from patterns import pattern, row_of

from sdxl_lora.config import load_params
from sdxl_lora.dataset import Batch, EncodedDataset, example_order
from sdxl_lora.encoders import embed_captions, encode_images, load_encoders
from sdxl_lora.encoding import EncodingReport, encode_dataset
from sdxl_lora.entries import Entries
from sdxl_lora.images import decode_image, resize_and_crop, to_bytes
from sdxl_lora.randomness import generator
from sdxl_lora.sdxl import tokenize
from sdxl_lora.store import Store

COUNT = 23
BATCH = 4
PROCESSES = 2
EPOCHS = 3
PARAMS = load_params(Path("recipes/demo.yaml"))
CONFIG = PARAMS.encoding.model_copy(
    update={"resolution": 64, "crop": "random", "batch_size": 5, "shard_size": 6, "held_out": 0.2}
)


def number_of(batch: Batch, row: int) -> int:
    """The number of an example's image, which its original size holds: image n is 100 + n pixels wide."""
    return int(batch.time_ids[row, 1]) - 100


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[EncodedDataset, dict[int, Batch]]:
    """The training split, and each image with its caption, encoded one by one from the files."""
    folder = tmp_path_factory.mktemp("alignment")
    images = folder / "images"
    images.mkdir()
    encoders = load_encoders(PARAMS.model, CONFIG, torch.device("cpu"))
    assert encoders.text_encoders is not None
    rows, expected = [], {}
    for number in range(COUNT):
        file = images / f"{COUNT - number}.png"  # an order of names that is not that of numbers
        pattern(number, (100 + number, 70 + number)).save(file)
        rows.append(row_of(file, f"picture number {number}"))
        part, time_ids = resize_and_crop(
            decode_image(file.read_bytes()), (64, 64), "random", generator("crop", rows[-1].id)
        )
        token_ids = tokenize(encoders.tokenizers, [rows[-1].caption])
        expected[number] = Batch(
            *encode_images(encoders.vae, to_bytes(part)[None]),
            token_ids,
            torch.tensor([time_ids], dtype=torch.int32),
            *embed_captions(encoders.text_encoders, token_ids),
        )
    entries = Entries(Store(folder / "store"), encoders, CONFIG, images)
    list(encode_dataset(rows, entries, CONFIG, folder / "encoded", EncodingReport()))
    return EncodedDataset(folder / "encoded", "train"), expected


def batches_of_process(
    dataset: EncodedDataset, rank: int, stop_at: list[int]
) -> list[tuple[list[int], Batch]]:
    """What a process trains on: its part of every step's examples, stopped and resumed at these steps."""
    per_step = BATCH * PROCESSES
    batches = []
    for first, last in zip([0, *stop_at], [*stop_at, EPOCHS * len(dataset) // per_step], strict=True):
        for step in range(first, last):
            order = islice(example_order(len(dataset), 7, step * per_step), per_step)
            own = list(order)[rank * BATCH : (rank + 1) * BATCH]
            batches.append((own, dataset.batch(own)))
    return batches


def test_every_tensor_of_an_example_belongs_to_one_image_and_its_caption(
    truth: tuple[EncodedDataset, dict[int, Batch]],
) -> None:
    dataset, expected = truth
    seen: list[int] = []
    for rank in range(PROCESSES):
        for indices, batch in batches_of_process(dataset, rank, stop_at=[2, 5]):
            for row, index in enumerate(indices):
                number = number_of(batch, row)
                seen.append(number)
                example = dataset.examples[index]
                assert example.caption == f"picture number {number}"
                assert example.image == f"{COUNT - number}.png"
                for name, tensor in expected[number].tensors().items():
                    found = batch.tensors()[name]
                    assert tensor is not None
                    assert found is not None
                    torch.testing.assert_close(found[row], tensor[0], rtol=1e-3, atol=1e-4)
    counts = {seen.count(number) for number in seen}
    assert len(set(seen)) == len(dataset)
    assert counts <= {EPOCHS - 1, EPOCHS}


def test_examples_are_told_apart(truth: tuple[EncodedDataset, dict[int, Batch]]) -> None:
    """Otherwise the test above would prove nothing."""
    _, expected = truth
    for name in ("latents_mean", "prompt_embeds", "pooled_prompt_embeds", "time_ids"):
        rows = torch.stack([batch.tensors()[name].flatten().float() for batch in expected.values()])  # type: ignore[union-attr]
        distances = torch.cdist(rows, rows) + torch.eye(COUNT) * 1e9
        assert distances.min() > 0.1, name
