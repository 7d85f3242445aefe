"""Stage report_run: samples, figures and lineage -> one self-contained HTML page about the run."""

import pandas as pd

from sdxl_lora import paths
from sdxl_lora.adapters.lineage import read_lineage
from sdxl_lora.config import load_params
from sdxl_lora.inference.samples import load_table
from sdxl_lora.reporting.run_page import Results, render_run_page
from sdxl_lora.runtime.stage import record_stage, run_stage
from sdxl_lora.storage.atomic_io import write_text
from sdxl_lora.storage.report_io import read_numbers


def main() -> None:
    params = load_params()
    with record_stage("report_run"):
        results = Results(
            samples=load_table(paths.SAMPLE_TABLE),
            metrics=read_numbers(paths.METRICS, "evaluate_lora"),
            training=read_numbers(paths.TRAINING_REPORT, "train_lora"),
            gates=pd.read_csv(paths.GATES),
            copies=pd.read_csv(paths.COPIES),
            loss=pd.read_csv(paths.LOSS_CURVE),
            loss_by_timestep=pd.read_csv(paths.LOSS_BY_TIMESTEP),
            facts=read_lineage(paths.EXPORTED_WEIGHTS),
        )
        write_text(
            paths.REPORT, render_run_page(params.export.title, results, paths.SAMPLES, paths.RAW_IMAGES)
        )


if __name__ == "__main__":
    run_stage(main)
