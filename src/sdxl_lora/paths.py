"""Every place that a stage reads or writes, relative to the project's root; dvc.yaml names the same."""

from pathlib import Path

PARAMS = Path("params.yaml")
PIPELINE = Path("dvc.yaml")
LOCK = Path("dvc.lock")
RECIPES = Path("recipes")

DATA = Path("data")
REPORTS = DATA / "reports"

RAW = DATA / "raw"
RAW_IMAGES = RAW / "images"
RAW_CAPTIONS = RAW / "captions.jsonl"
RAW_SOURCE = RAW / "source.json"

CAPTIONS = DATA / "captions.jsonl"
CAPTIONS_REPORT = REPORTS / "captions.json"
CAPTION_PAGE = REPORTS / "captions.html"
CAPTION_CHANGES = REPORTS / "caption_changes.csv"
CAPTION_REJECTIONS = REPORTS / "caption_rejections.csv"

ENCODED = DATA / "encoded"
DATASET_CARD = REPORTS / "dataset.md"
ENCODED_STORE = Path(".dvc/tmp/encoded")
ENCODED_INDEX = ENCODED / "index.jsonl"
ENCODING_REPORT = REPORTS / "encoding.json"
ENCODING_ENVIRONMENT = REPORTS / "environment/encode_dataset.json"
IMAGE_FINDINGS = REPORTS / "image_findings.csv"

LORA = DATA / "lora"
PREVIEWS = DATA / "previews"
TRAINING_REPORT = REPORTS / "training.json"
TRAINING_ENVIRONMENT = REPORTS / "environment/train_lora.json"
LOSS_CURVE = REPORTS / "loss.csv"
RECORDED_TRAINING = Path(".dvc/tmp/recorded_training.json")
"""In a clone that reproduces a run: the recorded training report, with the values selected for `auto`."""
CHECKPOINTS = Path(".dvc/tmp/checkpoints")
FAILED_STEPS = Path(".dvc/tmp/failed_steps")

SAMPLES = DATA / "samples"
SAMPLE_GRID = SAMPLES / "grid.png"
SAMPLE_TABLE = SAMPLES / "samples.jsonl"

METRICS = REPORTS / "metrics.json"
LOSS_BY_TIMESTEP = REPORTS / "loss_by_timestep.csv"
INTERVALS = REPORTS / "intervals.csv"
COPIES = REPORTS / "copies.csv"
GATES = REPORTS / "gates.csv"

EXPORT = DATA / "export"
CARD = EXPORT / "README.md"
EXPORTED_WEIGHTS = EXPORT / "pytorch_lora_weights.safetensors"
LINEAGE = REPORTS / "lineage.json"
REPORT = REPORTS / "index.html"

MLFLOW_POINTER = REPORTS / "mlflow.json"
REPRODUCTION = REPORTS / "reproduction.json"
REPRODUCTION_PAGE = REPORTS / "reproduction.md"

ENVIRONMENTS = {"encode_dataset": ENCODING_ENVIRONMENT, "train_lora": TRAINING_ENVIRONMENT}
"""The environment reports of the stages that compute the adapter."""
RECORD = (PARAMS, PIPELINE, LOCK, METRICS, TRAINING_REPORT, LOSS_CURVE, LINEAGE, *ENVIRONMENTS.values())
"""The small files that are needed to reproduce a run and to compare the results."""
NUMBERS = (CAPTIONS_REPORT, ENCODING_REPORT, TRAINING_REPORT, METRICS)
"""The reports that are nested mappings of numbers."""
