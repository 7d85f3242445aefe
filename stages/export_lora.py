"""Stage export_lora: adapter, samples and metrics -> a folder in the Hub's format."""

import shutil

from sdxl_lora import paths
from sdxl_lora.adapters.export import export_lora, kohya_file, model_spec
from sdxl_lora.adapters.lineage import lineage
from sdxl_lora.adapters.lora_file import WEIGHTS_FILE
from sdxl_lora.config import load_params
from sdxl_lora.evaluation.gates import read_gate_failures
from sdxl_lora.inference.samples import load_table
from sdxl_lora.models.base_config import layers_per_block, prediction_type
from sdxl_lora.models.weights import weight_digests
from sdxl_lora.reporting.model_card import CardAdapter, CardFiles, card_image, card_samples, model_card
from sdxl_lora.runtime.stage import record_stage, run_stage
from sdxl_lora.storage.atomic_io import write_text
from sdxl_lora.storage.report_io import read_numbers, write_numbers

CARD_IMAGES = 6


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

        samples = card_samples(load_table(paths.SAMPLE_TABLE), CARD_IMAGES)
        for sample in samples:
            target = paths.EXPORT / card_image(sample)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(paths.SAMPLES / sample.file, target)
        shutil.copy(paths.SAMPLE_GRID, paths.EXPORT)
        card = model_card(
            config,
            params.model,
            CardAdapter(params.lora.rank, params.lora.alpha, trigger, facts),
            CardFiles(paths.SAMPLE_GRID.name, WEIGHTS_FILE, kohya_file(config)),
            samples,
            read_numbers(paths.METRICS, "evaluate_lora"),
            list(read_gate_failures(paths.GATES).values()),
        )
        write_text(paths.CARD, card)


if __name__ == "__main__":
    run_stage(main)
