"""The pipeline's stages without their work: `python toy_stages.py <name>` writes small outputs in a moment.

As those of the real stages, they depend on the params that dvc.yaml gives the stage and on nothing else.
"""

import json
import os
import sys
import time
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from sdxl_lora import paths
from sdxl_lora.config import load_params
from sdxl_lora.runtime.git import head_commit
from sdxl_lora.runtime.stage import record_stage, run_stage

STEPS = 3
NO_TENSORS = (2).to_bytes(8, "little") + b"{}"  # a safetensors file


def write_outputs(name: str) -> None:
    """Fills every output of a stage, as dvc.yaml lists them; those that track_run reads have real forms."""
    pipeline = yaml.safe_load(paths.PIPELINE.read_text())["stages"][name]
    params = yaml.safe_load(paths.PARAMS.read_text())
    value = str({key: reduce(getitem, key.split("."), params) for key in pipeline["params"]})
    for kind in ("outs", "metrics", "plots"):
        for entry in pipeline.get(kind, []):
            write_output(Path(entry if isinstance(entry, str) else next(iter(entry))), value, params)


def write_output(path: Path, value: str, params: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path == paths.SAMPLES:
        write_samples(path, params["lora"]["rank"])
    elif path == paths.LOSS_CURVE:
        path.write_text("step,loss\n" + "".join(f"{step},{1 / step}\n" for step in range(1, STEPS + 1)))
    elif path == paths.TRAINING_REPORT:
        path.write_text(json.dumps({"peak_memory_gib": 1.5, "rank": params["lora"]["rank"]}))
    elif path == paths.LINEAGE:
        path.write_text(json.dumps({"sdxl_lora.git.commit": head_commit()}))
    elif path == paths.GATES:
        path.write_text("name,passed,reason\ncopied,True,\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps({"size": len(value)}))
    elif path.suffix in (".csv", ".jsonl", ".html"):
        path.write_text(value)
    else:
        path.mkdir(exist_ok=True)
        (path / "content.txt").write_text(value)
        for file in (paths.RAW_SOURCE, paths.ENCODED_INDEX, paths.CARD):
            if file.parent == path:
                file.write_text(json.dumps({"repository": "owner/pictures", "examples": 9}))
        if path == paths.EXPORT:
            paths.EXPORTED_WEIGHTS.write_bytes(NO_TENSORS)


def write_samples(folder: Path, rank: int) -> None:
    from sdxl_lora.inference.samples import (  # takes a second, for which the others need not wait
        Sample,
        save_table,
    )

    sample = Sample("strength-1/00-seed-0.png", "red apple", 0, 1.0)
    (folder / sample.file).parent.mkdir(parents=True, exist_ok=True)
    for file in (folder / sample.file, paths.SAMPLE_GRID):
        Image.new("RGB", (64, 64), (rank * 7 % 256, 128, 64)).save(file)
    save_table(paths.SAMPLE_TABLE, [sample])


def train() -> None:
    """Reports to a live run, as long as params.yaml says."""
    # Takes seconds, for which the other stages need not wait.
    from sdxl_lora.tracking import live_run

    live_run.PATIENCE_SECONDS = 60.0  # a busy machine is not to exhaust it
    params = load_params()
    with live_run.live_run(params) as live:
        for step in range(1, STEPS + 1):
            live.log(step, loss=1 / step)
        live.image("preview", Image.new("RGB", (64, 64)), STEPS)
        live.flush()
        time.sleep(params.training.warmup_steps)


def main() -> None:
    name = sys.argv[1]
    if os.environ.get("TOY_FAILS") == name:
        raise ValueError(f"{name} fails, as it was told to")
    with record_stage(name):
        if name == "train_lora":
            train()
        write_outputs(name)


if __name__ == "__main__":
    run_stage(main)
