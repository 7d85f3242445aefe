"""Every place that a stage reads or writes, relative to the project's root; dvc.yaml names the same."""

from pathlib import Path

PARAMS = Path("params.yaml")
RECIPES = Path("recipes")

DATA = Path("data")
REPORTS = DATA / "reports"

RAW_IMAGES = DATA / "raw" / "images"
RAW_CAPTIONS = DATA / "raw" / "captions.jsonl"
RAW_SOURCE = DATA / "raw" / "source.json"

CAPTIONS = DATA / "captions.jsonl"
CAPTIONS_REPORT = REPORTS / "captions.json"

ENCODED = DATA / "encoded"

LORA = DATA / "lora"
PREVIEWS = DATA / "previews"
TRAINING_REPORT = REPORTS / "training.json"
LOSS_CURVE = REPORTS / "loss.csv"

SAMPLES = DATA / "samples"
SAMPLE_GRID = SAMPLES / "grid.png"

METRICS = REPORTS / "metrics.json"
LOSS_BY_TIMESTEP = REPORTS / "loss_by_timestep.csv"

MLFLOW_POINTER = REPORTS / "mlflow.json"
