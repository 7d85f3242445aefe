from collections.abc import Sequence
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from sdxl_lora.config import AttentionBackend
from sdxl_lora.kernels.attention import (
    AttentionShape,
    attend,
    choose_attention,
    fastest_backend,
    forward_backward,
    random_qkv,
    unusable_because,
)

CPU = torch.device("cpu")
SHAPES = [AttentionShape(2, 64, 64, 3, 16, 5), AttentionShape(2, 64, 7, 3, 16, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_backends_compute_the_paper(shape: AttentionShape, backend: AttentionBackend) -> None:
    query, key, value, _ = random_qkv(shape, torch.float64, CPU)
    scores = torch.einsum("blhd,bshd->bhls", query, key) / shape.width**0.5
    oracle = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), value)
    torch.testing.assert_close(attend(query, key, value, backend), oracle)


def test_wrong_numbers_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def distorted(tensors: Sequence[Tensor], backend: AttentionBackend) -> tuple[Tensor, ...]:
        return tuple(
            tensor * (1.05 if backend == "sdpa" else 1) for tensor in forward_backward(tensors, backend)
        )

    assert unusable_because("sdpa", SHAPES, torch.float32, CPU) is None
    monkeypatch.setattr("sdxl_lora.kernels.attention.forward_backward", distorted)
    assert unusable_because("sdpa", SHAPES, torch.float32, CPU) == "its numbers are off by 5.0%"


def test_auto_is_pytorchs_choice_without_a_gpu() -> None:
    assert choose_attention("auto", SHAPES, torch.float32, CPU) == "sdpa"


@pytest.mark.skipif(find_spec("xformers") is not None, reason="xformers is installed")
def test_missing_xformers_says_what_to_install() -> None:
    message = r"training.attention is 'xformers'.*No module named 'xformers'.*\[xformers\].*set .* to auto"
    with pytest.raises(ValueError, match=message):
        choose_attention("xformers", SHAPES, torch.float32, CPU)


def test_backend_of_a_gpu_is_refused_on_a_cpu_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"training.attention is 'cudnn', which cannot run here \(.+\): set"):
        choose_attention("cudnn", SHAPES, torch.float32, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_auto_takes_one_that_is_right_on_a_gpu(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    shapes = [AttentionShape(3, 1024, 1024, 20, 64, 60), AttentionShape(3, 1024, 77, 20, 64, 60)]
    assert unusable_because(choose_attention("auto", shapes, dtype, device), shapes, dtype, device) is None


def test_fastest_is_taken_with_some_grace_for_triton() -> None:
    assert fastest_backend({"cudnn": 10.0, "flash": 9.0}) == "flash"
    assert fastest_backend({"cudnn": 10.0, "triton": 10.4, "flash": 12.0}) == "triton"
    assert fastest_backend({"cudnn": 10.0, "triton": 10.6}) == "cudnn"
