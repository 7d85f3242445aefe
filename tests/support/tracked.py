"""A project in which every stage but track_run has run, with small results."""

import json
import shutil
from pathlib import Path

import pandas as pd
import torch
import yaml
from PIL import Image

from sdxl_lora import paths
from sdxl_lora.adapters.lineage import PREFIX
from sdxl_lora.inference.samples import Sample, save_table
from sdxl_lora.storage.report_io import write_numbers
from sdxl_lora.storage.safetensors_io import write_tensors

REPOSITORY = Path(__file__).parents[2]


def write_results() -> None:
    """Writes params, pipeline and results into the current folder."""
    shutil.copy(REPOSITORY / "recipes/demo.yaml", paths.PARAMS)
    shutil.copy(REPOSITORY / "dvc.yaml", paths.PIPELINE)
    outs = [{"path": "data/lora", "md5": "1"}]
    paths.LOCK.write_text(yaml.safe_dump({"stages": {"train_lora": {"outs": outs}}}))
    for number, path in enumerate(paths.NUMBERS):
        write_numbers(path, {"group": {"value": float(number)}, "peak_memory_gib": 9.98, "attention": "sdpa"})
    paths.CAPTION_PAGE.write_text("<!doctype html><title>Captions</title><h1>Captions</h1>", encoding="utf-8")
    curve = pd.DataFrame({"step": [10, 20], "loss": [0.5, 0.25]})
    curve.to_csv(paths.LOSS_CURVE, index=False)
    paths.EXPORT.mkdir()
    header = {f"{PREFIX}git.commit": "c0ffee"}
    write_tensors(paths.EXPORTED_WEIGHTS, {"unet.layer.lora_A.weight": torch.ones(1, 2)}, header)
    paths.CARD.write_text("---\nlicense: mit\n---\n# An adapter\n\n![Samples](grid.png)\n")
    for path in (paths.RAW_SOURCE, paths.ENCODED_INDEX):
        path.parent.mkdir()
        path.write_text(json.dumps({"repository": "owner/pictures", "revision": "c0ffee", "examples": 9}))
    paths.REPORT.write_text("<!doctype html>")
    write_gates(None)
    sample = Sample("strength-1/00-seed-0.png", "red apple", 0, 1.0)
    (paths.SAMPLES / sample.file).parent.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(paths.SAMPLES / sample.file)
    Image.new("RGB", (64, 64), "red").save(paths.SAMPLE_GRID)
    save_table(paths.SAMPLE_TABLE, [sample])


def write_gates(failure: str | None) -> None:
    """One gate, `copied`, that passed or failed for this reason."""
    gate = {"name": ["copied"], "passed": [failure is None], "reason": [failure]}
    pd.DataFrame(gate).to_csv(paths.GATES, index=False)
