"""Triton's interpreter, which runs kernels on a CPU, with NumPy, for the tests of ours.

Triton looks for `TRITON_INTERPRET=1` as it is imported, so a session of pytest has it from the start or not
at all. It runs one program after the other: what threads of a GPU do to each other shows on a GPU alone.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DEVICES = [
    pytest.param("interpreter", marks=pytest.mark.interpreter)
    if INTERPRETED
    else pytest.param("cuda", marks=pytest.mark.gpu)
]
large = pytest.mark.skipif(INTERPRETED, reason="the interpreter would take long")
no_bf16_products = pytest.mark.skipif(INTERPRETED, reason="Triton 3.7.1's interpreter multiplies bf16's bits")


def torch_device(name: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of that name; the interpreter's is the CPU, which is then given our kernels as a GPU is."""
    if name != "interpreter":
        return torch.device(name)
    for module in ("kernels.transformer_ops", "kernels.conv_ops", "models.fused_blocks"):
        monkeypatch.setattr(f"sdxl_lora.{module}.uses_triton", lambda _: True)
    monkeypatch.setattr("sdxl_lora.kernels.attention_ops.supports_triton", lambda _: True)
    return torch.device("cpu")
