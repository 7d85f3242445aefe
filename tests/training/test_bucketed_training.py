"""Training and evaluation on images of two sizes, mirrored ones among them."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from sdxl_lora.adapters.lora import add_adapters
from sdxl_lora.config import ModelConfig, TrainingConfig, load_params
from sdxl_lora.data.encoded_dataset import Batch, EncodedDataset, Example, Split
from sdxl_lora.data.shard_writer import write_index, write_shard
from sdxl_lora.evaluation.held_out_loss import HeldOutError, held_out_errors
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.training.batches import draw_variants, one_batch_per_size, training_batches
from sdxl_lora.training.denoiser import Denoiser, load_denoiser
from sdxl_lora.training.previews import Previewer
from sdxl_lora.training.trainer import Trainer, prepare_modules
from tests.support.encoded import CAPTIONS, write_encoded_dataset

CPU = torch.device("cpu")
PARAMS = load_params(Path("recipes/demo.yaml"))
MODEL: ModelConfig = PARAMS.model.model_copy(update={"text_encoders": "trained_then_frozen"})
CONFIG: TrainingConfig = PARAMS.training.model_copy(
    update={
        "steps": 8,
        "batch_size": 2,
        "micro_batch_size": 1,
        "warmup_steps": 0,
        "text_encoder_steps": 4,
        "optimizer": "adamw",
    }
)
SPLITS: tuple[Split, Split] = ("train", "held_out")
SQUARE, WIDE = (16, 16), (12, 20)
SHARDS = {SQUARE: range(5), WIDE: range(5, 8)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five square examples and three wide ones, with mirrored images. The same are held out."""
    folder = tmp_path_factory.mktemp("bucketed")
    plain = write_encoded_dataset(folder / "plain", MODEL)
    examples: list[Example] = []
    for split in SPLITS:
        for shape, rows in SHARDS.items():
            shard = f"{split}-{len(examples):05d}.safetensors"
            batch, mirrored = (with_latents(plain, rows, shape, key) for key in ("as it is", "mirrored"))
            write_shard(folder, shard, batch, mirrored)
            for row, number in enumerate(rows):
                digest, flipped = row_of(batch, row).digest(), row_of(mirrored, row).digest()
                name, caption = f"{number}.png", CAPTIONS[number]
                examples.append(Example(str(number), name, caption, split, shard, row, digest, flipped))
    write_index(folder, examples)
    return folder


def with_latents(plain: EncodedDataset, rows: range, shape: tuple[int, int], key: str) -> Batch:
    """Captions of `plain` with latents of this shape, other ones for each key."""
    batch, (height, width) = plain.batch(rows), shape
    means = [torch.randn(4, height, width, generator=keyed_generator(key, row)) for row in rows]
    time_ids = [[8 * height, 8 * width, 0, 0, 8 * height, 8 * width]] * len(rows)
    return Batch(
        torch.stack(means),
        torch.full((len(rows), 4, height, width), 0.1),
        batch.token_ids,
        torch.tensor(time_ids, dtype=torch.int32),
        batch.prompt_embeds,
        batch.pooled_prompt_embeds,
    )


def row_of(batch: Batch, row: int) -> Batch:
    return Batch(*(None if t is None else t[row : row + 1] for t in batch.tensors().values()))  # type: ignore[arg-type]


@pytest.fixture
def dataset(folder: Path) -> EncodedDataset:
    return EncodedDataset(folder, "train")


@pytest.fixture
def denoiser(dataset: EncodedDataset) -> Denoiser:
    """Ready to be trained."""
    denoiser = load_denoiser(MODEL, "fp32", CPU)
    add_adapters(denoiser.parts, PARAMS.lora, seed=0)
    prepare_modules(denoiser, CONFIG, dataset.largest_latents)
    return denoiser


def test_largest_latents_are_those_with_the_most_pixels(dataset: EncodedDataset) -> None:
    assert dataset.largest_latents == torch.Size((1, 4, *SQUARE))
    assert dataset.latents_shapes == [torch.Size((1, 4, *shape)) for shape in [SQUARE] * 5 + [WIDE] * 3]


