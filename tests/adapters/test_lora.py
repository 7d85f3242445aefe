from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from sdxl_lora.adapters.lora import adapter_strength, add_adapters, load_lora, lora_parameters, save_lora
from sdxl_lora.adapters.lora_file import WEIGHTS_FILE
from sdxl_lora.config import LoraConfig, ModelConfig, load_params
from sdxl_lora.models.sdxl import load_pipeline
from sdxl_lora.models.text_encoders import embed_tokens
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.training.denoiser import Denoiser, load_denoiser

CPU = torch.device("cpu")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    model = load_params(Path("recipes/demo.yaml")).model
    return model.model_copy(update={"text_encoders": "trained"})


def config(unet_modules: list[str] = ATTENTION) -> LoraConfig:
    text_encoder_modules = ["q_proj", "k_proj", "v_proj", "out_proj"]
    return LoraConfig(
        rank=4, alpha=6.0, dropout=0.0, unet_modules=unet_modules, text_encoder_modules=text_encoder_modules
    )


def adapted(model: ModelConfig, lora: LoraConfig, seed: int = 0) -> Denoiser:
    denoiser = load_denoiser(model, "fp32", CPU)
    add_adapters(denoiser.parts, lora, seed)
    return denoiser


@torch.no_grad()
def as_if_trained(denoiser: Denoiser) -> Denoiser:
    for number, parameter in enumerate(p for m in denoiser.modules for p in lora_parameters(m)):
        parameter.copy_(torch.randn(parameter.shape, generator=keyed_generator("trained", number)) * 0.1)
    return denoiser


def updates(module: nn.Module) -> dict[str, Tensor]:
    """The update of each adapted layer, alpha / rank B A, by PEFT."""
    layers = {name: layer for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def predictions(denoiser: Denoiser) -> Tensor:
    token_ids = torch.arange(2 * 2 * 77).view(2, 2, 77) % 2000
    prompt_embeds, pooled = embed(denoiser, token_ids)
    unet = denoiser.unet
    return unet(
        torch.randn(2, 4, 16, 16, generator=keyed_generator("latents")),
        torch.tensor([100, 800]),
        prompt_embeds,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.full((2, 6), 128.0)},
    ).sample


