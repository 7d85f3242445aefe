import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_lora.adapters.lora import add_adapters, lora_parameters
from sdxl_lora.config import Params, TrainingConfig, load_params
from sdxl_lora.data.encoded_dataset import INDEX, EncodedDataset
from sdxl_lora.data.shard_writer import write_index, write_shard
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.training.checkpointer import Checkpoint, Checkpointer, training_key
from sdxl_lora.training.denoiser import Denoiser, load_denoiser
from sdxl_lora.training.trainer import Trainer, prepare_modules
from tests.support.encoded import write_encoded_dataset
from tests.support.killable import Job, Killer
from tests.support.patience import patience

CPU = torch.device("cpu")
SEED = 7
STEPS = 8
EVERYTHING = {
    "steps": STEPS,
    "batch_size": 4,
    "micro_batch_size": 2,
    "precision": "fp16",
    "optimizer": "adamw_8bit",
    "ema_decay": 0.9,
    "attention": "sdpa",
    "text_encoder_steps": STEPS // 2,
    "warmup_steps": 1,
    "caption_dropout": 0.5,
    "checkpoint_minutes": 0.0,
}
"""Of `training`: all that a state consists of."""


@pytest.fixture(scope="module")
def params() -> Params:
    """The demo's, with everything that a state consists of."""
    params = load_params(Path("recipes/demo.yaml"))
    return params.model_copy(
        update={
            "model": params.model.model_copy(update={"text_encoders": "trained_then_frozen"}),
            "lora": params.lora.model_copy(update={"rank": 4}),
            "training": params.training.model_copy(update=EVERYTHING),
        }
    )


@pytest.fixture(scope="module")
def encoded(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five square examples and three wide ones."""
    folder = tmp_path_factory.mktemp("checkpoints") / "encoded"
    dataset = write_encoded_dataset(folder, params.model)
    square, wide = dataset.examples[:5], dataset.examples[5:]
    batch = replace(
        dataset.batch(range(5, 8)),
        latents_mean=torch.randn(3, 4, 12, 20, generator=keyed_generator("wide")),
        latents_std=torch.full((3, 4, 12, 20), 0.1),
    )
    write_shard(folder, "train-00001.safetensors", batch)
    moved = [replace(example, shard="train-00001.safetensors", row=row) for row, example in enumerate(wide)]
    write_index(folder, [*square, *moved])
    return folder


def job(folder: Path, encoded: Path, params: Params, device: str, steps: int) -> Job:
    folder.mkdir()
    config = params.training.model_copy(update={"steps": steps, "text_encoder_steps": steps // 2})
    return Job(folder, encoded, params.model, params.lora, config, device)


@pytest.mark.timeout(patience(360))
@pytest.mark.parametrize(
    ("device", "kills", "steps"),
    [
        ("cpu", 3, STEPS),
        pytest.param("cpu", 20, 24, marks=pytest.mark.slow),
        pytest.param("cuda", 5, 200, marks=pytest.mark.gpu),
    ],
)
def test_killed_trainings_end_in_a_bit_identical_adapter(
    params: Params,
    encoded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    kills: int,
    steps: int,
) -> None:
    """SIGKILL at random moments of random steps, with all of a state; on a GPU, with a graph."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    killer = Killer(kills, device)
    uninterrupted = killer.run(job(tmp_path / "uninterrupted", encoded, params, device, steps))
    killed = job(tmp_path / "killed", encoded, params, device, steps)
    starts = [killer.run_and_kill(killed, moment) for moment in killer.moments(kills, steps)]
    assert killer.run(killed) == uninterrupted
    assert starts[0] == 0
    assert all(start > 0 for start in starts[1:])
    scales = [scale for *_, scale, _ in uninterrupted.history]
    rises = [after > before for before, after in pairwise(scales)]
    falls = [after < before for before, after in pairwise(scales)]
    assert any(rises)
    assert any(falls)


@pytest.mark.parametrize(
    ("optimizer", "stop"),
    [("adamw", 2), ("adamw_8bit", 3), ("adamw", 4), ("adamw_8bit", 5)],
)
def test_resumed_training_is_the_uninterrupted_one(
    params: Params, encoded: Path, tmp_path: Path, optimizer: str, stop: int
) -> None:
    """Before, at and after the freezing step, and the last; in fp32, where a weight is its master."""
    changes = {"precision": "fp32", "optimizer": optimizer, "batch_size": 2, "micro_batch_size": 1}
    config = params.training.model_copy(update={**changes, "steps": 5, "text_encoder_steps": 3})
    (whole, one), (first, _), (second, other) = (make(params, config, encoded) for _ in range(3))
    losses = [(report.step, report.loss, report.grad_norm) for report in whole]
    for _ in islice(first, stop):
        pass
    checkpoints = Checkpointer(tmp_path, 0.0)
    checkpoints.save(first.step, first.state_dict(), {})
    second.load_state_dict(require(checkpoints.newest()).tensors)
    assert second.history == first.history
    assert [(report.step, report.loss, report.grad_norm) for report in second] == losses[stop:]
    assert second.is_finished
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def make(params: Params, config: TrainingConfig, encoded: Path) -> tuple[Trainer, Denoiser]:
    denoiser = load_denoiser(params.model, config.precision, CPU)
    add_adapters(denoiser.parts, params.lora, SEED)
    dataset = EncodedDataset(encoded, "train")
    prepare_modules(denoiser, config, dataset.largest_latents)
    return Trainer(denoiser, dataset, config, SEED), denoiser


def weights(denoiser: Denoiser) -> list[Tensor]:
    return [p.detach() for module in denoiser.modules for p in lora_parameters(module)]


def require(checkpoint: Checkpoint | None) -> Checkpoint:
    assert checkpoint is not None
    return checkpoint


def number(value: float) -> dict[str, Tensor]:
    """A state."""
    return {"number": torch.tensor(value, dtype=torch.float64), "row": torch.arange(1000)}


def saved(folder: Path, steps: Iterable[int]) -> Checkpointer:
    checkpoints = Checkpointer(folder, 0.0)
    for step in steps:
        checkpoints.save(step, number(step), {"attention": f"of step {step}"})
    return checkpoints


def test_what_was_saved_is_read_with_its_facts(tmp_path: Path) -> None:
    checkpoint = require(saved(tmp_path, [12]).newest())
    assert checkpoint.facts == {"attention": "of step 12"}
    assert checkpoint.tensors.keys() == number(12).keys()
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in number(12).items())


