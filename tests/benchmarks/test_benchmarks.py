import argparse
import math
import os
import weakref
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import nn

from benchmarks import counts, forecast, random_sdxl, resume, saved_sdxl, train_step
from benchmarks.grid import combinations, gib_or_none, repeat
from benchmarks.isolation import map_isolated, run_isolated
from benchmarks.matmul import measure as measure_matmul
from benchmarks.results import Configuration, Result, publish, read_results
from benchmarks.sample import measure as measure_sample
from benchmarks.sample import psnr
from benchmarks.tables import WAYS
from benchmarks.timing import timed
from benchmarks.vae_encode import measure as measure_vae
from sdxl_lora.config import load_params
from sdxl_lora.kernels.quantized_linear import QuantizedLinear
from sdxl_lora.memory.planner import ForecastPlan, TrainingPlan
from sdxl_lora.memory.training_forecast import MemoryForecast
from sdxl_lora.models import architecture
from sdxl_lora.storage.atomic_io import GIB
from sdxl_lora.training.denoiser import load_denoiser
from tests.support.encoded import write_encoded_dataset

RECIPE = Path("recipes/sdxl-naruto-16gb.yaml")
CPU = torch.device("cpu")
SMALL: Configuration = {
    "precision": "fp32",
    "quantization": "int8",
    "checkpointing": "none",
    "attention": "sdpa",
    "deterministic": True,
    "optimizer": "adamw",
    "text_encoders": "frozen",
    "vram_gib": None,
    "batch_size": 2,
    "micro_batch_size": "auto",
    "rank": 4,
    "resolution": 64,
}


@pytest.fixture
def small_sdxl(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL's structure with few channels and layers, and a VAE as small."""
    base = architecture.SDXL_BASE
    unet = {
        "block_out_channels": [32, 64, 64],
        "transformer_layers_per_block": [1, 1, 1],
        "attention_head_dim": [2, 4, 4],
        "norm_num_groups": 8,
    }
    layers, channels = {"num_hidden_layers": 2}, {"block_out_channels": [32, 32, 32, 32]}
    small = architecture.SDXLArchitecture(
        unet={**base.unet, **unet},
        vae={**base.vae, **channels},
        text_encoder={**base.text_encoder, **layers},
        text_encoder_2={**base.text_encoder_2, **layers},
    )
    monkeypatch.setattr(architecture, "SDXL_BASE", small)


def test_combinations_span_a_grid() -> None:
    options = argparse.Namespace(precision=["fp16", "bf16"], vram_gib=[None, 14.75], rank=16)
    grid = list(combinations(options, ("precision", "vram_gib"), ("rank",)))
    assert [(c["precision"], c["vram_gib"]) for c in grid] == [
        ("fp16", None),
        ("fp16", 14.75),
        ("bf16", None),
        ("bf16", 14.75),
    ]
    assert {c["rank"] for c in grid} == {16}


@pytest.mark.parametrize("vram_gib", [14.75, None])
def test_a_results_command_repeats_its_configuration(
    monkeypatch: pytest.MonkeyPatch, vram_gib: float | None
) -> None:
    configuration = SMALL | {"vram_gib": vram_gib, "text_encoders": "trained"}
    words = repeat("train_step", configuration, steps=7).split()
    assert words[:3] == ["python", "-m", "benchmarks.train_step"]
    monkeypatch.setattr("sys.argv", words[2:])
    options = train_step.parse()
    assert options.steps == 7
    assert list(combinations(options, train_step.VARIED, ())) == [configuration]


def test_without_options_a_step_is_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train_step"])
    (configuration,) = combinations(train_step.parse(), train_step.VARIED, ())
    params = load_params(RECIPE)
    assert configuration == train_step.recipe_values(params)
    assert configuration["vram_gib"] == params.training.vram_gib
    assert train_step.with_configuration(params, configuration, 20).lora == params.lora


def test_every_option_of_a_step_reaches_the_params() -> None:
    params = load_params(RECIPE)
    after = train_step.recipe_values(train_step.with_configuration(params, SMALL, 20))
    assert after == SMALL | {"resolution": params.encoding.resolution}  # the random data set's, no param's


def test_text_encoders_that_freeze_later_are_timed_while_they_are_trained() -> None:
    params = load_params(RECIPE)
    freezing = params.model_copy(
        update={
            "model": params.model.model_copy(update={"text_encoders": "trained_then_frozen"}),
            "training": params.training.model_copy(update={"text_encoder_steps": 5}),
        }
    )
    configuration = train_step.recipe_values(freezing)
    assert configuration == train_step.recipe_values(params)
    assert train_step.with_configuration(freezing, configuration, 20) == train_step.with_configuration(
        params, configuration, 20
    )


@pytest.mark.parametrize("text", ["none", "14.75"])
def test_a_cap_is_a_size_or_none(text: str) -> None:
    assert gib_or_none(text) == (None if text == "none" else 14.75)


@pytest.mark.usefixtures("small_sdxl")
def test_a_step_is_measured_by_the_librarys_own_loop(tmp_path: Path) -> None:
    recipe = load_params(RECIPE)
    result = train_step.measure(SMALL, recipe, steps=2, plan=train_step.plan(SMALL, recipe, CPU))
    assert result.outcome == "ok"
    assert len(result.seconds) == 2
    assert result.peak_reserved_gib is None  # on a CPU nobody counts
    assert result.figures["final_loss"] > 0
    publish(result, tmp_path / "results" / "today.jsonl")
    assert read_results(tmp_path / "results" / "today.jsonl") == [result]


@pytest.mark.usefixtures("small_sdxl")
def test_a_configuration_that_cannot_run_says_why() -> None:
    recipe, configuration = load_params(RECIPE), SMALL | {"attention": "xformers"}
    plan = train_step.plan(configuration, recipe, CPU)
    result = train_step.measure(configuration, recipe, steps=1, plan=plan)
    assert result.outcome.startswith(("ValueError: ", "ImportError: ", "RuntimeError: "))
    assert "xformers" in result.outcome
    assert result.seconds_per_step is None


@pytest.mark.usefixtures("small_sdxl")
def test_a_configuration_that_fits_nowhere_says_why() -> None:
    recipe, configuration = load_params(RECIPE), SMALL | {"vram_gib": 0.01}
    plan = train_step.plan(configuration, recipe, CPU)
    assert isinstance(plan, str)
    assert plan.startswith("training.vram_gib is 0.01")


@pytest.mark.usefixtures("small_sdxl")
def test_a_forecast_is_measured_by_the_librarys_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"precision": "fp32", "resolution": 64, "batch_size": 1, "micro_batch_size": 1, "vram_gib": None}
    freezing = {"text_encoders": "trained_then_frozen", "text_encoder_steps": 2}
    monkeypatch.setitem(forecast.CONFIGURATIONS, "small", small | freezing)
    monkeypatch.setattr(forecast, "run_isolated", lambda function, *values: function(*values))
    recipe = load_params(RECIPE)
    plan = ForecastPlan(1, (), 0.0, MemoryForecast(*[GIB] * 7))
    result = forecast.compare("small", recipe, plan, measures=True)
    assert result.outcome == "ok"
    assert len(result.seconds) == forecast.STEPS
    assert result.forecast_gib == 7
    assert Result.model_validate_json(result.model_dump_json()) == result
    assert forecast.compare("small", recipe, plan, measures=False).seconds == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be measured")
