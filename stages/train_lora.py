"""Stage train_lora: encoded data set -> LoRA weights, loss curve, previews."""

from collections import deque
from collections.abc import Iterator

from tqdm import tqdm

from sdxl_lora import paths
from sdxl_lora.config import TrainingConfig, load_params
from sdxl_lora.dataset import EncodedDataset
from sdxl_lora.denoising import load_denoiser
from sdxl_lora.environment import environment
from sdxl_lora.execution import run, stage
from sdxl_lora.hardware import deterministic, require_precision, reserved_device
from sdxl_lora.lora import add_adapters, save_lora
from sdxl_lora.planning import choose_plan
from sdxl_lora.previews import Previewer
from sdxl_lora.processes import processes
from sdxl_lora.reports import write_numbers
from sdxl_lora.tracking import LiveRun, live_run
from sdxl_lora.training import Report, loss_curve, mean_report, prepare, summarise, train_lora


def main() -> None:
    params = load_params()
    with (
        stage("train_lora"),
        reserved_device(params.training.vram_gib) as device,
        deterministic(params.training.deterministic),
    ):
        require_precision(device, params.training.precision, "training.precision")
        dataset = EncodedDataset(paths.ENCODED, "train")
        latents = dataset[0].latents_mean.shape
        plan = choose_plan(params.model, params.lora, params.training, latents, device)
        config = plan.applied_to(params.training)
        denoiser = load_denoiser(params.model, config.precision, device, config.quantization)
        add_adapters(denoiser.unet, denoiser.text_encoders, params.lora, params.seed)
        attention = prepare(denoiser, config, latents, plan.checkpointed)
        steps = train_lora(denoiser, dataset, config, params.seed)
        if not processes().is_main_process:
            deque(steps, maxlen=0)  # helps, and leaves files and curves to the first process
            return
        paths.PREVIEWS.mkdir(parents=True, exist_ok=True)  # an output, also without previews
        held_out = EncodedDataset(paths.ENCODED, "held_out")
        previewer = Previewer(denoiser, held_out, params.model) if config.preview_every else None
        with live_run(params) as live:
            reports = list(follow(steps, config, live, previewer))
        save_lora(paths.LORA, denoiser.unet, denoiser.text_encoders)
        loss_curve(reports, config.log_every).to_csv(paths.LOSS_CURVE, index=False)
        summary = {**summarise(reports, denoiser, config), "attention": attention, **plan.numbers()}
        write_numbers(paths.TRAINING_REPORT, summary)
        choices = {"attention": attention, "deterministic": config.deterministic}
        write_numbers(paths.TRAINING_ENVIRONMENT, environment(device, **choices))


def follow(
    steps: Iterator[Report], config: TrainingConfig, live: LiveRun, previewer: Previewer | None
) -> Iterator[Report]:
    """Passes the reports on and shows them: progress, curves, pictures."""
    window: deque[Report] = deque(maxlen=config.log_every)
    for report in tqdm(steps, total=config.steps, desc="train_lora", unit="step"):
        window.append(report)
        if report.step % config.log_every == 0:
            live.log(**mean_report(window))
        if previewer and config.preview_every and report.step % config.preview_every == 0:
            image = previewer.save(paths.PREVIEWS / f"step-{report.step:06d}.png")
            live.image("preview", image, report.step)
        yield report


if __name__ == "__main__":
    run(main)
