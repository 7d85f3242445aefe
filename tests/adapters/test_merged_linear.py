"""Merged projections against PEFT's own layers."""

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import Tensor, nn

from sdxl_lora.adapters.merged_linear import (
    adjacent_runs,
    cat_columns_or_view,
    cat_or_view,
    is_mergeable,
    pack_adjacent,
    project,
)
from sdxl_lora.runtime.rng import keyed_generator

NAMES = ["to_q", "to_k", "to_v"]


def layers(count: int, bias: bool, dropout: float = 0.0) -> list[nn.Module]:
    """Adapted layers, (24) -> (40), in fp64, rank 4 and alpha 8."""
    parts = {name: nn.Linear(24, 40, bias=bias) for name in NAMES[:count]}
    model = nn.ModuleDict(parts).requires_grad_(False)
    config = PeftConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=NAMES[:count])
    inject_adapter_in_model(config, model)
    for number, parameter in enumerate(model.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=keyed_generator("layer", number)).double()
    return list(model.double().children())


def adapters(parts: list[nn.Module]) -> list[Tensor]:
    return [p for part in parts for p in part.parameters() if p.requires_grad]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("together", [0, 2, 3])
def test_outputs_and_gradients_are_pefts(count: int, bias: bool, together: int) -> None:
    """The first `together` layers are neighbours."""
    parts = layers(count, bias)
    for name in dict(parts[0].named_parameters()) if together else ():
        pack_adjacent([part.get_parameter(name) for part in parts[:together]])
    inputs = torch.randn(2, 5, 24, generator=keyed_generator("x")).double().requires_grad_()
    gradients = [
        torch.randn(2, 5, 40, generator=keyed_generator("dy", number)).double() for number in range(count)
    ]
    expected = [part(inputs) for part in parts]
    outputs = project(parts, inputs)
    wanted = [inputs, *adapters(parts)]
    for ours, theirs in zip(
        (*outputs, *torch.autograd.grad(outputs, wanted, gradients)),
        (*expected, *torch.autograd.grad(expected, wanted, gradients)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_inputs_without_a_gradient_get_none() -> None:
    parts = layers(2, False)
    outputs = project(parts, torch.ones(3, 24).double())
    gradients = torch.autograd.grad([output.sum() for output in outputs], adapters(parts))
    assert all(gradient.any() for gradient in gradients)


def test_adapters_with_dropout_keep_pefts_forward() -> None:
    parts = layers(1, False, dropout=0.5)
    assert not is_mergeable(parts[0])
    inputs = torch.ones(64, 24).double()
    torch.manual_seed(0)
    (ours,) = project(parts, inputs)
    torch.manual_seed(0)
    assert torch.equal(ours, parts[0](inputs))


@pytest.mark.parametrize("bias", [False, True])
def test_neighbours_are_multiplied_together(bias: bool) -> None:
    bases = [nn.Linear(24, 40, bias=bias) for _ in range(5)]
    for first, last in ((0, 2), (2, 4)):
        for tensors in zip(*(base.parameters() for base in bases[first:last]), strict=True):
            pack_adjacent(tensors)
    assert adjacent_runs(bases) == [bases[:2], bases[2:4], bases[4:]]
    assert adjacent_runs(bases[::-1]) == [[base] for base in bases[::-1]]
    pack_adjacent([base.weight for base in bases[:3]])
    assert adjacent_runs([bases[0], bases[2]]) == [[bases[0]], [bases[2]]], "there is one between them"


def test_neighbours_are_one_tensor_without_a_copy() -> None:
    block = torch.arange(24.0).view(6, 4)
    parts = block.chunk(3)
    merged = cat_or_view(parts)
    assert torch.equal(merged, block)
    assert merged.data_ptr() == block.data_ptr()
    for others in ([parts[1], parts[0], parts[2]], [parts[0], parts[2]]):
        copied = cat_or_view(others)
        assert torch.equal(copied, torch.cat(others))
        assert copied.data_ptr() != block.data_ptr()


def test_neighbouring_columns_are_one_tensor_without_a_copy() -> None:
    block = torch.arange(24.0).view(4, 6)
    parts = block.chunk(3, dim=1)
    merged = cat_columns_or_view(parts)
    assert torch.equal(merged, block)
    assert merged.data_ptr() == block.data_ptr()
    mixed = [parts[0], parts[2], parts[1]]
    for others in (mixed, parts[:2], [part.clone() for part in parts]):
        copied = cat_columns_or_view(others)
        assert torch.equal(copied, torch.cat(list(others), dim=1))
        assert copied.untyped_storage()._cdata != block.untyped_storage()._cdata
