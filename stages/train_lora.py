"""Stage train_lora: encoded data set -> LoRA weights, loss curve, previews."""

from tqdm import tqdm

from sdxl_lora import paths
from sdxl_lora.config import load_params
from sdxl_lora.dataset import EncodedDataset
from sdxl_lora.denoising import load_denoiser
from sdxl_lora.execution import run, stage
from sdxl_lora.hardware import require_precision, reserved_device
from sdxl_lora.lora import add_adapters, save_lora
from sdxl_lora.previews import Previewer
from sdxl_lora.reports import write_numbers
from sdxl_lora.tracking import live_run
from sdxl_lora.training import Report, loss_curve, mean_report, prepare, summarise, train_lora


def main() -> None:
    params = load_params()
    config = params.training
    with stage("train_lora"), reserved_device(config.vram_gib) as device, live_run(params) as live:
        require_precision(device, config.precision, "training.precision")
        dataset = EncodedDataset(paths.ENCODED, "train")
        denoiser = load_denoiser(params.model, config.precision, device, config.quantization)
        add_adapters(denoiser.unet, denoiser.text_encoders, params.lora, params.seed)
        attention = prepare(denoiser, config, dataset[0].latents_mean.shape)
        paths.PREVIEWS.mkdir(parents=True, exist_ok=True)  # an output, also without previews
        held_out = EncodedDataset(paths.ENCODED, "held_out")
        previewer = Previewer(denoiser, held_out, params.model) if config.preview_every else None
        reports: list[Report] = []
        steps = train_lora(denoiser, dataset, config, params.seed)
        for report in tqdm(steps, total=config.steps, desc="train_lora", unit="step"):
            reports.append(report)
            if report.step % config.log_every == 0:
                live.log(**mean_report(reports[-config.log_every :]))
            if previewer and config.preview_every and report.step % config.preview_every == 0:
                image = previewer.save(paths.PREVIEWS / f"step-{report.step:06d}.png")
                live.image("preview", image, report.step)
        save_lora(paths.LORA, denoiser.unet, denoiser.text_encoders)
        loss_curve(reports, config.log_every).to_csv(paths.LOSS_CURVE, index=False)
        write_numbers(paths.TRAINING_REPORT, {**summarise(reports, denoiser, config), "attention": attention})


if __name__ == "__main__":
    run(main)
