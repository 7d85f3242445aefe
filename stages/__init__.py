"""The pipeline's stages: one script each, run by dvc.yaml as `python -m stages.<name>`."""

import logging
import os
import sys
from pathlib import Path

# `dvc exp run --temp` and queues run a copy of the repository, which must use its own library.
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

# cuBLAS repeats to the bit only with a workspace of its own. Stages show their own progress and news.
# MLflow's client would try a dead server for four minutes a call, and print the server's address, which may
# hold a password.
for name, value in {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}.items():
    os.environ.setdefault(name, value)

# On some CPUs it misses a kernel for 4-bit weights, which no stage has there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Prints the address of a server that fails, and the failure a second time.
logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
