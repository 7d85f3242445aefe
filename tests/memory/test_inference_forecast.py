from pathlib import Path

import pytest
import torch
from torch import nn

from sdxl_lora.config import load_params
from sdxl_lora.memory.inference_forecast import forecast_inference, trace_inference
from sdxl_lora.models.architecture import read_architecture

META = torch.device("meta")


def test_sdxl_has_its_known_size() -> None:
    """2.567, 0.123 and 0.695 billion parameters in UNet and text encoders, of two bytes each."""
    shapes = read_architecture(load_params(Path("recipes/sdxl-naruto-16gb.yaml")).model)
    modules = [shapes.make_unet("fp16", META), *shapes.make_text_encoders("fp16", META)]
    forecast = forecast_inference(trace_inference(modules, [], lambda: None))
    assert forecast.weights / 2 == pytest.approx(2.567e9 + 0.123e9 + 0.695e9, rel=1e-3)
    assert forecast.activations == 0


def test_memory_of_a_graph_adds_to_that_of_the_rest_of_the_run() -> None:
    """Two sums that share their memory, one after the other, unless a graph keeps that of the first."""

    def product() -> None:
        torch.empty(2**24, device=META).add(1)  # 64 MiB twice

    def both() -> None:
        product()
        product()

    weights = nn.Linear(1024, 1024, device=META)
    trace = trace_inference([weights], [], product, graphed=product)
    kept, shared = forecast_inference(trace), forecast_inference(trace_inference([weights], [], both))
    assert (kept.activations, shared.activations) == (2**28, 2**27)
    assert forecast_inference(trace, budget=kept.total) == kept
    with pytest.raises(MemoryError):
        forecast_inference(trace, budget=shared.total)
