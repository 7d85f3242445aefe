"""Stage train_lora: encoded data set -> LoRA weights, loss curve, previews."""

from functools import partial

from sdxl_lora import paths
from sdxl_lora.adapters.lora import add_adapters, save_lora
from sdxl_lora.config import load_params
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.memory.planner import choose_plan
from sdxl_lora.runtime.device import acquire_device, deterministic_kernels, require_precision
from sdxl_lora.runtime.distributed import distributed_state
from sdxl_lora.runtime.dvc_execution import project_root
from sdxl_lora.runtime.environment import describe_environment
from sdxl_lora.runtime.stage import Deadline, record_stage, run_stage
from sdxl_lora.storage.atomic_io import require_writable, write_text
from sdxl_lora.storage.report_io import write_numbers
from sdxl_lora.tracking.live_run import live_run
from sdxl_lora.training.auto_choices import recorded_choices, with_recorded_choices
from sdxl_lora.training.checkpointer import Checkpointer, training_key
from sdxl_lora.training.denoiser import load_denoiser
from sdxl_lora.training.loop import TrainingLoop
from sdxl_lora.training.nonfinite_dump import dump_nonfinite_steps
from sdxl_lora.training.previews import Previewer
from sdxl_lora.training.trainer import Trainer, loss_curve, prepare_modules, summarise


def main() -> None:
    params = load_params()
    deadline, root = Deadline(params.training.deadline_minutes), project_root()
    with (
        record_stage("train_lora"),
        acquire_device(params.training.vram_gib) as device,
        deterministic_kernels(params.training.deterministic),
    ):
        require_precision(device, params.training.precision, "training.precision")
        dataset = EncodedDataset(paths.ENCODED, "train")
        latents = dataset.largest_latents
        recorded = recorded_choices(root)
        plan_for = partial(choose_plan, params.model, params.lora, latents=latents, device=device)
        plan = with_recorded_choices(plan_for, params.training, recorded.plan)
        config = plan.applied_to(params.training)
        key = training_key(params.seed, params.lora, params.model, config, paths.ENCODED_INDEX, device)
        checkpoints = Checkpointer(root / paths.CHECKPOINTS / key, config.checkpoint_minutes)
        checkpoint = checkpoints.newest()
        if checkpoint is not None:
            config = config.model_copy(update=checkpoint.facts)
        denoiser = load_denoiser(params.model, config.precision, device, config.quantization)
        add_adapters(denoiser.unet, denoiser.text_encoders, params.lora, params.seed)
        prepare_for = partial(prepare_modules, denoiser, latents=latents, checkpointed=plan.checkpointed)
        choices = {"attention": with_recorded_choices(prepare_for, config, recorded.attention)}
        training = Trainer(denoiser, dataset, config, params.seed)
        if checkpoint is not None:
            training.load_state_dict(checkpoint.tensors)
        session = TrainingLoop(training, config, checkpoints, choices, deadline)
        with dump_nonfinite_steps(root, dataset.examples):
            if not distributed_state().is_main_process:
                session.run_worker_rank()
                return
            for folder in (paths.LORA, paths.PREVIEWS):  # outputs, the latter also without previews
                require_writable(folder)
            held_out = EncodedDataset(paths.ENCODED, "held_out")
            previewer = Previewer(denoiser, held_out, params.model) if config.preview_every else None
            with live_run(params) as live:
                session.run_main_rank(live, previewer)
        save_lora(paths.LORA, denoiser.unet, denoiser.text_encoders)
        write_text(paths.LOSS_CURVE, loss_curve(training.history, config.log_every).to_csv(index=False))
        summary = {**summarise(training.history, denoiser, config), **choices, **plan.numbers()}
        write_numbers(paths.TRAINING_REPORT, summary)
        facts = describe_environment(device, deterministic=config.deterministic, **choices)
        write_numbers(paths.TRAINING_ENVIRONMENT, facts)
        checkpoints.delete()


if __name__ == "__main__":
    run_stage(main)
