"""Stage train_lora: encoded data set -> LoRA weights, loss curve, previews."""

from functools import partial

from sdxl_lora import paths
from sdxl_lora.config import load_params
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.memory.planner import choose_plan
from sdxl_lora.runtime.device import acquire_device, deterministic_kernels, require_precision
from sdxl_lora.runtime.distributed import distributed_state
from sdxl_lora.runtime.dvc_execution import project_root
from sdxl_lora.runtime.stage import Deadline, record_stage, run_stage
from sdxl_lora.storage.atomic_io import require_writable
from sdxl_lora.tracking.live_run import live_run
from sdxl_lora.training.auto_choices import recorded_choices, with_recorded_choices
from sdxl_lora.training.loop import TrainingLoop
from sdxl_lora.training.nonfinite_dump import dump_nonfinite_steps
from sdxl_lora.training.previews import make_previewer
from sdxl_lora.training.run import start_or_resume


def main() -> None:
    params = load_params()
    model, lora, config = params.model, params.lora, params.training
    deadline, root = Deadline(config.deadline_minutes), project_root()
    with (
        record_stage("train_lora"),
        acquire_device(config.vram_gib) as device,
        deterministic_kernels(config.deterministic),
    ):
        require_precision(device, config.precision, "training.precision")
        dataset = EncodedDataset(paths.ENCODED, "train")
        choose = partial(choose_plan, model, lora, latents=dataset.largest_latents, device=device)
        plan = with_recorded_choices(choose, config, recorded_choices(root).plan)
        run = start_or_resume(
            model, lora, plan.applied_to(config), plan.checkpointed, dataset, device, params.seed, root
        )
        loop = TrainingLoop(run, deadline)
        with dump_nonfinite_steps(root, dataset.examples):
            if not distributed_state().is_main_process:
                loop.run_worker_rank()
                return
            for folder in (paths.LORA, paths.PREVIEWS):  # both are outputs, also without previews
                require_writable(folder)
            previewer = make_previewer(run.denoiser, model, config.preview_every)
            with live_run(params) as live:
                loop.run_main_rank(live, previewer)
        run.write_results(plan.numbers())


if __name__ == "__main__":
    run_stage(main)
