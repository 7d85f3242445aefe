from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from sdxl_lora.config import ModelConfig, load_params
from sdxl_lora.models.sdxl import load_noise_schedule, load_pipeline, load_unet, predict
from sdxl_lora.models.text_encoders import embed_tokens, load_text_encoders
from sdxl_lora.models.tokenizers import load_tokenizers, tokenize

CPU = torch.device("cpu")
PROMPTS = ["red apple, noto style", "a very long caption " * 40, ""]


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return load_params(Path("recipes/demo.yaml")).model


@pytest.fixture(scope="module")
def pipeline(model: ModelConfig) -> StableDiffusionXLPipeline:
    return load_pipeline(model, "fp32", CPU)


def random_inputs(unet: UNet2DConditionModel, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps, prompt embeddings, pooled prompt embeddings."""
    pooled_width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return (
        torch.randn(size, 4, 16, 16),
        torch.randint(1000, (size,)),
        torch.randn(size, 77, unet.config.cross_attention_dim),
        torch.randn(size, pooled_width),
    )


def test_text_is_read_as_the_pipeline_reads_it(
    model: ModelConfig, pipeline: StableDiffusionXLPipeline
) -> None:
    token_ids = tokenize(load_tokenizers(model), PROMPTS)
    prompt_embeds, pooled_prompt_embeds = embed_tokens(load_text_encoders(model, "fp32", CPU), token_ids)
    expected, _, expected_pooled, _ = pipeline.encode_prompt(
        PROMPTS, device=CPU, do_classifier_free_guidance=False
    )
    assert token_ids.shape == (3, 2, 77)
    torch.testing.assert_close(prompt_embeds, expected)
    torch.testing.assert_close(pooled_prompt_embeds, expected_pooled)


def test_noise_schedule_is_the_pipelines(model: ModelConfig, pipeline: StableDiffusionXLPipeline) -> None:
    schedule = load_noise_schedule(model)
    torch.testing.assert_close(schedule.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    assert schedule.prediction_type == pipeline.scheduler.config.prediction_type


def test_models_are_frozen(model: ModelConfig) -> None:
    unet = load_unet(model, "bf16", CPU)
    assert not unet.training
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}


def test_pipeline_is_frozen(pipeline: StableDiffusionXLPipeline) -> None:
    """Otherwise its images would change, by rounding, once an adapter freezes the base model."""
    modules = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae)
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert not any(module.training for module in modules)


def test_sizes_that_half_precision_cannot_hold_reach_the_unet_whole(model: ModelConfig) -> None:
    """In fp16, 4001 is 4000 and 70000 is infinite."""
    unet = load_unet(model, "bf16", CPU)
    seen = []
    unet.add_time_proj.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    time_ids = torch.tensor([[4001, 70000, 0, 0, 128, 128]], dtype=torch.int32)
    latents, timesteps, embeds, pooled = random_inputs(unet, 1)
    half = torch.bfloat16
    predict(unet, latents.to(half), timesteps, embeds.to(half), pooled.to(half), time_ids)
    assert seen[0].tolist() == [4001, 70000, 0, 0, 128, 128]
