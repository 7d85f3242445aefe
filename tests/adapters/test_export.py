import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from sdxl_lora.adapters.export import check_files, export_lora, kohya_file, model_spec
from sdxl_lora.adapters.kohya import kohya_delta, kohya_name
from sdxl_lora.adapters.lora import add_adapters, load_lora, lora_parameters, save_lora
from sdxl_lora.adapters.lora_file import WEIGHTS_FILE
from sdxl_lora.config import ExportConfig, LoraConfig, ModelConfig, Params, load_params
from sdxl_lora.inference.sampling import adapted_modules, initial_noise
from sdxl_lora.models.base_config import layers_per_block
from sdxl_lora.models.sdxl import load_pipeline
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.storage.safetensors_io import read_header, write_tensors
from sdxl_lora.training.denoiser import Denoiser, load_denoiser

CPU = torch.device("cpu")
CONFIG = ExportConfig(title="Naruto Style, v2!", license="openrail++")
KOHYA = "naruto-style-v2.safetensors"
FACTS = {"sdxl_lora.data.sha256": "abc", "modelspec.title": "Naruto Style, v2!"}


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(Path("recipes/demo.yaml"))


@pytest.fixture(scope="module")
def model(params: Params) -> ModelConfig:
    return params.model.model_copy(update={"text_encoders": "trained"})


@pytest.fixture(scope="module")
def trained(model: ModelConfig, params: Params) -> Denoiser:
    """Adapters on all that the demo adapts and on both text encoders, alpha 1.5 times the rank."""
    lora = LoraConfig(**{**params.lora.model_dump(), "rank": 4, "alpha": 6.0})
    denoiser = load_denoiser(model, "fp32", CPU)
    add_adapters(denoiser.parts, lora, 0)
    with torch.no_grad():
        for number, parameter in enumerate(p for m in denoiser.modules for p in lora_parameters(m)):
            parameter.copy_(torch.randn(parameter.shape, generator=keyed_generator("b", number)) * 0.05)
    return denoiser


