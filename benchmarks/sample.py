"""Time, memory and fidelity of sampling: `python -m benchmarks.sample --help`.

Compares the library (`ours`) with diffusers' pipeline, with the adapter as loaded by `load_lora_weights`
(`diffusers`) or merged into the base model as by `fuse_lora` (`diffusers_folded`). The model has SDXL's real
shapes with random weights, or is the embedded demo model. With the demo model, `psnr_db` compares the images
with those of diffusers in fp32. Options with several values span a grid; each combination prints a JSON line.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL.Image import Image

from benchmarks.device_memory import allocator_peaks
from benchmarks.grid import combinations, repeat
from benchmarks.random_sdxl import random_pipeline
from benchmarks.results import GIB, OK, Configuration, Result, now, publish, this_machine
from benchmarks.tables import WAYS
from benchmarks.timing import wait_for
from sdxl_lora.adapters.lora import adapter_strength, add_adapters, lora_parameters, named_parts
from sdxl_lora.config import Params, Precision, SamplingConfig, load_params
from sdxl_lora.inference.pipeline import generate_images, prepare_pipeline, use_cuda_graph
from sdxl_lora.inference.sampling import adapted_modules, initial_noise
from sdxl_lora.memory.inference_forecast import forecast_inference, trace_sampling
from sdxl_lora.models import architecture
from sdxl_lora.models.loading import DTYPES
from sdxl_lora.models.sdxl import load_pipeline
from sdxl_lora.runtime.device import acquire_device
from sdxl_lora.runtime.rng import keyed_generator

VARIED = ("model", "way", "precision", "strength", "batch_size", "resolution", "num_inference_steps")
RECIPES = {
    "random_sdxl": Path("recipes/sdxl-naruto-16gb.yaml"),
    "demo": Path("recipes/demo.yaml"),
}
REPETITIONS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=list(RECIPES), default=["random_sdxl"])
    parser.add_argument("--way", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=["fp16"])
    parser.add_argument(
        "--strength", nargs="+", type=float, default=[0.0, 1.0], help="strength of the adapter"
    )
    parser.add_argument("--batch-size", nargs="+", type=int, default=[2], help="images per batch")
    parser.add_argument("--resolution", nargs="+", type=int, default=[1024], help="side length in pixels")
    parser.add_argument("--num-inference-steps", nargs="+", type=int, default=[30])
    parser.add_argument(
        "--repetitions", type=int, default=REPETITIONS, help="timed batches after the first one"
    )
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file as well")
    options = parser.parse_args()
    for configuration in combinations(options, VARIED, fixed=()):
        publish(measure(configuration, options.repetitions), options.output)


def measure(configuration: Configuration, repetitions: int) -> Result:
    """Generate the same batch repeatedly; the first, which includes one-time work, is timed separately."""
    params = load_params(RECIPES[configuration["model"]])
    config = sampling(params, configuration)
    outcome, seconds, figures = OK, list[float](), dict[str, float]()
    with acquire_device(None) as device:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # left by the previous configuration
        try:
            images, seconds = timed_batches(configuration, params, config, device, 1 + repetitions)
            figures["first_batch_seconds"] = seconds.pop(0)
        except torch.OutOfMemoryError:
            outcome = "out of memory"
        peaks = allocator_peaks(device)
        if outcome == OK and configuration["model"] == "demo":
            exact = {**configuration, "way": "diffusers", "precision": "fp32"}
            expected, _ = timed_batches(exact, params, sampling(params, exact), device, 1)
            figures["psnr_db"] = psnr(images, expected)
    return Result(
        benchmark="sample",
        date=now(),
        command=repeat("sample", configuration, repetitions=repetitions),
        machine=this_machine(),
        configuration=configuration,
        outcome=outcome,
        seconds=seconds,
        **peaks,
        forecast_gib=forecast(configuration, params, config) if configuration["way"] == "ours" else None,
        figures=figures,
    )


def forecast(configuration: Configuration, params: Params, config: SamplingConfig) -> float:
    """Forecast the peak memory of a batch, GiB."""
    base = replace(architecture.SDXL_BASE, vae=architecture.KNOWN_VAES["madebyollin/sdxl-vae-fp16-fix"])
    if configuration["model"] == "demo":
        base = architecture.read_architecture(params.model)
    trace = trace_sampling(base, params.model_copy(update={"sampling": config}))
    return forecast_inference(trace).total / GIB


def sampling(params: Params, configuration: Configuration) -> SamplingConfig:
    """Return the recipe's sampling section with the configuration's values."""
    names = configuration.keys() & SamplingConfig.model_fields.keys()
    return params.sampling.model_copy(update={name: configuration[name] for name in names})


def timed_batches(
    configuration: Configuration, params: Params, config: SamplingConfig, device: torch.device, count: int
) -> tuple[list[Image], list[float]]:
    """Generate one batch `count` times; return its images and the seconds of each time."""
    pipeline = adapted_pipeline(configuration["model"], params, config.precision, device)
    numbers = [number % len(config.prompts) for number in range(config.batch_size)]
    noise = torch.stack([initial_noise(pipeline, config, number, seed=0) for number in numbers])
    prompts = [config.prompts[number] for number in numbers]
    images, seconds = [], []
    with set_up_sampling(pipeline, configuration["way"], config, configuration["strength"]):
        for _ in range(count):
            wait_for(device)
            start = perf_counter()
            images = generate_images(pipeline, config, prompts, noise)
            wait_for(device)
            seconds.append(round(perf_counter() - start, 6))
    return images, seconds


@contextmanager
def set_up_sampling(
    pipeline: StableDiffusionXLPipeline, way: str, config: SamplingConfig, value: float
) -> Iterator[None]:
    """Prepare the pipeline to sample with the adapter at this strength while the block runs."""
    modules = adapted_modules(pipeline)
    if way == "ours":
        prepare_pipeline(pipeline, config)
    with adapter_strength(modules, value):
        if way == "diffusers_folded" and value:
            for layer in (layer for module in modules for layer in module.modules()):
                if isinstance(layer, BaseTunerLayer):
                    layer.merge()
        with use_cuda_graph(pipeline.unet) if way == "ours" else nullcontext():
            yield


def adapted_pipeline(
    model: str, params: Params, precision: Precision, device: torch.device
) -> StableDiffusionXLPipeline:
    """Return the pipeline with an untrained adapter whose B is random."""
    pipeline = (
        random_pipeline(precision, device)
        if model == "random_sdxl"
        else load_pipeline(params.model, precision, device)
    )
    text_encoders = None
    if params.model.text_encoders != "frozen":
        text_encoders = pipeline.text_encoder, pipeline.text_encoder_2
    add_adapters(named_parts(pipeline.unet, text_encoders), params.lora, seed=0)
    for module in adapted_modules(pipeline):
        for number, parameter in enumerate(lora_parameters(module)):
            if not parameter.any():
                values = torch.randn(parameter.shape, generator=keyed_generator("b", number)) * 0.02
                parameter.data = values.to(device)
            parameter.data = parameter.data.to(DTYPES[precision])
        module.eval().requires_grad_(False)
    return pipeline


def psnr(images: list[Image], expected: list[Image]) -> float:
    """Return the peak signal-to-noise ratio over all pixels, dB; 100 for equal images."""
    pairs = zip(images, expected, strict=True)
    errors = [np.square(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in pairs]
    return float(10 * np.log10(255**2 / max(np.mean(errors), 255**2 * 1e-10)))


if __name__ == "__main__":
    main()
