"""Stage track_run: all results -> one MLflow run, and a file with its id."""

from sdxl_lora import paths
from sdxl_lora.config import load_params
from sdxl_lora.runtime.stage import record_stage, run_stage
from sdxl_lora.storage.report_io import write_numbers
from sdxl_lora.tracking.pipeline_run import track_run


def main() -> None:
    params = load_params()
    with record_stage("track_run"):
        write_numbers(paths.MLFLOW_POINTER, track_run(params))


if __name__ == "__main__":
    run_stage(main)
