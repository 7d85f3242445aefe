"""The fused modules against diffusers', transformers' and PEFT's own, on the demo's model."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from sdxl_lora.adapters.lora import add_adapters, lora_parameters
from sdxl_lora.config import Params, load_params
from sdxl_lora.kernels.attention import AttentionShape
from sdxl_lora.models.class_swap import swap_classes
from sdxl_lora.models.fused_blocks import FUSED_BLOCKS
from sdxl_lora.models.fused_text_encoder import FUSED_TEXT_CLASSES, fuse_text_encoder
from sdxl_lora.models.fused_unet import (
    FUSED_UNET_CLASSES,
    attention_shapes,
    cross_attentions,
    fuse_unet,
    project_text,
)
from sdxl_lora.models.fused_vae import fuse_vae
from sdxl_lora.models.sdxl import predict
from sdxl_lora.models.text_encoders import embed_tokens
from sdxl_lora.models.vae import load_vae
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.training.denoiser import Denoiser, load_denoiser
from tests.support.interpreter import INTERPRETED, large

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
VALUES = ["to_q", "attn2.to_v"]
ONE_BLOCK = [f"mid_block.attentions.0.transformer_blocks.0.attn2.{name}" for name in ("to_k", "to_v")]


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(Path("recipes/demo.yaml"))


def adapted(params: Params, modules: list[str], device: torch.device, dropout: float = 0.0) -> Denoiser:
    """The demo's model in fp32, text encoders too, with random adapters whose alpha is twice the rank."""
    model = params.model.model_copy(update={"text_encoders": "trained"})
    changes = {"unet_modules": modules, "rank": 4, "alpha": 8.0, "dropout": dropout}
    denoiser = load_denoiser(model, "fp32", device)
    add_adapters(denoiser.parts, params.lora.model_copy(update=changes), 0)
    for module in denoiser.modules:
        module.train()
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.data = (
                    torch.randn(parameter.shape, generator=keyed_generator("B", name)).to(device) * 0.05
                )
    return denoiser


def fuse_all(denoiser: Denoiser) -> None:
    fuse_unet(denoiser.unet, "sdpa")
    for text_encoder in denoiser.text_encoders or ():
        fuse_text_encoder(text_encoder)


def prediction(denoiser: Denoiser, batch: int = 2) -> Tensor:
    assert denoiser.text_encoders is not None
    token_ids = torch.randint(3, 1999, (batch, 2, 77), generator=keyed_generator("tokens"))
    token_ids[..., -1] = denoiser.text_encoders[0].config.eos_token_id
    latents = torch.randn(batch, 4, 16, 16, generator=keyed_generator("latents")).to(denoiser.device)
    time_ids = torch.tensor([[128, 128, 0, 0, 128, 128]] * batch, device=denoiser.device)
    embeds = embed_tokens(denoiser.text_encoders, token_ids.to(denoiser.device))
    timesteps = torch.tensor([700, 3][:batch], device=denoiser.device)
    return predict(denoiser.unet, latents, timesteps, *embeds, time_ids)


def prediction_and_gradient(denoiser: Denoiser, batch: int = 2) -> tuple[Tensor, Tensor]:
    """A prediction, and the gradient of its square by all adapters, flat."""
    output = prediction(denoiser, batch)
    parameters = [p for module in denoiser.modules for p in lora_parameters(module)]
    gradients = torch.autograd.grad(output.square().mean(), parameters)
    return output.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(
    "modules",
    [
        pytest.param(ATTENTION, id="attention"),
        pytest.param(VALUES, id="some values", marks=large),
        pytest.param(ONE_BLOCK, id="one block", marks=large),
        pytest.param(None, id="everything", marks=large),
    ],
)
def test_predictions_and_gradients_are_those_of_diffusers_and_peft(
    params: Params, device: torch.device, modules: list[str] | None
) -> None:
    names = modules or params.lora.unet_modules
    plain, fused = (adapted(params, names, device) for _ in range(2))
    fuse_all(fused)
    batch = 1 if INTERPRETED else 2  # an example takes the interpreter 20 seconds
    with torch.backends.cudnn.flags(allow_tf32=False):
        results = [prediction_and_gradient(denoiser, batch) for denoiser in (fused, plain)]
        for ours, oracle in zip(*results, strict=True):
            assert relative_error(ours, oracle) < 1e-5


def test_a_text_is_projected_once_for_all_attentions_of_a_width(params: Params) -> None:
    denoiser = adapted(params, ATTENTION, torch.device("cpu"))
    fuse_all(denoiser)
    attentions = cross_attentions(denoiser.unet)
    text = torch.randn(2, 77, attentions[0].to_k.in_features, generator=keyed_generator("text"))
    found = project_text(denoiser.unet, text.requires_grad_())
    assert len({tensor.grad_fn for pair in found.values() for tensor in pair}) == len(
        {attention.inner_dim for attention in attentions}
    )
    assert set(found) == set(attentions)
    for attention, (key, value) in found.items():
        torch.testing.assert_close(key, attention.to_k(text))
        torch.testing.assert_close(value, attention.to_v(text))


