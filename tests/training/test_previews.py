from pathlib import Path

import pytest
import torch

from sdxl_lora.adapters.lora import add_adapters, lora_parameters
from sdxl_lora.config import load_params
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.training.denoiser import load_denoiser
from sdxl_lora.training.previews import Previewer
from tests.support.encoded import write_encoded_dataset


@pytest.fixture
def previewer(tmp_path: Path) -> Previewer:
    """Of a training whose adapters do something and drop half of their inputs."""
    params = load_params(Path("recipes/demo.yaml"))
    write_encoded_dataset(tmp_path / "encoded", params.model)
    denoiser = load_denoiser(params.model, "fp32", torch.device("cpu"))
    add_adapters(denoiser.parts, params.lora.model_copy(update={"dropout": 0.5}), seed=0)
    torch.manual_seed(0)
    for module in denoiser.modules:
        module.train()
        for parameter in lora_parameters(module):
            parameter.data = 0.1 * torch.randn_like(parameter)
    return Previewer(denoiser, EncodedDataset(tmp_path / "encoded", "held_out"), params.model)


def test_previews_of_equal_weights_are_equal_whatever_is_dropped(previewer: Previewer) -> None:
    first = previewer.generate()
    torch.manual_seed(1)
    assert previewer.generate() == first


def test_training_mode_is_restored_after_a_preview(previewer: Previewer) -> None:
    previewer.generate()
    assert all(part.training for module in previewer._denoiser.modules for part in module.modules())


def test_previews_show_the_adapter(previewer: Previewer) -> None:
    before = previewer.generate()
    for module in previewer._denoiser.modules:
        for parameter in lora_parameters(module):
            parameter.data.zero_()
    assert previewer.generate() != before
