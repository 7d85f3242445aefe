from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdxl_lora.adapters.lora import add_adapters, lora_parameters, named_parts
from sdxl_lora.config import Params, load_params
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.models.architecture import SDXL_BASE
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.training.activation_checkpointing import checkpoint_units, find_units
from sdxl_lora.training.batches import TrainingBatch, draw_noise
from sdxl_lora.training.denoiser import Denoiser, load_denoiser
from sdxl_lora.training.trainer import denoising_loss
from tests.support.encoded import write_encoded_dataset

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(Path("recipes/demo.yaml"))


@pytest.fixture(scope="module")
def dataset(params: Params, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    return write_encoded_dataset(tmp_path_factory.mktemp("checkpointing") / "encoded", params.model)


def adapted(params: Params, dropout: float) -> Denoiser:
    """The demo's model with adapters that change what it does, in training."""
    model = params.model.model_copy(update={"text_encoders": "trained"})
    denoiser = load_denoiser(model, "fp32", CPU)
    add_adapters(denoiser.parts, params.lora.model_copy(update={"dropout": dropout}), seed=0)
    for number, parameter in enumerate(adapters(denoiser)):
        parameter.data = torch.randn(parameter.shape, generator=keyed_generator("adapter", number)) * 0.02
    for module in denoiser.modules:
        module.train()
    return denoiser


def adapters(denoiser: Denoiser) -> list[Tensor]:
    return [parameter for module in denoiser.modules for parameter in lora_parameters(module)]


def names_of(denoiser: Denoiser) -> list[str]:
    return list(find_units(denoiser.parts))


def gradients(denoiser: Denoiser, dataset: EncodedDataset) -> tuple[Tensor, ...]:
    batch = dataset.batch([0, 1])
    examples = TrainingBatch(batch, draw_noise(batch, 0, 1000, 0.5, seed=0), images=[], dropout_seed=3)
    loss = denoising_loss(denoiser, examples, min_snr_gamma=5.0, seeded=True)
    return torch.autograd.grad(loss, adapters(denoiser))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("choice", ["all", "every third", "transformers", "resnets", "text encoders"])
def test_gradients_are_bit_identical(
    params: Params, dataset: EncodedDataset, choice: str, dropout: float
) -> None:
    denoiser = adapted(params, dropout)
    expected = gradients(denoiser, dataset)
    names = names_of(denoiser)
    chosen = {
        "all": names,
        "every third": names[::3],
        "transformers": [name for name in names if "transformer_blocks" in name],
        "resnets": [name for name in names if "resnets" in name],
        "text encoders": [name for name in names if name.startswith("text_encoder")],
    }[choice]
    checkpoint_units(denoiser.parts, chosen)
    assert chosen
    assert all(map(torch.equal, gradients(denoiser, dataset), expected))


def test_chosen_units_are_computed_twice_and_no_others(params: Params, dataset: EncodedDataset) -> None:
    denoiser = adapted(params, dropout=0.0)
    units = find_units(denoiser.parts)
    calls: Counter[str] = Counter()
    for name, unit in units.items():
        first = next(iter(unit.children()))
        first.register_forward_hook(lambda *_, name=name: calls.update([name]))
    chosen = [name for name in units if name.startswith("unet")][::2]
    checkpoint_units(denoiser.parts, chosen)
    gradients(denoiser, dataset)
    once = gradients_calls(units.keys() - set(chosen), calls)
    assert {calls[name] // once[kind(name)] for name in chosen} == {2}


def kind(name: str) -> str:
    """What a unit is, from its name."""
    return "transformer" if "transformer_blocks" in name else "resnet" if "resnets" in name else "text"


def gradients_calls(names: set[str], calls: Counter[str]) -> dict[str, int]:
    """How often a forward pass calls the first layer of a unit of each kind."""
    found = {kind(name): calls[name] for name in names}
    assert all(calls[name] == found[kind(name)] for name in names)
    return found


def test_sdxl_has_131_units() -> None:
    parts = named_parts(SDXL_BASE.make_unet("fp16", META), SDXL_BASE.make_text_encoders("fp16", META))
    kinds = Counter((name.partition(".")[0], type(unit).__name__) for name, unit in find_units(parts).items())
    assert kinds == {
        ("unet", "BasicTransformerBlock"): 70,
        ("unet", "ResnetBlock2D"): 17,
        ("text_encoder", "CLIPEncoderLayer"): 12,
        ("text_encoder_2", "CLIPEncoderLayer"): 32,
    }


def test_unknown_unit_is_an_error(params: Params) -> None:
    denoiser = adapted(params, dropout=0.0)
    with pytest.raises(KeyError, match=r"unet\.nothing"):
        checkpoint_units(denoiser.parts, ["unet.nothing"])