def test_adapters_with_dropout_keep_pefts_arithmetic(params: Params) -> None:
    plain, fused = (adapted(params, ATTENTION, torch.device("cpu"), dropout=0.3) for _ in range(2))
    fuse_all(fused)
    for module in (*plain.modules, *fused.modules):
        module.eval()  # their draws come in another order
    for ours, oracle in zip(prediction_and_gradient(fused), prediction_and_gradient(plain), strict=True):
        assert relative_error(ours, oracle) < 1e-5


def test_names_and_weights_stay(params: Params) -> None:
    denoiser = adapted(params, params.lora.unet_modules, torch.device("cpu"))
    before = [{name: t.clone() for name, t in m.state_dict().items()} for m in denoiser.modules]
    fuse_all(denoiser)
    for module, expected in zip(denoiser.modules, before, strict=True):
        assert list(module.state_dict()) == list(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())


def test_every_class_is_put_to_use(params: Params) -> None:
    denoiser = adapted(params, params.lora.unet_modules, torch.device("cpu"))
    fuse_all(denoiser)
    tables = (FUSED_UNET_CLASSES, FUSED_TEXT_CLASSES, FUSED_TEXT_CLASSES)
    for module, table in zip(denoiser.modules, tables, strict=True):
        classes = {type(part) for part in module.modules()}
        assert set(table.values()) <= classes
        assert not classes & (set(table) - {torch.nn.Conv2d})  # adapters' own convolutions are trained


def test_attention_shapes_are_those_that_a_forward_pass_meets(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = adapted(params, ATTENTION, torch.device("cpu"))
    fuse_all(denoiser)
    met: Counter[AttentionShape] = Counter()

    def remember(query: Tensor, key: Tensor, *_: object) -> Tensor:
        batch, queries, heads, width = query.shape
        met[AttentionShape(batch, queries, key.shape[1], heads, width, 0)] += 1
        return query

    monkeypatch.setattr("sdxl_lora.models.fused_unet.attend", remember)
    prediction(denoiser)
    shapes = attention_shapes(denoiser.unet, 2, 16, 16)
    assert {replace(shape, count=0): shape.count for shape in shapes} == met


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_vae_is_fused_as_a_whole_and_is_diffusers(params: Params, device: str) -> None:
    plain, fused = (load_vae(params.model, "fp32", torch.device(device)) for _ in range(2))
    fuse_vae(fused)
    classes = {type(part) for part in fused.modules()}
    assert set(FUSED_BLOCKS.values()) <= classes
    assert not classes & set(FUSED_BLOCKS)
    latents = torch.randn(2, 4, 8, 8, generator=keyed_generator("latents")).to(device)
    pixels = torch.rand(2, 3, 64, 64, generator=keyed_generator("pixels")).to(device)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        assert relative_error(fused.decode(latents).sample, plain.decode(latents).sample) < 1e-5
        encoded = (vae.encode(pixels).latent_dist.mean for vae in (fused, plain))
        assert relative_error(*encoded) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"output_scale_factor": 2.0},
        {"non_linearity": "gelu"},
        {"skip_time_act": True},
        {"time_embedding_norm": "scale_shift"},
        {"up": True},
        {"down": True},
    ],
    ids=str,
)
def test_residual_block_with_options_that_sdxl_has_not_keeps_its_arithmetic(options: dict[str, Any]) -> None:
    block = ResnetBlock2D(in_channels=32, out_channels=64, temb_channels=8, **options).requires_grad_(False)
    image = torch.randn(2, 32, 8, 8, generator=keyed_generator("image"))
    time = torch.randn(2, 8, generator=keyed_generator("time"))
    expected = block(image, time)
    swap_classes(block, FUSED_BLOCKS)
    torch.testing.assert_close(block(image, time), expected)


@pytest.mark.parametrize(
    "options",
    [{"padding_mode": "circular"}, {"padding": "same"}, {"dilation": 2}, {"groups": 2}],
    ids=str,
)
def test_convolution_with_options_that_sdxl_has_not_keeps_its_arithmetic(options: dict[str, Any]) -> None:
    convolutions = nn.Sequential(nn.Conv2d(4, 6, 3, **{"padding": 1, **options})).requires_grad_(False)
    image = torch.randn(2, 4, 8, 8, generator=keyed_generator("image"))
    expected = convolutions(image)
    swap_classes(convolutions, FUSED_BLOCKS)
    torch.testing.assert_close(convolutions(image), expected)
