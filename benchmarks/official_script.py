"""Step time and peak memory of diffusers' SDXL LoRA script, measured from outside.

    python -m benchmarks.official_script --checkout PATH [--precision fp16 bf16] [--checkpointing all none]

PATH is a checkout of diffusers, or its examples/text_to_image/train_text_to_image_lora_sdxl.py. The script
runs unmodified, in a separate process for every combination of the options, on SDXL with random weights and
on random images, both saved once. A step lasts from one advance of its progress bar to the next. Memory is
reported by the driver (NVML) and by PyTorch's allocator. The script is interrupted after the last timed
step, so saving its adapter and loading a pipeline at the end are not measured. Prints a JSON line for each
combination.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.grid import combinations, gib_or_none, repeat
from benchmarks.results import Configuration, Result, now, publish, this_machine
from benchmarks.saved_sdxl import save_random_images, save_random_sdxl
from benchmarks.watch import watch
from sdxl_lora.runtime.device import acquire_device

SCRIPT = Path("examples/text_to_image/train_text_to_image_lora_sdxl.py")
VARIED = ("precision", "checkpointing", "attention", "optimizer", "text_encoders", "vram_gib")
FIXED = ("batch_size", "rank", "resolution", "workers")
IMAGES = 24
SLACK = 5  # more steps than are timed, so that the script is interrupted before it saves


def main() -> None:
    options = parse()
    script = find_script(options.checkout)
    with tempfile.TemporaryDirectory() as temporary, acquire_device(None) as device:
        scratch = (options.scratch or Path(temporary)).absolute()
        scratch.mkdir(parents=True, exist_ok=True)
        model = (options.model or save_random_sdxl(scratch / "random-sdxl", device)).absolute()
        images = save_random_images(
            scratch / f"images-{options.resolution}", IMAGES, [(options.resolution, options.resolution)]
        )
        for configuration in combinations(options, VARIED, FIXED):
            arguments = script_arguments(configuration, model, images, scratch / "output")
            arguments.append(f"--max_train_steps={options.warmup + options.steps + SLACK}")
            vram_gib = configuration["vram_gib"]
            observed = watch(script, arguments, vram_gib, options.warmup, options.steps, scratch)
            result = Result(
                benchmark="official_script",
                date=now(),
                command=repeat("official_script", configuration, checkout="diffusers", steps=options.steps),
                machine=this_machine(),
                configuration=configuration,
                **vars(observed),
            )
            publish(result, options.output)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = parser.add_argument_group("options that take several values; every combination runs")
    several.add_argument("--precision", nargs="+", choices=["fp16", "bf16", "fp32"], default=["fp16"])
    several.add_argument("--checkpointing", nargs="+", choices=["all", "none"], default=["all"])
    several.add_argument("--attention", nargs="+", choices=["sdpa", "xformers"], default=["sdpa"])
    several.add_argument("--optimizer", nargs="+", choices=["adamw_8bit", "adamw"], default=["adamw_8bit"])
    several.add_argument("--text-encoders", nargs="+", choices=["trained", "frozen"], default=["trained"])
    several.add_argument(
        "--vram-gib", nargs="+", type=gib_or_none, default=[None], help="memory limit in GiB, or none"
    )
    parser.add_argument(
        "--checkout", type=Path, required=True, help="folder of diffusers, or the script itself"
    )
    parser.add_argument("--batch-size", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=1024, help="side length in pixels")
    parser.add_argument(
        "--workers", type=int, default=4, help="processes that load images; the script's default is 0"
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them, at least 1")
    parser.add_argument(
        "--model", type=Path, help="folder of a pipeline to use instead of SDXL with random weights"
    )
    parser.add_argument("--scratch", type=Path, help="keep model, images and log in this folder (7 GB)")
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file as well")
    return parser.parse_args()


def find_script(checkout: Path) -> Path:
    """Return the script's path, given a checkout of diffusers or the script itself."""
    script = checkout if checkout.is_file() else checkout / SCRIPT
    if not script.is_file():
        raise FileNotFoundError(
            f"{script} does not exist: set --checkout to a checkout of diffusers or to the script"
        )
    return script.absolute()


def script_arguments(configuration: Configuration, model: Path, images: Path, output: Path) -> list[str]:
    """Return the script's arguments for a configuration, except the number of steps."""
    precision = configuration["precision"]
    switches = {
        "--gradient_checkpointing": configuration["checkpointing"] == "all",
        "--use_8bit_adam": configuration["optimizer"] == "adamw_8bit",
        "--train_text_encoder": configuration["text_encoders"] == "trained",
        "--enable_xformers_memory_efficient_attention": configuration["attention"] == "xformers",
    }
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--train_data_dir={images}",
        "--caption_column=text",
        f"--output_dir={output}",
        f"--mixed_precision={'no' if precision == 'fp32' else precision}",
        f"--resolution={configuration['resolution']}",
        f"--train_batch_size={configuration['batch_size']}",
        f"--rank={configuration['rank']}",
        f"--dataloader_num_workers={configuration['workers']}",
        "--learning_rate=1e-4",
        "--lr_scheduler=constant",
        "--checkpointing_steps=1000000",
        "--seed=0",
        *(switch for switch, wanted in switches.items() if wanted),
    ]


if __name__ == "__main__":
    main()
