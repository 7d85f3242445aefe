import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.official_script import find_script, script_arguments
from benchmarks.results import Configuration
from benchmarks.saved_sdxl import save_random_images
from benchmarks.watch import Progress, watch

BAR = b"\rSteps:  %3d%%|#####     | %d/24 [00:05<00:37,  1.69s/it, lr=0.0001, step_loss=%s]"
USUAL: Configuration = {
    "precision": "fp16",
    "checkpointing": "all",
    "attention": "sdpa",
    "optimizer": "adamw_8bit",
    "text_encoders": "trained",
    "batch_size": 3,
    "rank": 16,
    "resolution": 1024,
    "workers": 4,
}
TRAINER = """
import sys, time
from pathlib import Path
from tqdm.auto import tqdm
bar = tqdm(range(4000), desc="Steps")
for step in range(4000):
    time.sleep(0.05)
    if step == {fails_at}:
        raise {error}
    bar.update(1)
    bar.set_postfix(step_loss=0.5)
Path("end").write_text(" ".join(sys.argv[1:]))
"""


def bar(step: int, loss: bytes = b"0.25") -> bytes:
    return BAR % (step * 100 // 24, step, loss)


def test_steps_last_from_one_advance_of_the_bar_to_the_next() -> None:
    progress = Progress()
    for step, time in enumerate([10.0, 13.0, 14.0, 16.5]):
        progress.read(bar(step), time)
        progress.read(bar(step), time + 0.3)  # drawn again for the loss
    assert progress.seconds(warmup=1) == [1.0, 2.5]
    assert progress.seconds(warmup=2) == [2.5]


def test_a_bar_cut_by_the_pipe_counts_when_its_rest_arrives() -> None:
    progress = Progress()
    whole = bar(1) + bar(12, b"0.125")
    cut = whole.index(b"12/24") + 1  # within the number
    progress.read(whole[:cut], 1.0)
    assert progress.steps == 1
    progress.read(whole[cut:], 2.0)
    assert (progress.steps, progress.loss) == (12, 0.125)


def test_other_bars_are_not_mistaken_for_steps() -> None:
    progress = Progress()
    progress.read(b"Loading weights: 100%|##########| 517/517 [00:00<00:00]\nsteps: 3/4 [", 1.0)
    assert progress.steps == 0


def test_a_skipped_count_is_refused_rather_than_averaged() -> None:
    progress = Progress()
    for step, time in ((1, 1.0), (2, 2.0), (4, 3.0)):
        progress.read(bar(step), time)
    with pytest.raises(ValueError, match=r"progress bar skipped \[3\]"):
        progress.seconds(warmup=1)


def trainer(folder: Path, fails_at: int | None = None, error: str = "") -> Path:
    path = folder / "trainer.py"
    path.write_text(TRAINER.format(fails_at=fails_at, error=error or "None"))
    return path


def test_a_script_is_timed_and_interrupted_before_its_end(tmp_path: Path) -> None:
    observed = watch(trainer(tmp_path), ["--rank=4"], None, warmup=2, steps=5, scratch=tmp_path)
    assert observed.outcome == "ok"
    assert len(observed.seconds) == 5
    assert all(seconds >= 0 for seconds in observed.seconds)  # two may be read at once, by a late reader
    assert observed.figures == {"final_loss": 0.5}
    assert not (tmp_path / "end").exists()
    assert b"Steps:" in (tmp_path / "script.log").read_bytes()


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        ("ValueError('no xformers')", "ValueError: no xformers"),
        ("__import__('torch').OutOfMemoryError('too much')", "out of memory"),
    ],
)
def test_what_ended_a_script_is_its_outcome(tmp_path: Path, error: str, outcome: str) -> None:
    observed = watch(trainer(tmp_path, 4, error), [], None, warmup=1, steps=20, scratch=tmp_path)
    assert observed.outcome == outcome
    assert len(observed.seconds) == 3  # steps 2 to 4 came before


def test_the_usual_16_gb_flags_are_the_scripts_own() -> None:
    arguments = script_arguments(USUAL, Path("model"), Path("images"), Path("output"))
    assert {"--mixed_precision=fp16", "--train_batch_size=3", "--rank=16", "--resolution=1024"} <= set(
        arguments
    )
    switches = {argument for argument in arguments if "=" not in argument}
    assert switches == {"--gradient_checkpointing", "--use_8bit_adam", "--train_text_encoder"}


def test_every_switch_can_be_turned() -> None:
    other = USUAL | {
        "precision": "fp32",
        "checkpointing": "none",
        "attention": "xformers",
        "optimizer": "adamw",
        "text_encoders": "frozen",
    }
    arguments = script_arguments(other, Path("model"), Path("images"), Path("output"))
    assert "--mixed_precision=no" in arguments
    assert [a for a in arguments if "=" not in a] == ["--enable_xformers_memory_efficient_attention"]


def test_a_checkout_without_the_script_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="set --checkout to a checkout of diffusers or to the script"):
        find_script(tmp_path)


def test_random_images_load_as_an_image_folder(tmp_path: Path) -> None:
    folder = save_random_images(tmp_path / "images", count=3, sizes=[(64, 64)])
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len({row["text"] for row in rows}) == 3
    assert {Image.open(folder / row["file_name"]).size for row in rows} == {(64, 64)}