def test_tensors_that_share_memory_are_saved_apart(tmp_path: Path) -> None:
    """As the groups' masters do, and bitsandbytes' tables."""
    row = torch.arange(10)
    checkpoints = Checkpointer(tmp_path, 0.0)
    checkpoints.save(1, {"whole": row, "half": row[:5], "again": row}, {})
    assert require(checkpoints.newest()).tensors["half"].tolist() == [0, 1, 2, 3, 4]


def test_last_two_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [9, 10, 100])
    assert [path.name[:13] for path in sorted(tmp_path.iterdir())] == ["step-00000010", "step-00000100"]
    assert require(checkpoints.newest()).tensors["number"] == 100


@pytest.mark.parametrize("damage", ["a bit", "torn", "empty"])
def test_damaged_newest_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path, [1, 2])
    newest = sorted(tmp_path.iterdir())[-1]
    content = newest.read_bytes()
    changed = content[:-1] + bytes([content[-1] ^ 1])
    newest.write_bytes({"a bit": changed, "torn": content[:-100], "empty": b""}[damage])
    assert require(checkpoints.newest()).tensors["number"] == 1
    assert f"{newest.name} is damaged: falling back" in caplog.text


def test_nothing_is_found_where_nothing_is_whole(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path / "none", 0.0).newest() is None
    checkpoints = saved(tmp_path, [1])
    next(tmp_path.iterdir()).write_bytes(b"half")
    (tmp_path / ".7-step-00000002-abc.safetensors").write_bytes(b"of a process that was killed")
    assert checkpoints.newest() is None
    assert len(list(tmp_path.iterdir())) == 1


def test_full_disk_costs_the_new_checkpoint_alone(tmp_path: Path) -> None:
    """Full for this process: a file of more than 4096 bytes cannot be written."""
    checkpoints = saved(tmp_path, [1, 2])
    names = sorted(path.name for path in tmp_path.iterdir())
    with files_of_at_most(4096), pytest.raises(OSError, match="File too large"):
        checkpoints.save(3, number(3), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert require(checkpoints.newest()).tensors["number"] == 2


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("minutes", "due"), [(None, False), (0.0, True), (60.0, False)])
def test_checkpoints_are_due_after_their_minutes(tmp_path: Path, minutes: float | None, due: bool) -> None:
    assert Checkpointer(tmp_path, minutes).are_due() == due


def test_deleting_takes_forgotten_ones_of_other_trainings_along(tmp_path: Path) -> None:
    for name in ("own", "recent", "forgotten"):
        saved(tmp_path / name, [1])
    os.utime(tmp_path / "forgotten", (0, 0))
    Checkpointer(tmp_path / "own", 0.0).delete()
    assert [path.name for path in tmp_path.iterdir()] == ["recent"]


def test_no_training_resumes_from_anothers_checkpoints(params: Params, encoded: Path, tmp_path: Path) -> None:
    def key(index: Path = encoded / INDEX, seed: int = SEED, rank: int = 4, **training: Any) -> str:
        lora = params.lora.model_copy(update={"rank": rank})
        config = params.training.model_copy(update=training)
        return training_key(seed, lora, params.model, config, index, CPU)

    other = tmp_path / INDEX
    other.write_text((encoded / INDEX).read_text().replace("pizza", "pasta"))
    keys = [key(), key(other), key(seed=8), key(rank=5), key(steps=9), key(learning_rate=0.1)]
    assert len(set(keys)) == len(keys)
    assert key(checkpoint_minutes=9.0, deadline_minutes=1.0, log_every=77) == key()
