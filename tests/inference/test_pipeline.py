"""Images of the fast pipeline compared with those of diffusers' pipeline, on the demo's model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL.Image import Image

from sdxl_lora.adapters.lora import adapter_strength
from sdxl_lora.config import Params, Precision, SamplingConfig, load_params
from sdxl_lora.inference.pipeline import fuse_pipeline, generate_images, prepare_pipeline, use_cuda_graph
from sdxl_lora.inference.sampling import adapted_modules, initial_noise, load_adapter
from sdxl_lora.models.fused_text_encoder import FUSED_TEXT_CLASSES
from sdxl_lora.models.fused_unet import FUSED_UNET_CLASSES
from sdxl_lora.models.sdxl import load_pipeline
from tests.support.adapters import write_adapter

CPU, STRENGTHS = torch.device("cpu"), (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(Path("recipes/demo.yaml"))


@pytest.fixture(scope="module")
def config(params: Params) -> SamplingConfig:
    changes = {"prompts": params.sampling.prompts[:2], "num_inference_steps": 4, "batch_size": 2}
    return params.sampling.model_copy(update=changes)


@pytest.fixture(scope="module")
def adapter(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one on UNet and text encoders."""
    folder = tmp_path_factory.mktemp("lora")
    write_adapter(folder, params.model.model_copy(update={"text_encoders": "trained"}), params.lora)
    return folder


def adapted_pipeline(
    params: Params, adapter: Path, precision: Precision, device: torch.device
) -> StableDiffusionXLPipeline:
    pipeline = load_pipeline(params.model, precision, device)
    load_adapter(pipeline, adapter)
    return pipeline


def generate(pipeline: StableDiffusionXLPipeline, config: SamplingConfig, record: bool = True) -> list[Image]:
    """A batch at each strength, twice within a recording: the second time replayed from the start."""
    noise = torch.stack([initial_noise(pipeline, config, number, 0) for number in range(2)])
    images = []
    for value in STRENGTHS:
        with adapter_strength(adapted_modules(pipeline), value):
            if record:
                with use_cuda_graph(pipeline.unet):
                    first = generate_images(pipeline, config, config.prompts, noise)
                    images += generate_images(pipeline, config, config.prompts, noise)
                assert levels(first) == levels(images[-2:])
            else:
                images += generate_images(pipeline, config, config.prompts, noise)
    return images


def levels(images: Sequence[Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def largest_difference(first: Sequence[Image], second: Sequence[Image]) -> int:
    pairs = zip(first, second, strict=True)
    return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in pairs)


def error(images: Sequence[Image], expected: Sequence[Image]) -> float:
    """Root mean square of the levels' differences."""
    pairs = zip(images, expected, strict=True)
    return float(np.sqrt(np.mean([np.square(np.asarray(a, float) - np.asarray(b, float)) for a, b in pairs])))


def test_fused_pipeline_draws_what_diffusers_draws(
    params: Params, config: SamplingConfig, adapter: Path
) -> None:
    pipeline = adapted_pipeline(params, adapter, "fp32", CPU)
    expected = generate(pipeline, config, record=False)
    text_encoders = pipeline.text_encoder, pipeline.text_encoder_2
    fuse_pipeline(pipeline.unet, text_encoders, pipeline.vae, "sdpa")
    modules = (pipeline.unet, *text_encoders, pipeline.vae)
    classes = {type(part) for module in modules for part in module.modules()}
    assert {*FUSED_UNET_CLASSES.values(), *FUSED_TEXT_CLASSES.values()} <= classes
    assert largest_difference(generate(pipeline, config), expected) <= 2  # of 255 levels


def test_pipeline_stays_diffusers_own_on_a_cpu(params: Params, config: SamplingConfig, adapter: Path) -> None:
    pipeline = adapted_pipeline(params, adapter, "fp32", CPU)
    expected = generate(pipeline, config, record=False)
    prepare_pipeline(pipeline, config)
    assert levels(generate(pipeline, config)) == levels(expected)


def test_unet_is_itself_again_after_the_block_also_after_an_error(params: Params) -> None:
    pipeline = load_pipeline(params.model, "fp32", CPU)
    before = pipeline.unet.forward
    with use_cuda_graph(pipeline.unet):
        assert pipeline.unet.forward != before
    assert pipeline.unet.forward == before
    with pytest.raises(TypeError), use_cuda_graph(pipeline.unet):
        pipeline.unet(None)
    assert pipeline.unet.forward == before


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_images_by_a_cuda_graph_are_no_further_from_the_exact_ones_than_diffusers_own(
    params: Params, config: SamplingConfig, adapter: Path, precision: Precision
) -> None:
    device = torch.device("cuda")
    exact = generate(adapted_pipeline(params, adapter, "fp32", device), config, record=False)
    plain = generate(adapted_pipeline(params, adapter, precision, device), config, record=False)
    pipeline = adapted_pipeline(params, adapter, precision, device)
    prepare_pipeline(pipeline, config)
    ours = generate(pipeline, config)
    assert error(ours, exact) < 1.25 * error(plain, exact) + 0.5
    assert error(ours[:2], exact[2:4]) > 4 * error(ours[:2], exact[:2])  # strengths are not mixed up


@pytest.mark.gpu
def test_graph_gives_its_memory_back(params: Params, config: SamplingConfig) -> None:
    pipeline = load_pipeline(params.model, "fp16", torch.device("cuda"))
    prepare_pipeline(pipeline, config)
    noise = torch.stack([initial_noise(pipeline, config, number, 0) for number in range(2)])
    reserved = []
    for _ in range(3):
        with use_cuda_graph(pipeline.unet):
            generate_images(pipeline, config, config.prompts, noise)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] == reserved[1]