def test_micro_batches_of_a_step_have_one_size_whatever_their_number(
    dataset: EncodedDataset, denoiser: Denoiser
) -> None:
    """How a step is divided changes nothing of what it is trained on."""
    whole = CONFIG.model_copy(update={"micro_batch_size": 2})
    halves = list(islice(training_batches(denoiser, dataset, CONFIG, 3), 20))
    pairs = [halves[start : start + 2] for start in range(0, 20, 2)]
    for pair, examples in zip(pairs, training_batches(denoiser, dataset, whole, 3), strict=False):
        assert [*pair[0].images, *pair[1].images] == examples.images
        for name, tensor in examples.named_tensors().items():
            assert torch.equal(torch.cat([half.named_tensors()[name] for half in pair]), tensor)
    assert {examples.batch.latents_mean.shape[2:] for examples in halves} == {SQUARE, WIDE}


def test_one_of_each_size_is_a_micro_batch_the_largest_first(
    dataset: EncodedDataset, denoiser: Denoiser
) -> None:
    config = CONFIG.model_copy(update={"micro_batch_size": 2})
    drawn = next(training_batches(denoiser, dataset, config, 3))
    found = list(one_batch_per_size(denoiser, dataset, config))
    assert [examples.batch.latents_mean.shape for examples in found] == [(2, 4, *SQUARE), (2, 4, *WIDE)]
    for examples in found:
        assert examples.named_tensors().keys() == drawn.named_tensors().keys()
        assert {t.dtype for t in examples.tensors()} == {t.dtype for t in drawn.tensors()}


def test_mirrored_images_are_drawn_for_half_of_the_visits(
    dataset: EncodedDataset, denoiser: Denoiser
) -> None:
    examples_ = dataset.examples[:1] * 400
    flips = [variant.flipped for variant in draw_variants(examples_, 0, seed=3)]
    assert 160 < sum(flips) < 240
    assert [variant.flipped for variant in draw_variants(examples_[:5], 100, seed=3)] == flips[100:105]
    assert [variant.flipped for variant in draw_variants(examples_, 0, seed=4)] != flips
    for position, examples in enumerate(islice(training_batches(denoiser, dataset, CONFIG, 3), 20)):
        number = int(examples.images[0].removesuffix(".png"))
        key = "mirrored" if flips[position] else "as it is"
        expected = torch.randn(examples.batch.latents_mean.shape[1:], generator=keyed_generator(key, number))
        assert torch.equal(examples.batch.latents_mean[0], expected)


def test_resumed_training_has_the_same_losses_across_sizes_and_freezing(
    dataset: EncodedDataset, denoiser: Denoiser
) -> None:
    whole = Trainer(denoiser, dataset, CONFIG, seed=0)
    steps = iter(whole)
    for _ in range(3):
        next(steps)
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    other = load_denoiser(MODEL, "fp32", CPU)
    add_adapters(other.parts, PARAMS.lora, seed=0)
    prepare_modules(other, CONFIG, dataset.largest_latents)
    resumed = Trainer(other, dataset, CONFIG, seed=0)
    resumed.load_state_dict(state)
    late = [(report.loss, report.grad_norm) for report in resumed]
    assert late == [(report.loss, report.grad_norm) for report in steps]
    assert len(late) == 5


def test_held_out_errors_do_not_depend_on_the_batches(folder: Path, denoiser: Denoiser) -> None:
    held_out = EncodedDataset(folder, "held_out")

    def errors(batch_size: int) -> dict[tuple[str, int], HeldOutError]:
        changes = {"timesteps": [50, 600], "noises": 1, "batch_size": batch_size}
        config = PARAMS.evaluation.model_copy(update=changes)
        found = [error for batch in held_out_errors(denoiser, held_out, config) for error in batch]
        assert len(found) == 16
        return {(error.example, error.timestep): error for error in found}

    alone, together = errors(1), errors(3)
    assert alone.keys() == together.keys()
    for key, error in alone.items():
        assert together[key].base == pytest.approx(error.base, rel=1e-4)


def test_preview_has_the_shape_of_its_image(dataset: EncodedDataset, denoiser: Denoiser) -> None:
    dataset.examples = dataset.examples[5:]
    assert Previewer(denoiser, dataset, MODEL).generate().size == (8 * WIDE[1], 8 * WIDE[0])
