"""Environment variables and loggers that libraries read when they are imported: set them before that.

The one table of them. A variable that the user has set stays as it is. Imports nothing but the standard
library, since it runs first.
"""

import logging
import os
from collections.abc import Mapping

COMPUTE = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS is deterministic only with a fixed workspace
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
"""PyTorch and the model libraries: deterministic, and silent, since stages show their progress themselves."""
MLFLOW_CLIENT = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the address may hold a password
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # by default a call to a dead server takes four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
}
"""MLflow in a stage: quiet, and quick to give up on a dead server."""
MLFLOW_SERVER = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # unused here; takes 2.6 GB and 13 s at the start
}
"""MLflow as the server of its page."""
SERVICE_CHECK = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",  # seconds
    "AWS_MAX_ATTEMPTS": "1",
}
"""Clients of MLflow and S3 while the doctor asks a service: a dead one fails before the doctor gives up."""

_LOGGERS = {
    # On some CPUs it warns that it lacks a kernel for 4-bit weights, which nothing here uses on a CPU.
    "bitsandbytes.backends.cpu.ops": logging.ERROR,
    # Prints the address of a server that fails, and the failure a second time.
    "mlflow.system_metrics": logging.CRITICAL,
}


def set_library_settings(*tables: Mapping[str, str]) -> None:
    """Set the variables of `tables` that are not set yet, and the levels of noisy loggers."""
    for table in tables:
        for name, value in table.items():
            os.environ.setdefault(name, value)
    for name, level in _LOGGERS.items():
        logging.getLogger(name).setLevel(level)
