"""Stage encode_dataset killed in the middle: what it did stays, and the result is as if nothing had been."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from sdxl_lora import paths
from stages import clean_captions, download_dataset
from tests.support.patience import patience

REPOSITORY = Path(__file__).parents[2]
IMAGES = 80
ENTRIES = 3 * IMAGES
SECONDS = patience(60)
COMMAND = (sys.executable, "-m", "stages.encode_dataset")


pytestmark = pytest.mark.timeout(patience(240))


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project with the demo recipe, cut to 80 images, downloaded and with clean captions."""
    for name in ("demo", "stages", "src"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    recipe = yaml.safe_load((REPOSITORY / "recipes/demo.yaml").read_text(encoding="utf-8"))
    recipe["download"]["max_examples"] = IMAGES
    recipe["encoding"].update(batch_size=4, resolution=64)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("SDXL_LORA_DEVICE", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    paths.PARAMS.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    download_dataset.main()
    clean_captions.main()


def encode(command: Sequence[str] = COMMAND) -> dict[str, bytes]:
    """Runs the stage to its end; its output by file name."""
    subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
    return {file.name: file.read_bytes() for file in paths.ENCODED.iterdir()}


def num_entries() -> int:
    return sum(file.is_file() for file in paths.ENCODED_STORE.rglob("*"))


def encode_and_kill(after: int) -> None:
    """Starts the stage and kills it as soon as it has put `after` entries into the store."""
    with subprocess.Popen(COMMAND, stderr=subprocess.DEVNULL, start_new_session=True) as stage:
        deadline = time.monotonic() + SECONDS
        while num_entries() < after:
            assert stage.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.killpg(stage.pid, signal.SIGKILL)
    assert stage.returncode == -signal.SIGKILL
    assert not paths.ENCODED.exists()


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_runs_lose_nothing_and_give_the_same_shards(kills: int) -> None:
    uninterrupted = encode()
    shutil.rmtree(paths.ENCODED_STORE)
    shutil.rmtree(paths.ENCODED)
    moments = sorted(random.Random(kills).sample(range(1, ENTRIES), kills))
    for moment in moments:
        encode_and_kill(moment)
        assert num_entries() >= moment
    assert encode() == uninterrupted
    assert len(uninterrupted) >= 3


def test_two_processes_give_the_same_shards() -> None:
    alone = encode()
    shutil.rmtree(paths.ENCODED_STORE)
    shutil.rmtree(paths.ENCODED)
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2")
    assert encode((*launcher, "-m", "stages.encode_dataset")) == alone
    assert num_entries() == ENTRIES