def test_a_forecast_that_fails_has_its_reason_as_outcome() -> None:
    recipe, plan = load_params(RECIPE), TrainingPlan(1, (), 0.0)
    assert forecast.compare("bf16", recipe, "ValueError: no", measures=True).outcome == "ValueError: no"
    dead = forecast.compare("10.8 GiB, planned", recipe, plan, measures=True)
    assert dead.outcome.startswith("ValueError: training.vram_gib is 10.8: this recipe needs a CUDA GPU")


def test_measurements_run_apart() -> None:
    assert run_isolated(os.getpid) != os.getpid()
    assert list(map_isolated(abs, [-1, 2])) == [1, 2]
    with pytest.raises(BrokenProcessPool):
        run_isolated(os._exit, 1)


@pytest.mark.usefixtures("small_sdxl")
def test_a_random_sdxl_loads_as_a_pipeline(tmp_path: Path) -> None:
    folder = saved_sdxl.save_random_sdxl(tmp_path / "sdxl", torch.device("cpu"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float16)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder_2)} == {torch.float16}
    noise = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")  # as diffusers' script reads it
    assert noise.alphas_cumprod[-1] == pytest.approx(0.00466, abs=1e-5)
    assert pipeline.tokenizer("red fox").input_ids != pipeline.tokenizer("old boat").input_ids
    written = (folder / "model_index.json").stat().st_mtime_ns
    saved_sdxl.save_random_sdxl(folder, torch.device("cpu"))
    assert (folder / "model_index.json").stat().st_mtime_ns == written  # kept


@pytest.mark.usefixtures("small_sdxl")
def test_layers_are_quantised_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    dense: list[weakref.ref[nn.Linear]] = []
    most = 0
    make = nn.Linear.__init__

    def make_and_count(layer: nn.Linear, *arguments: Any, **options: Any) -> None:
        nonlocal most
        make(layer, *arguments, **options)
        dense.append(weakref.ref(layer))
        most = max(most, sum(type(reference()) is nn.Linear for reference in dense))

    monkeypatch.setattr(nn.Linear, "__init__", make_and_count)
    denoiser = random_sdxl.random_denoiser("bf16", torch.device("cpu"), True, "nf4")
    layers = [layer for module in denoiser.modules for layer in module.modules()]
    assert sum(isinstance(layer, QuantizedLinear) for layer in layers) == len(dense) > 100
    assert not any(type(layer) is nn.Linear for layer in layers)
    assert most <= 2


