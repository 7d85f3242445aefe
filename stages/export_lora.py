"""Stage export_lora: adapter, samples and figures -> a folder that others can use, as the Hub wants it."""

import shutil

from sdxl_lora import paths
from sdxl_lora.adapters.export import export_lora, kohya_file, model_spec
from sdxl_lora.adapters.lineage import lineage
from sdxl_lora.adapters.lora_file import WEIGHTS_FILE
from sdxl_lora.config import load_params
from sdxl_lora.evaluation.gates import failures
from sdxl_lora.inference.samples import load_table
from sdxl_lora.models.base_config import layers_per_block, prediction_type
from sdxl_lora.models.weights import weight_digests
from sdxl_lora.reporting.model_card import card_pictures, model_card, picture_name
from sdxl_lora.runtime.stage import record_stage, run_stage
from sdxl_lora.storage.atomic_io import write_text
from sdxl_lora.storage.report_io import read_numbers, write_numbers

PICTURES = 6


def main() -> None:
    params = load_params()
    config = params.export
    with record_stage("export_lora"):
        trigger = params.captions.trigger
        weights = weight_digests(params.model)
        facts = lineage(params.model, weights, paths.RAW_SOURCE, paths.ENCODED_INDEX, paths.LOCK)
        spec = model_spec(config, trigger, params.encoding.resolution, prediction_type(params.model))
        export_lora(paths.LORA, paths.EXPORT, config, {**facts, **spec}, layers_per_block(params.model))
        write_numbers(paths.LINEAGE, facts)

        samples = card_pictures(load_table(paths.SAMPLE_TABLE), PICTURES)
        for sample in samples:
            target = paths.EXPORT / picture_name(sample)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(paths.SAMPLES / sample.file, target)
        shutil.copy(paths.SAMPLE_GRID, paths.EXPORT)
        details = {
            "grid": paths.SAMPLE_GRID.name,
            "weights": WEIGHTS_FILE,
            "kohya": kohya_file(config),
            "rank": params.lora.rank,
            "alpha": params.lora.alpha,
            "trigger": trigger,
        }
        card = model_card(
            config,
            params.model,
            [(picture_name(sample), sample) for sample in samples],
            details,
            read_numbers(paths.METRICS, "evaluate_lora"),
            list(failures(paths.GATES).values()),
            facts,
        )
        write_text(paths.CARD, card)


if __name__ == "__main__":
    run_stage(main)
