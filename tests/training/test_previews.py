from pathlib import Path

import pytest
import torch

from sdxl_lora.adapters.lora import add_adapters, lora_parameters
from sdxl_lora.config import load_params
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.models.vae import tile_vae
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


def test_vae_decodes_tiles_whatever_its_config_says(previewer: Previewer) -> None:
    vae = previewer._pipeline.vae
    vae.register_to_config(sample_size=1024)  # as SDXL's
    assert vae.tile_sample_min_size == 512
    tile_vae(vae, 32)
    sides: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: sides.append(max(inputs[0].shape[2:])))
    previewer.generate()
    assert len(sides) > 1
    assert max(sides) <= vae.tile_latent_min_size


def test_preview_that_fails_is_a_warning(
    previewer: Previewer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nDetails")

    monkeypatch.setattr(previewer._pipeline.vae, "decode", fail)
    assert previewer.save_or_warn(tmp_path / "step-000001.png") is None
    assert list(tmp_path.glob("*.png")) == []
    assert "no preview step-000001.png (CUDA out of memory. Tried to allocate 2.00 GiB.)" in caplog.text
    assert all(part.training for module in previewer._denoiser.modules for part in module.modules())


def test_previews_show_the_adapter(previewer: Previewer) -> None:
    before = previewer.generate()
    for module in previewer._denoiser.modules:
        for parameter in lora_parameters(module):
            parameter.data.zero_()
    assert previewer.generate() != before
