"""Stage evaluate_lora: held-out loss and CLIP scores, base model against adapter."""

from tqdm import tqdm

from sdxl_lora import paths
from sdxl_lora.config import load_params
from sdxl_lora.dataset import EncodedDataset
from sdxl_lora.denoising import load_denoiser
from sdxl_lora.evaluation import (
    ImageTextScorer,
    held_out_errors,
    held_out_jobs,
    held_out_loss,
    loss_by_timestep,
    score_samples,
)
from sdxl_lora.execution import run, stage
from sdxl_lora.hardware import require_precision, reserved_device
from sdxl_lora.lora import WEIGHTS, load_lora
from sdxl_lora.reports import write_numbers, write_table
from sdxl_lora.samples import load_table


def main() -> None:
    params = load_params()
    config = params.evaluation
    with stage("evaluate_lora"), reserved_device(None) as device:
        require_precision(device, config.precision, "evaluation.precision")
        dataset = EncodedDataset(paths.ENCODED, "held_out")
        denoiser = load_denoiser(params.model, config.precision, device)
        load_lora(paths.LORA, denoiser.unet, denoiser.text_encoders)
        errors = []
        with tqdm(total=len(held_out_jobs(dataset, config)), desc="held-out loss", unit="draw") as progress:
            for batch in held_out_errors(denoiser, dataset, config):
                errors += batch
                progress.update(len(batch))
        scorer = ImageTextScorer(config, device)
        metrics = {
            "held_out_loss": held_out_loss(errors),
            **score_samples(load_table(paths.SAMPLE_TABLE), paths.SAMPLES, scorer, config.style),
            "adapter_bytes": (paths.LORA / WEIGHTS).stat().st_size,
        }
        write_numbers(paths.METRICS, metrics)
        write_table(paths.LOSS_BY_TIMESTEP, loss_by_timestep(errors), ["timestep", "base", "adapter"])


if __name__ == "__main__":
    run(main)
