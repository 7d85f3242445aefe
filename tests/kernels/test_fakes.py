"""What operators return on `meta`, which forecasts of memory read, against what their kernels return."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_lora.kernels.attention_ops import _flash_forward, _short_kv_forward
from sdxl_lora.kernels.conv_ops import _group_norm_backward_op, _group_norm_forward_op, _residual_sum_op
from sdxl_lora.kernels.transformer_ops import (
    _add_norm_backward_op,
    _add_norm_forward_op,
    _geglu_backward_op,
    _geglu_forward_op,
)

META = torch.device("meta")
QUERY, KEY = torch.ones(2, 5, 3, 16), torch.ones(2, 7, 3, 16)
ROWS, WIDE, CHANNELS, SHIFT = torch.ones(2, 3, 64), torch.ones(2, 3, 128), torch.ones(64), torch.ones(2, 64)
MEAN, GROUP_MEAN = torch.ones(2, 3), torch.ones(2, 8)
IMAGE = torch.ones(2, 64, 3, 5).contiguous(memory_format=torch.channels_last)
NORM = (GROUP_MEAN, GROUP_MEAN, CHANNELS, CHANNELS, True)


@pytest.mark.parametrize(
    ("operator", "inputs"),
    [
        (_short_kv_forward, (QUERY, KEY, KEY, False)),
        (_flash_forward, (QUERY, KEY, KEY)),
        (_geglu_forward_op, (WIDE,)),
        (_geglu_backward_op, (ROWS, WIDE)),
        (_add_norm_forward_op, (ROWS, ROWS, CHANNELS, CHANNELS, 1e-5)),
        (_add_norm_backward_op, (ROWS, ROWS, ROWS, MEAN, MEAN, CHANNELS)),
        (_group_norm_forward_op, (IMAGE, SHIFT, CHANNELS, CHANNELS, 8, 1e-5, True)),
        (_group_norm_backward_op, (IMAGE, IMAGE, IMAGE, SHIFT, *NORM)),
        (_group_norm_backward_op, (None, IMAGE, IMAGE, None, *NORM)),
        (_residual_sum_op, (IMAGE, IMAGE, CHANNELS)),
    ],
    ids=lambda value: getattr(value, "_name", None),
)
def test_fake_has_the_layout_of_the_kernels_result(
    operator: Callable[..., Any], inputs: tuple[Any, ...], kernel_device: torch.device
) -> None:
    def layouts(device: torch.device) -> list[tuple[torch.Size, tuple[int, ...], torch.dtype]]:
        results = operator(*(value.to(device) if isinstance(value, Tensor) else value for value in inputs))
        tensors = [results] if isinstance(results, Tensor) else results
        return [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]

    assert layouts(META) == layouts(kernel_device)