def embed(denoiser: Denoiser, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    assert denoiser.text_encoders is not None
    return embed_tokens(denoiser.text_encoders, token_ids)


def test_new_adapters_change_nothing(model: ModelConfig) -> None:
    assert torch.equal(predictions(adapted(model, config())), predictions(load_denoiser(model, "fp32", CPU)))


def test_only_adapters_are_trainable_and_in_fp32_on_half_precision_models(model: ModelConfig) -> None:
    denoiser = load_denoiser(model, "bf16", CPU)
    add_adapters(denoiser.parts, config(EVERYTHING), 0)
    for module in denoiser.modules:
        trainable = {name: p.dtype for name, p in module.named_parameters() if p.requires_grad}
        assert trainable
        assert all("lora_" in name and dtype == torch.float32 for name, dtype in trainable.items())
        assert len(trainable) == len(lora_parameters(module))


def test_gradient_reaches_every_adapter(model: ModelConfig) -> None:
    denoiser = as_if_trained(adapted(model, config(EVERYTHING)))
    predictions(denoiser).square().mean().backward()
    for module in denoiser.modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.abs().max() > 0, name


def downs(parameters: list[Tensor]) -> list[Tensor]:
    """Those of one module that are an A: the first half."""
    return parameters[: len(parameters) // 2]


def test_start_depends_on_the_seed_alone(model: ModelConfig) -> None:
    torch.manual_seed(1)
    first = [p.detach() for p in lora_parameters(adapted(model, config()).unet)]
    torch.manual_seed(2)
    again = [p.detach() for p in lora_parameters(adapted(model, config()).unet)]
    other = [p.detach() for p in lora_parameters(adapted(model, config(), seed=1).unet)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(downs(first), downs(other), strict=True))


def test_start_is_pefts_gaussian(model: ModelConfig) -> None:
    parameters = [p.detach() for p in lora_parameters(adapted(model, config()).unet)]
    down, up = torch.cat([p.flatten() for p in downs(parameters)]), parameters[len(parameters) // 2 :]
    assert down.std().item() == pytest.approx(1 / 4, rel=0.02)
    assert all(not weight.any() for weight in up)


@pytest.mark.parametrize("unet_modules", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
def test_saved_adapters_act_as_the_trained_ones(
    model: ModelConfig, unet_modules: list[str], tmp_path: Path
) -> None:
    trained = as_if_trained(adapted(model, config(unet_modules)))
    save_lora(tmp_path / "lora", trained.parts)
    loaded = load_denoiser(model, "fp32", CPU)
    load_lora(tmp_path / "lora", loaded.parts)
    for ours, theirs in zip(trained.modules, loaded.modules, strict=True):
        expected, found = updates(ours), updates(theirs)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(predictions(trained), predictions(loaded))
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize("unet_modules", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
def test_diffusers_loads_the_same_updates(
    model: ModelConfig, unet_modules: list[str], tmp_path: Path
) -> None:
    trained = as_if_trained(adapted(model, config(unet_modules)))
    save_lora(tmp_path, trained.parts)
    pipeline = load_pipeline(model, "fp32", CPU)
    pipeline.load_lora_weights(tmp_path, adapter_name="default")
    theirs = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    for our_module, their_module in zip(trained.modules, theirs, strict=True):
        expected, found = updates(our_module), updates(their_module)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_file_names_layers_as_other_tools_do_and_tells_no_path(model: ModelConfig, tmp_path: Path) -> None:
    trained = as_if_trained(adapted(model, config()))
    save_lora(tmp_path, trained.parts, {"data_digest": "sha256:1"})
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        keys, header = list(file.keys()), file.metadata()
    text = [key for key in keys if key.startswith(("text_encoder.", "text_encoder_2."))]
    assert text
    assert all(key.split(".")[1] == "text_model" for key in text)
    assert header["data_digest"] == "sha256:1"
    assert "base_model/" not in str(header)


def test_adapter_trained_with_dropout_samples_without(model: ModelConfig, tmp_path: Path) -> None:
    """Diffusers puts adapters on in training mode: a dropout in the file would garble every image."""
    trained = as_if_trained(adapted(model, config().model_copy(update={"dropout": 0.5})))
    save_lora(tmp_path, trained.parts)
    pipeline = load_pipeline(model, "fp32", CPU)
    pipeline.load_lora_weights(tmp_path, adapter_name="default")
    loaded = Denoiser(
        pipeline.unet, (pipeline.text_encoder, pipeline.text_encoder_2), trained.noise_schedule, "fp32"
    )
    with torch.no_grad():
        assert torch.equal(predictions(loaded), predictions(loaded))


def test_adapter_of_another_model_is_refused(model: ModelConfig, tmp_path: Path) -> None:
    trained = adapted(model, config())
    save_lora(tmp_path, trained.parts)
    with pytest.raises(ValueError, match=r"set model\.text_encoders as it was in training"):
        load_lora(tmp_path, {"unet": load_denoiser(model, "fp32", CPU).unet})


def test_missing_adapter_names_the_stage_to_run(model: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dvc repro train_lora"):
        load_lora(tmp_path, {"unet": load_denoiser(model, "fp32", CPU).unet})


def test_name_that_matches_nothing_is_refused_with_names_that_do(model: ModelConfig) -> None:
    denoiser = load_denoiser(model, "fp32", CPU)
    with pytest.raises(ValueError, match=r"lora\.unet_modules: 'to_quary' matches no layer .*: to_q"):
        add_adapters({"unet": denoiser.unet}, config(["to_quary"]), 0)


def test_strength_scales_the_updates_and_zero_is_the_base_model(model: ModelConfig) -> None:
    base = predictions(load_denoiser(model, "fp32", CPU))
    trained = as_if_trained(adapted(model, config()))
    whole = predictions(trained)
    expected = {name: 0.5 * update for name, update in updates(trained.unet).items()}
    with adapter_strength(trained.modules, 0.5):
        assert all(torch.allclose(update, expected[n]) for n, update in updates(trained.unet).items())
        half = predictions(trained)
    with adapter_strength(trained.modules, 0.0):
        assert torch.equal(predictions(trained), base)
    assert torch.equal(predictions(trained), whole)
    assert not torch.equal(half, whole)
