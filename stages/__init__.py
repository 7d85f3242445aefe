"""The pipeline's stages: one script each, run by dvc.yaml as `python -m stages.<name>`."""

import os
import sys
from pathlib import Path

# `dvc exp run --temp` and queues run a copy of the repository, which must use its own library.
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

# cuBLAS repeats to the bit only with a workspace of its own. Stages show their own progress. MLflow's client
# would try a dead server for four minutes a call.
for name, value in {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}.items():
    os.environ.setdefault(name, value)
