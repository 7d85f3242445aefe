"""The kernels on images against PyTorch's own operators in float64."""

import pytest
import torch
from torch.nn import functional

from sdxl_lora.kernels.conv_ops import frozen_conv2d, group_norm, residual_sum
from tests.support.interpreter import large
from tests.support.oracles import DTYPES, draws, relative_error

LARGE = [pytest.param(shape, marks=large) for shape in ((3, 320, 32, 32), (2, 960, 9, 7), (2, 2560, 4, 4))]
LARGE_SHIFTED = [pytest.param(shape, marks=large) for shape in ((3, 320, 20, 20), (2, 960, 9, 7))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [*LARGE, (1, 96, 130, 2)])
def test_group_norm_and_its_gradient(
    device: torch.device, dtype: torch.dtype, silu: bool, shape: tuple[int, ...]
) -> None:
    """With a mean ten times the deviation, which a naive variance would lose in fp32's digits."""
    x, dy = (draws(*shape) + 10).to(dtype), draws(*shape, key="dy").to(dtype)
    weight, bias = draws(shape[1], key="weight").to(dtype), draws(shape[1], key="bias").to(dtype)
    exact = x.double().requires_grad_()
    oracle = functional.group_norm(exact, 32, weight.double(), bias.double(), 1e-5)
    oracle = functional.silu(oracle) if silu else oracle
    (gradient,) = torch.autograd.grad(oracle, exact, dy.double())
    ours = x.to(device, memory_format=torch.channels_last).requires_grad_()
    _, y = group_norm(ours, weight.to(device), bias.to(device), 32, 1e-5, silu)
    (dx,) = torch.autograd.grad(y, ours, dy.to(device))
    assert y.dtype == dx.dtype == dtype
    assert relative_error(y, oracle) < 3 * DTYPES[dtype]
    assert relative_error(dx, gradient) < 3 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [*LARGE_SHIFTED, (2, 96, 130, 2)])
def test_group_norm_of_a_shifted_image_that_is_read_again(
    device: torch.device, dtype: torch.dtype, silu: bool, shape: tuple[int, ...]
) -> None:
    """Shifts three times the deviation: channels of a group differ in their means."""
    x, shift = draws(*shape).to(dtype), 3 * draws(*shape[:2], key="shift").to(dtype)
    dresidual, dy = (draws(*shape, key=key).to(dtype) for key in ("dx", "dy"))
    weight, bias = draws(shape[1], key="weight").to(dtype), draws(shape[1], key="bias").to(dtype)
    exact = [tensor.double().requires_grad_() for tensor in (x, shift)]
    shifted = exact[0] + exact[1][:, :, None, None]
    oracle = functional.group_norm(shifted, 32, weight.double(), bias.double(), 1e-5)
    oracle = functional.silu(oracle) if silu else oracle
    gradients = torch.autograd.grad((exact[0] * 1, oracle), exact, (dresidual.double(), dy.double()))
    image = x.to(device, memory_format=torch.channels_last)
    ours = [tensor.requires_grad_() for tensor in (image, shift.to(device))]
    passed, y = group_norm(ours[0], weight.to(device), bias.to(device), 32, 1e-5, silu, ours[1])
    mine = torch.autograd.grad((passed * 1, y), ours, (dresidual.to(device), dy.to(device)))
    assert torch.equal(passed, ours[0])
    for value, expected in zip((y, *mine), (oracle, *gradients), strict=True):
        assert value.dtype == dtype
        assert relative_error(value, expected) < 3 * DTYPES[dtype]


def test_group_norm_of_a_picture_as_large_as_the_vaes(device: torch.device) -> None:
    """More pixels than one round of the kernel adds up."""
    x = (draws(1, 32, 190, 190) + 10).half()
    weight, bias = (draws(32, key=key).half() for key in ("weight", "bias"))
    oracle = functional.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5)
    ours = x.to(device, memory_format=torch.channels_last)
    _, y = group_norm(ours, weight.to(device), bias.to(device), 32, 1e-5, silu=False)
    assert relative_error(y, oracle) < 3 * DTYPES[torch.float16]


@pytest.mark.gpu
def test_group_norm_repeats_to_the_bit() -> None:
    x = draws(3, 640, 64, 64).half().to("cuda", memory_format=torch.channels_last)
    weight, bias = torch.ones(2, 640, device="cuda", dtype=torch.half).unbind()
    first, second = (group_norm(x, weight, bias, 32, 1e-5, True)[1] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("cudnn", [True, False], ids=["cudnn", "kernels that give another layout"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (1, 1, 0), (3, 2, 1)])
def test_frozen_convolution_is_pytorchs(
    device: torch.device, cudnn: bool, kernel: int, stride: int, padding: int
) -> None:
    x, weight = draws(2, 8, 16, 16).float(), draws(12, 8, kernel, kernel, key="weight").float()
    bias = draws(12, key="bias").float()
    exact = x.double().requires_grad_()
    oracle = functional.conv2d(exact, weight.double(), bias.double(), stride, padding)
    dy = draws(*oracle.shape, key="dy").float()
    (gradient,) = torch.autograd.grad(oracle, exact, dy.double())
    ours = x.to(device, memory_format=torch.channels_last).requires_grad_()
    weight = weight.to(device, memory_format=torch.channels_last)
    with torch.backends.cudnn.flags(enabled=cudnn):
        y = frozen_conv2d(ours, weight, bias.to(device), (stride, stride), (padding, padding))
        (dx,) = torch.autograd.grad(y, ours, dy.to(device))
    assert relative_error(y, oracle) < 1e-3  # convolutions may compute in tf32
    assert relative_error(dx, gradient) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 320, 16, 16), (3, 7, 5, 3)])
@pytest.mark.parametrize("biased", [False, True])
def test_residual_sum_and_its_gradient(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], biased: bool
) -> None:
    residual, update, dy = (draws(*shape, key=key).to(dtype) for key in ("residual", "update", "dy"))
    bias = draws(shape[1], key="bias").to(dtype) if biased else None
    oracle = residual.double() + update.double()
    oracle = oracle if bias is None else oracle + bias.double()[:, None, None]
    images = [t.to(device, memory_format=torch.channels_last) for t in (residual, update)]
    ours = [image.requires_grad_() for image in images]
    total = residual_sum(ours[0], ours[1], None if bias is None else bias.to(device))
    gradients = torch.autograd.grad(total, ours, dy.to(device))
    assert total.dtype == dtype
    assert relative_error(total, oracle) < DTYPES[dtype]
    assert all(torch.equal(gradient.cpu(), dy) for gradient in gradients)


@pytest.mark.gpu
def test_group_norm_of_a_picture_of_four_million_pixels() -> None:
    """More tiles than a CUDA grid takes on any side but its first, 65,535."""
    x = draws(1, 4, 2048, 2048).half()
    weight, bias = (draws(4, key=key).half() for key in ("weight", "bias"))
    oracle = functional.group_norm(x.double(), 2, weight.double(), bias.double(), 1e-5)
    ours = x.to("cuda", memory_format=torch.channels_last)
    _, y = group_norm(ours, weight.cuda(), bias.cuda(), 2, 1e-5, silu=False)
    assert relative_error(y, oracle) < 3 * DTYPES[torch.float16]
