"""Wall time, GPU time, start-up time, memory and bytes written of each stage of `dvc repro`.

Runs SDXL's real shapes with random weights on random images of several shapes, within the 16 GB recipe's
memory budget, with previews. `--tiny` runs the demo's recipe instead, on any machine. It prints a row when
a stage ends.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch
import yaml

from benchmarks.saved_sdxl import save_random_images, save_random_sdxl
from sdxl_lora.storage.repository import folder_digest

COPIED = (".dvc/config", ".dvcignore", ".gitignore", "demo", "dvc.yaml", "recipes", "src", "stages")
PERIOD = 0.05  # seconds between two polls of the GPU and the processes
GIB = 2**30
SIDES = ((1024, 1024), (1216, 832), (832, 1216), (1500, 1000))


@dataclass
class StageUse:
    """Resources that one stage used."""

    stage: str
    wall_seconds: float = 0.0
    gpu_seconds: float = 0.0
    """Time during which the driver reported a running kernel."""
    start_seconds: float = 0.0
    """From the start of the process to the first GPU work; the whole stage if there was none."""
    device_gib: float = 0.0
    """Peak GPU memory that the driver reported."""
    written_gib: float = 0.0
    """Bytes that the stage's processes wrote."""


class Watch:
    """Polls the GPU and the processes of a command in a thread until it is closed."""

    def __init__(self, root: psutil.Process) -> None:
        self._root = root
        self._gpu: Any = None
        self.uses: list[StageUse] = []
        self._written: dict[int, int] = {}
        self._stop = threading.Event()
        self._began = time.monotonic()
        if torch.cuda.is_available():
            pynvml.nvmlInit()
            self._gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def begin(self, stage: str) -> None:
        """Start counting for `stage`."""
        self.end()
        self._written.clear()
        self._began = time.monotonic()
        self.uses.append(StageUse(stage))

    def end(self) -> None:
        """Close the row of the current stage."""
        if self.uses and not self.uses[-1].wall_seconds:
            use = self.uses[-1]
            use.wall_seconds = time.monotonic() - self._began
            use.start_seconds = use.start_seconds or use.wall_seconds
            use.written_gib = sum(self._written.values()) / GIB

    def close(self) -> None:
        """Stop polling."""
        self._stop.set()
        self._thread.join()
        self.end()

    def _poll(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(PERIOD):
            now = time.monotonic()
            if self.uses:
                self._look(self.uses[-1], now - last)
            last = now

    def _look(self, use: StageUse, seconds: float) -> None:
        if self._gpu is not None:
            use.device_gib = max(use.device_gib, pynvml.nvmlDeviceGetMemoryInfo(self._gpu).used / GIB)
            if pynvml.nvmlDeviceGetUtilizationRates(self._gpu).gpu:
                use.gpu_seconds += seconds
                use.start_seconds = use.start_seconds or time.monotonic() - self._began
        with suppress(psutil.Error):
            for process in self._root.children(recursive=True):
                with suppress(psutil.Error):
                    self._written[process.pid] = process.io_counters().write_bytes


def make_project(root: Path, tiny: bool, changes: dict[str, Any], count: int, weights: Path) -> None:
    """Copy the project to `root` and write the params, images and weights of the benchmark.

    Args:
        changes: params by dotted key.
        count: number of images.
        weights: folder of the random base model; created if it does not exist.
    """
    root.mkdir(parents=True)
    for name in COPIED:
        source = Path(name)
        copy = shutil.copytree if source.is_dir() else shutil.copy
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        copy(source, root / name)
    params = yaml.safe_load(
        Path("recipes/demo.yaml" if tiny else "recipes/sdxl-naruto-16gb.yaml").read_text()
    )
    if not tiny:
        demo = yaml.safe_load(Path("recipes/demo.yaml").read_text())
        save_random_sdxl(weights, torch.device("cuda"))
        save_random_images(root / "images", count, SIDES)
        changes = {
            "download.repository": "./images",
            "download.revision": folder_digest(root / "images"),
            "download.image_column": "file_name",
            "model.base": str(weights.absolute()),
            "model.revision": folder_digest(weights),
            "model.variant": None,
            "model.vae": None,
            "model.vae_revision": None,
            "captions.trigger": None,
            "evaluation.clip_model": demo["evaluation"]["clip_model"],
            "evaluation.clip_revision": demo["evaluation"]["clip_revision"],
            "evaluation.style": None,
            "encoding.near_duplicate_bits": None,
            **changes,
        }
    for key, value in changes.items():
        section, _, name = key.partition(".")
        params[section][name] = value
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for command in (["git", "init", "-q"], ["git", "add", "."], ["git", "commit", "-qm", "benchmark"]):
        identity = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost"]
        subprocess.run([command[0], *identity, *command[1:]], cwd=root, check=True)


def run_pipeline(root: Path) -> tuple[list[StageUse], int]:
    """Run `dvc repro` in `root`; print a row whenever a stage has ended.

    Returns:
        The stages that ran, and the exit status.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "dvc", "repro"]
    with subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        watch = Watch(psutil.Process(process.pid))
        assert process.stdout is not None
        with (root / "repro.log").open("w") as log:
            for line in process.stdout:
                log.write(line)
                if line.startswith("Running stage "):
                    watch.end()
                    print_row(watch.uses)
                    watch.begin(line.split("'")[1])
        status = process.wait()
    watch.close()
    print_row(watch.uses)
    return watch.uses, status


HEAD = f"{'stage':18}{'wall s':>8}{'GPU s':>8}{'start s':>9}{'device GiB':>12}{'written GiB':>13}"


def print_row(uses: Sequence[StageUse]) -> None:
    """Print the row of the last stage."""
    if uses:
        u = uses[-1]
        print(
            f"{u.stage:18}{u.wall_seconds:8.1f}{u.gpu_seconds:8.1f}{u.start_seconds:9.1f}"
            f"{u.device_gib:12.2f}{u.written_gib:13.2f}",
            flush=True,
        )


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="run the demo's recipe: CPU or GPU, minutes")
    parser.add_argument("--images", type=int, default=120, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps; default: %(default)s")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other params")
    weights = Path(tempfile.gettempdir()) / "random-sdxl"
    parser.add_argument("--weights", type=Path, default=weights, help="the base model; default: %(default)s")
    parser.add_argument("--folder", type=Path, required=True, help="folder to create for the project")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    steps, folder = arguments.steps, arguments.folder
    changes = {
        "training.steps": steps,
        "training.preview_every": steps // 2,
        "training.warmup_steps": min(20, steps // 4),
    }
    for item in arguments.set:
        key, _, value = item.partition("=")
        changes[key] = yaml.safe_load(value)
    make_project(folder, arguments.tiny, changes, arguments.images, arguments.weights)
    print(HEAD, flush=True)
    uses, status = run_pipeline(folder)
    total, busy = sum(u.wall_seconds for u in uses), sum(u.gpu_seconds for u in uses)
    print(f"{'all':18}{total:8.1f}{busy:8.1f}   overhead {total - busy:.1f} s, exit status {status}")
    report = folder / "data/reports/training.json"
    if report.is_file():
        training = json.loads(report.read_text())
        shown = ("peak_memory_gib", "forecast_gib", "plan", "attention", "examples_per_second")
        print(json.dumps({name: training[name] for name in shown if name in training}))
    (folder / "pipeline.json").write_text(json.dumps([asdict(use) for use in uses], indent=2))
    if status:
        print((folder / "repro.log").read_text()[-3000:])
    sys.exit(status)


if __name__ == "__main__":
    main()
