"""The pipeline's stages: one script each, run by dvc.yaml as `python -m stages.<name>`."""

import logging
import os
import sys
from pathlib import Path

# `dvc exp run --temp` and queues run a copy of the repository, which must use its own library.
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

# These must be set before the libraries are imported.
# - cuBLAS is bit-reproducible only with a fixed workspace.
# - Libraries' progress bars and notices are off: stages show progress themselves.
# - MLflow's client would retry a dead server for four minutes a call, and print the server's address, which
#   may contain a password.
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

# On some CPUs it warns about a missing kernel for 4-bit weights, which no stage uses on a CPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# It prints the address of a server that fails, and repeats the failure.
logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