def test_time_excludes_the_warm_up() -> None:
    calls: list[int] = []
    assert len(timed(lambda: calls.append(1), torch.device("cpu"), repetitions=2)) == 2
    assert len(calls) == 5


def test_a_matrix_product_has_its_speed() -> None:
    result = measure_matmul("fp32", 64)
    median = sorted(result.seconds)[9:11]
    assert result.figures["tflop_per_second"] == pytest.approx(2 * 64**3 / (sum(median) / 2) / 1e12, abs=0.05)


@pytest.mark.usefixtures("small_sdxl")
def test_encoding_is_timed_per_batch() -> None:
    result = measure_vae({"precision": "fp32", "batch_size": 2, "resolution": 64}, repetitions=2)
    assert len(result.seconds) == 2
    assert result.samples_per_second == pytest.approx(2 / (sum(result.seconds) / 2))


SAMPLING_KEYS: Configuration = {
    "model": "demo",
    "way": "ours",
    "precision": "fp32",
    "strength": 1.0,
    "batch_size": 2,
    "resolution": 64,
    "num_inference_steps": 2,
}


@pytest.mark.usefixtures("small_sdxl")
@pytest.mark.parametrize("way", WAYS)
def test_sampling_is_timed_per_batch(way: str) -> None:
    result = measure_sample({**SAMPLING_KEYS, "model": "random_sdxl", "way": way}, repetitions=2)
    assert (result.outcome, len(result.seconds)) == ("ok", 2)
    assert result.figures["first_batch_seconds"] > 0


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_sampling_gives_the_same_images(way: str, strength: float) -> None:
    result = measure_sample({**SAMPLING_KEYS, "way": way, "strength": strength}, repetitions=1)
    assert result.figures["psnr_db"] > 60


def test_psnr_tells_other_images_from_the_same() -> None:
    black, grey = (Image.new("RGB", (8, 8), (level, level, level)) for level in (0, 51))
    assert psnr([black], [black]) == 100
    assert psnr([black], [grey]) == pytest.approx(20 * math.log10(255 / 51))


def test_a_line_that_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"benchmark": "train_step"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1, is not a benchmark result"):
        read_results(tmp_path / "bad.jsonl")


def test_a_file_is_of_one_machine(tmp_path: Path) -> None:
    result = measure_matmul("fp32", 8)
    elsewhere = result.model_copy(update={"machine": result.machine.model_copy(update={"gpu": "another"})})
    for line in (result, elsewhere):
        publish(line, tmp_path / "mixed.jsonl")
    with pytest.raises(ValueError, match=r"line 2, is from another machine"):
        read_results(tmp_path / "mixed.jsonl")


def test_parameters_are_counted_as_published() -> None:
    assert counts.parameters() == counts.load().parameters
    assert counts.load().parameters["unet"] / 1e9 == pytest.approx(
        2.6, abs=0.05
    )  # Podell et al. 2023, table 1
    text_encoders = [counts.load().parameters[name] for name in ("text_encoder", "text_encoder_2")]
    assert sum(text_encoders) // 10**6 == 817


@pytest.mark.slow
def test_counts_are_those_of_the_code() -> None:
    assert counts.count() == counts.load()


def test_a_killed_training_is_compared_with_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark of resuming, on the demo's model, with an exception in place of its death."""
    params = resume.with_steps(load_params(Path("recipes/demo.yaml")), steps=4)
    params = params.model_copy(update={"training": params.training.model_copy(update={"batch_size": 1})})
    dataset = write_encoded_dataset(tmp_path / "encoded", params.model)
    monkeypatch.setattr(dataset, "latents", dataset[0].latents_mean.shape, raising=False)
    monkeypatch.setattr(resume, "RandomDataset", lambda _: dataset)
    monkeypatch.setattr(
        resume,
        "random_denoiser",
        lambda precision, device, *_: load_denoiser(params.model, precision, device),
    )

    def die(*_: int) -> None:
        raise InterruptedError

    monkeypatch.setattr(os, "kill", die)
    whole = resume.train(params, tmp_path / "whole", save_after=2)
    with pytest.raises(InterruptedError):
        resume.train(params, tmp_path / "killed", save_after=2, kill_after=3)
    resumed = resume.train(params, tmp_path / "killed")
    found = resume.comparison(whole, resumed)
    assert found["adapter_equal"]
    assert found["reports_equal"]
    assert found["resumed_after"] == 2
    assert not resume.comparison(whole, resumed | {"adapter": "another"})["adapter_equal"]
