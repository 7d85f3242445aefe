"""Stage evaluate_lora: adapter and samples -> metrics, base model against adapter, and gates."""

from tqdm import tqdm

from sdxl_lora import paths
from sdxl_lora.adapters.lora import load_lora
from sdxl_lora.adapters.lora_file import WEIGHTS_FILE
from sdxl_lora.config import load_params
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.evaluation.clip import ImageTextScorer
from sdxl_lora.evaluation.gates import Gate, evaluate_gates, gate_verdict
from sdxl_lora.evaluation.held_out_loss import (
    LOSS_COLUMNS,
    held_out_errors,
    held_out_loss,
    held_out_measurements,
    loss_by_timestep,
)
from sdxl_lora.evaluation.memorization import Match
from sdxl_lora.evaluation.sample_evaluation import ImageSets, evaluate_samples
from sdxl_lora.evaluation.sample_metrics import INTERVAL_COLUMNS
from sdxl_lora.inference.samples import load_table
from sdxl_lora.runtime.device import acquire_device, require_precision
from sdxl_lora.runtime.stage import record_stage, run_stage
from sdxl_lora.storage.report_io import write_numbers, write_records, write_table
from sdxl_lora.training.denoiser import load_denoiser


def main() -> None:
    params = load_params()
    config = params.evaluation
    with record_stage("evaluate_lora"), acquire_device(None) as device:
        require_precision(device, config.precision, "evaluation.precision")
        held_out, training = (EncodedDataset(paths.ENCODED, split) for split in ("held_out", "train"))
        denoiser = load_denoiser(params.model, config.precision, device)
        load_lora(paths.LORA, denoiser.parts)
        errors = []
        total = len(held_out_measurements(held_out, config))
        with tqdm(total=total, desc="held-out loss", unit="error") as progress:
            for batch in held_out_errors(denoiser, held_out, config):
                errors += batch
                progress.update(len(batch))
        scorer = ImageTextScorer(config, device)
        images = ImageSets(paths.SAMPLES, paths.RAW_IMAGES, held_out.images, training.images)
        samples = evaluate_samples(load_table(paths.SAMPLE_TABLE), images, scorer, config)
        size = (paths.LORA / WEIGHTS_FILE).stat().st_size
        metrics = {"held_out_loss": held_out_loss(errors, config), **samples.figures, "adapter_bytes": size}
        gates = evaluate_gates(metrics, config.gates)
        write_numbers(paths.METRICS, {**metrics, "gates": gate_verdict(gates)})
        write_records(paths.GATES, Gate, gates)
        write_records(paths.COPIES, Match, samples.matches)
        write_table(paths.INTERVALS, samples.intervals, INTERVAL_COLUMNS)
        write_table(paths.LOSS_BY_TIMESTEP, loss_by_timestep(errors, config), LOSS_COLUMNS)


if __name__ == "__main__":
    run_stage(main)
