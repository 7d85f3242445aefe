"""Promotion of the current adapter in MLflow's model registry.

A promoted adapter is a version of the registered model, and the alias `champion` points to it. An adapter
that fails a gate is never registered.
"""

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from sdxl_lora import paths
from sdxl_lora.adapters.lineage import training_digest
from sdxl_lora.evaluation.gates import read_gate_failures
from sdxl_lora.storage.report_io import read_numbers
from sdxl_lora.tracking.connection import EXPERIMENT, connect, explain_tracking_errors

ALIAS = "champion"


def promote() -> ModelVersion:
    """Register the current adapter and point the alias at it; a registered adapter keeps its version.

    Raises:
        FileNotFoundError: a stage has not run.
        ValueError: the adapter fails its gates, or no MLflow run has it.
        ConnectionError: the server cannot be reached or refuses.
    """
    if failed := read_gate_failures(paths.GATES):
        reasons = "\n  ".join(failed.values())
        raise ValueError(f"the adapter fails its gates; nothing was registered:\n  {reasons}")
    pointer = read_numbers(paths.MLFLOW_POINTER, "track_run")["mlflow"]
    run_id = pointer["id"] if isinstance(pointer, dict) else None
    if run_id is None:
        raise ValueError("no MLflow run has this adapter: `dvc repro -sf track_run` logs it")
    with explain_tracking_errors():
        return _register(run_id)


def _register(run_id: str) -> ModelVersion:
    """Point the alias at the registered version of a run's adapter.

    Raises:
        ValueError: the run has another adapter than dvc.lock.
        MlflowException, OSError: the server cannot be reached or refuses.
    """
    client = connect().client
    if client.get_run(run_id).data.tags.get("dvc.train_lora") != training_digest(paths.LOCK):
        raise ValueError(
            "the MLflow run has another adapter than dvc.lock: `dvc repro` logs that of dvc.lock"
        )
    try:
        client.create_registered_model(EXPERIMENT)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = _version_of(client, run_id)
    client.set_registered_model_alias(EXPERIMENT, ALIAS, version.version)
    return version


def _version_of(client: MlflowClient, run_id: str) -> ModelVersion:
    """Return the registered version of a run's adapter, created if needed."""
    for version in client.search_model_versions(f"name = '{EXPERIMENT}'"):
        if version.run_id == run_id:
            return version
    run = client.get_run(run_id)
    model_id = run.outputs.model_outputs[0].model_id
    tags = {key: value for key, value in run.data.tags.items() if key.startswith("dvc.")}
    source = client.get_logged_model(model_id).artifact_location
    return client.create_model_version(
        EXPERIMENT, source, run_id, tags={**tags, "gates": "passed"}, model_id=model_id
    )