@pytest.fixture(scope="module")
def exported(trained: Denoiser, model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapter as trained (`lora`) and as exported (`export`)."""
    folder = tmp_path_factory.mktemp("export")
    save_lora(folder / "lora", trained.parts)
    export_lora(folder / "lora", folder / "export", CONFIG, FACTS, layers_per_block(model))
    return folder


def updates(module: nn.Module) -> dict[str, Tensor]:
    layers = {name: layer for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def loaded(model: ModelConfig, folder: Path, name: str) -> StableDiffusionXLPipeline:
    pipeline = load_pipeline(model, "fp32", CPU)
    pipeline.load_lora_weights(folder, weight_name=name, adapter_name="default")
    return pipeline


def sample_image(pipeline: StableDiffusionXLPipeline, params: Params) -> Tensor:
    config = params.sampling.model_copy(update={"resolution": 64})
    noise = initial_noise(pipeline, config, 0, 0)[None]
    options: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "pt"}
    with torch.no_grad():
        return pipeline("pizza, fluent 3d style", latents=noise, **options).images


def test_diffusers_draws_the_same_picture_from_either_file_and_from_the_trained_adapter(
    trained: Denoiser, model: ModelConfig, params: Params, exported: Path
) -> None:
    pipelines = [loaded(model, exported / "export", name) for name in (WEIGHTS_FILE, KOHYA)]
    for pipeline in pipelines:
        for ours, theirs in zip(trained.modules, adapted_modules(pipeline), strict=True):
            expected, found = updates(ours), updates(theirs)
            assert expected.keys() == found.keys()
            assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in expected)
    images = [sample_image(loaded(model, exported / "lora", WEIGHTS_FILE), params)]
    images += [sample_image(pipeline, params) for pipeline in pipelines]
    assert torch.equal(images[0], images[1])
    assert (images[0] - images[2]).abs().max() < 0.5 / 255
    assert (images[0] - sample_image(load_pipeline(model, "fp32", CPU), params)).abs().max() > 8 / 255


def test_headers_say_what_the_files_are_and_where_they_come_from(exported: Path) -> None:
    diffusers, kohya = (read_header(exported / "export" / name) for name in (WEIGHTS_FILE, KOHYA))
    assert diffusers.items() >= FACTS.items()
    assert "lora_adapter_metadata" in diffusers
    assert kohya.items() >= FACTS.items()
    assert kohya["ss_network_dim"] == "4"
    assert kohya["ss_network_alpha"] == "6.0"
    data = (exported / "export" / KOHYA).read_bytes()
    content = data[8 + int.from_bytes(data[:8], "little") :]
    assert kohya["modelspec.hash_sha256"] == "0x" + hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_both_files_are_scaled_as_peft_scales_them(
    model: ModelConfig, exported: Path, tmp_path: Path, use_rslora: bool
) -> None:
    """Also with an option that changes the scale: alpha / sqrt(rank)."""
    source = exported / "lora" / WEIGHTS_FILE
    header = read_header(source)
    options = json.loads(header["lora_adapter_metadata"])
    options |= {key: use_rslora for key in options if key.endswith(".use_rslora")}
    header["lora_adapter_metadata"] = json.dumps(options)
    write_tensors(tmp_path / "lora" / WEIGHTS_FILE, load_file(source), header)
    export_lora(tmp_path / "lora", tmp_path / "export", CONFIG, FACTS, layers_per_block(model))
    weights = load_file(tmp_path / "export" / KOHYA)
    parts = load_denoiser(model, "fp32", CPU).parts
    load_lora(tmp_path / "export", parts)
    scales = {layer.scaling["default"] for layer in parts["unet"].modules() if hasattr(layer, "scaling")}
    assert scales == {6.0 / 4**0.5 if use_rslora else 6.0 / 4}
    for name, expected in updates(parts["unet"]).items():
        found = kohya_delta(weights, kohya_name(f"unet.{name}", layers_per_block(model)))
        torch.testing.assert_close(found, expected)


def test_model_spec_has_all_that_the_standard_demands() -> None:
    spec = model_spec(CONFIG, "naruto style", 1024, "v_prediction")
    must = {"sai_model_spec", "architecture", "implementation", "title"}
    assert {f"modelspec.{name}" for name in must} <= set(spec)
    assert spec["modelspec.resolution"] == "1024x1024"
    assert spec["modelspec.prediction_type"] == "v"
    assert spec["modelspec.trigger_phrase"] == "naruto style"
    assert "modelspec.trigger_phrase" not in model_spec(CONFIG, None, 128, "epsilon")


@pytest.mark.parametrize("name", [WEIGHTS_FILE, KOHYA])
@pytest.mark.parametrize("damage", ["weight", "layer", "alpha"])
def test_file_that_does_not_hold_what_was_trained_is_found_out(
    exported: Path, tmp_path: Path, name: str, damage: str
) -> None:
    files = {n: exported / "export" / n for n in (WEIGHTS_FILE, KOHYA)}
    tensors, header = load_file(files[name]), read_header(files[name])
    first = next(iter(tensors))
    if damage == "weight":
        weight = next(key for key in tensors if not key.endswith("alpha"))
        tensors[weight] = tensors[weight] * 1.001
    elif damage == "layer":
        del tensors[first]
    elif name == KOHYA:
        alpha = next(key for key in tensors if key.endswith("alpha"))
        tensors[alpha] = torch.tensor(4.0)
    else:
        header["lora_adapter_metadata"] = header["lora_adapter_metadata"].replace("6.0", "4.0")
    files[name] = tmp_path / name
    write_tensors(files[name], tensors, header)
    with pytest.raises(RuntimeError, match=name):
        check_files(exported / "lora" / WEIGHTS_FILE, files[WEIGHTS_FILE], files[KOHYA], 2)


def test_export_is_the_same_to_the_byte_every_time(
    exported: Path, model: ModelConfig, tmp_path: Path
) -> None:
    export_lora(exported / "lora", tmp_path, CONFIG, FACTS, layers_per_block(model))
    for name in (WEIGHTS_FILE, KOHYA):
        assert (tmp_path / name).read_bytes() == (exported / "export" / name).read_bytes()


def test_missing_adapter_names_the_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dvc repro train_lora"):
        export_lora(tmp_path, tmp_path / "export", CONFIG, {}, 2)


def test_comfyui_lists_the_adapter_under_its_title() -> None:
    assert kohya_file(CONFIG) == KOHYA
