"""The pipeline's stages: one script each, run by dvc.yaml as `python -m stages.<name>`."""

import sys
from pathlib import Path

# `dvc exp run --temp` and queues run a copy of the repository, which must use its own library.
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from sdxl_lora.runtime.library_settings import COMPUTE, MLFLOW_CLIENT, set_library_settings

# Before any stage imports torch, diffusers or MLflow.
set_library_settings(COMPUTE, MLFLOW_CLIENT)
