"""Stage report_run: samples, figures and lineage -> one page that shows the run, without a network."""

import pandas as pd

from sdxl_lora import paths
from sdxl_lora.config import load_params
from sdxl_lora.execution import run, stage
from sdxl_lora.files import write_text
from sdxl_lora.lineage import facts_of
from sdxl_lora.reporting import Results, page
from sdxl_lora.reports import read_numbers
from sdxl_lora.samples import load_table


def main() -> None:
    params = load_params()
    with stage("report_run"):
        results = Results(
            samples=load_table(paths.SAMPLE_TABLE),
            metrics=read_numbers(paths.METRICS, "evaluate_lora"),
            training=read_numbers(paths.TRAINING_REPORT, "train_lora"),
            gates=pd.read_csv(paths.GATES),
            copies=pd.read_csv(paths.COPIES),
            loss=pd.read_csv(paths.LOSS_CURVE),
            loss_by_timestep=pd.read_csv(paths.LOSS_BY_TIMESTEP),
            facts=facts_of(paths.EXPORTED_WEIGHTS),
        )
        write_text(paths.REPORT, page(params.export.title, results, paths.SAMPLES, paths.RAW_IMAGES))


if __name__ == "__main__":
    run(main)
