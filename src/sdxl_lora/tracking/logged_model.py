"""The adapter as an MLflow LoggedModel that `mlflow.diffusers.load_model` reads, written without a network.

Not by `mlflow.diffusers.log_model`, which asks the Hub for the newest commit of the base model and pins that,
while an adapter belongs to the commit that it was trained on. Otherwise the folder is the same.
"""

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient, pyfunc
from mlflow.entities import LoggedModelOutput
from mlflow.models import Model, ModelSignature
from mlflow.types import DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import ColSpec

from sdxl_lora.config import ModelConfig, Params, SamplingConfig
from sdxl_lora.storage.atomic_io import write_text
from sdxl_lora.storage.repository import is_local_folder, public_name

_MODEL_NAME = "adapter"
_WEIGHTS_FOLDER = "adapter_weights"
_STANDARD_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
_REQUIREMENTS = ("accelerate", "diffusers", "peft", "safetensors", "torch", "transformers")
"""Packages that whoever loads the adapter must install. Not `NUMERICAL_LIBRARIES`, which also has those that
only data and training use."""


def log_adapter(
    client: MlflowClient, run_id: str, params: Params, weights: Path, facts: Mapping[str, str]
) -> str:
    """Log the adapter as a model of the run, ready to be loaded; return its id.

    Args:
        weights: the adapter's file in diffusers' format.
        facts: the adapter's lineage, for the model's metadata.

    Raises:
        MlflowException, OSError: the server cannot be reached or refuses.
    """
    settings = {"base_model": public_name(params.model.base), **_lora_settings(params)}
    experiment_id = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(
        experiment_id, _MODEL_NAME, run_id, params=settings, model_type="lora"
    )
    model = Model(run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id, metadata=dict(facts))
    with TemporaryDirectory() as folder:
        write_model(Path(folder), model, params.model, params.sampling, weights)
        client.log_model_artifacts(logged.model_id, folder)
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=params.training.steps)])
    model_id: str = logged.model_id
    return model_id


def _lora_settings(params: Params) -> dict[str, str]:
    """Return the section `lora` as the model's params."""
    return {f"lora.{name}": str(value) for name, value in params.lora.model_dump().items()}


def write_model(
    folder: Path, model: Model, config: ModelConfig, sampling: SamplingConfig, weights: Path
) -> None:
    """Write `model` with its weights into `folder`, in the layout of MLflow's flavor `diffusers`."""
    (folder / _WEIGHTS_FOLDER).mkdir()
    shutil.copy(weights, folder / _WEIGHTS_FOLDER / _STANDARD_FILE)
    revision = {} if is_local_folder(config.base) else {"base_model_revision": config.revision}
    model.add_flavor(
        "diffusers",
        base_model=public_name(config.base),
        adapter_type="lora",
        adapter_weights=_WEIGHTS_FOLDER,
        diffusers_version=version("diffusers"),
        **revision,
    )
    pyfunc.add_to_model(model, loader_module="mlflow.diffusers")
    model.signature = _signature(sampling)
    model.save(str(folder / "MLmodel"))
    # Without the local tag of a build, such as +cpu: no index offers that version.
    pins = (f"{name}=={version(name).partition('+')[0]}\n" for name in _REQUIREMENTS)
    write_text(folder / "requirements.txt", "".join(pins))


def _signature(config: SamplingConfig) -> ModelSignature:
    """Return the signature: a prompt in, an image out, with the settings of the samples as defaults."""
    defaults: dict[str, tuple[DataType, object]] = {
        "num_inference_steps": (DataType.integer, config.num_inference_steps),
        "guidance_scale": (DataType.double, config.guidance_scale),
        "height": (DataType.integer, config.resolution),
        "width": (DataType.integer, config.resolution),
        "negative_prompt": (DataType.string, config.negative_prompt or ""),
    }
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.binary, "image")]),
        params=ParamSchema([ParamSpec(name, dtype, default) for name, (dtype, default) in defaults.items()]),
    )
