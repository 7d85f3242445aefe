"""The kernels on tokens against PyTorch's own operators in float64."""

import pytest
import torch
from torch.nn import functional

from sdxl_lora.kernels.transformer_ops import add_norm, geglu, layer_norm
from tests.support.oracles import DTYPES, draws, relative_error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 2560), (3, 7, 66), (1, 1, 20480)])
def test_geglu_and_its_gradient(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, dy = draws(*shape).to(dtype), draws(*shape[:-1], shape[-1] // 2, key="dy").to(dtype)
    exact = x.double().requires_grad_()
    hidden, gate = exact.chunk(2, dim=-1)
    oracle = hidden * functional.gelu(gate)
    (gradient,) = torch.autograd.grad(oracle, exact, dy.double())
    ours = x.to(device).requires_grad_()
    y = geglu(ours)
    (dx,) = torch.autograd.grad(y, ours, dy.to(device))
    assert y.dtype == dx.dtype == dtype
    assert relative_error(y, oracle) < DTYPES[dtype]
    assert relative_error(dx, gradient) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 1280), (3, 640), (7, 96)])
def test_add_norm_and_its_gradient(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    residual, update = (draws(*shape, key=key).to(dtype) + 3 for key in ("residual", "update"))
    dtotal, dy = (draws(*shape, key=key).to(dtype) for key in ("dtotal", "dy"))
    weight, bias = (draws(shape[-1], key=key).to(dtype) for key in ("weight", "bias"))
    exact = [tensor.double().requires_grad_() for tensor in (residual, update)]
    total = exact[0] + exact[1]
    oracle = functional.layer_norm(total, weight.shape, weight.double(), bias.double(), 1e-5)
    gradients = torch.autograd.grad((total, oracle), exact, (dtotal.double(), dy.double()))
    ours = [tensor.to(device).requires_grad_() for tensor in (residual, update)]
    outputs = add_norm(ours[0], ours[1], weight.to(device), bias.to(device), 1e-5)
    mine = torch.autograd.grad(outputs, ours, (dtotal.to(device), dy.to(device)))
    for value, expected in zip((*outputs, *mine), (total, oracle, *gradients), strict=True):
        assert value.dtype == dtype
        assert relative_error(value, expected) < 3 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 1280), (3, 640), (7, 96)])
def test_layer_norm_and_its_inputs_own_gradient(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = draws(*shape).to(dtype) + 3
    dresidual, dy = (draws(*shape, key=key).to(dtype) for key in ("dx", "dy"))
    weight, bias = (draws(shape[-1], key=key).to(dtype) for key in ("weight", "bias"))
    exact = x.double().requires_grad_()
    oracle = functional.layer_norm(exact, weight.shape, weight.double(), bias.double(), 1e-5)
    (gradient,) = torch.autograd.grad((exact * 1, oracle), exact, (dresidual.double(), dy.double()))
    ours = x.to(device).requires_grad_()
    passed, y = layer_norm(ours, weight.to(device), bias.to(device), 1e-5)
    (dx,) = torch.autograd.grad((passed * 1, y), ours, (dresidual.to(device), dy.to(device)))
    assert torch.equal(passed, ours)
    for value, expected in ((y, oracle), (dx, gradient)):
        assert value.dtype == dtype
        assert relative_error(value, expected) < 3 * DTYPES[dtype]
