"""What stands for a caption that is left out, against diffusers' pipeline."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdxl_lora.adapters.lora import add_adapters
from sdxl_lora.config import ModelConfig, load_params
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.models.sdxl import load_pipeline
from sdxl_lora.storage.repository import folder_digest
from sdxl_lora.training.denoiser import Denoiser, load_denoiser
from sdxl_lora.training.trainer import Trainer
from tests.support.encoded import write_encoded_dataset

CPU = torch.device("cpu")
PARAMS = load_params(Path("recipes/demo.yaml"))


@pytest.fixture(scope="module", params=[True, False], ids=["zeros", "empty caption"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A base model that reads zeros, or an empty caption, where there is none."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree("demo/base_model", folder)
    index = folder / "model_index.json"
    content = {**json.loads(index.read_text()), "force_zeros_for_empty_prompt": request.param}
    index.write_text(json.dumps(content))
    return PARAMS.model.model_copy(update={"base": str(folder), "revision": folder_digest(folder)})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    return write_encoded_dataset(tmp_path_factory.mktemp("denoising") / "encoded", PARAMS.model)


@pytest.fixture(scope="module")
def unprompted(model: ModelConfig) -> tuple[Tensor, Tensor]:
    """What the pipeline has the UNet read without a prompt."""
    _, prompt_embeds, _, pooled = load_pipeline(model, "fp32", CPU).encode_prompt("a fox", device=CPU)
    return prompt_embeds, pooled


def with_text_encoders(model: ModelConfig, kind: str) -> Denoiser:
    return load_denoiser(model.model_copy(update={"text_encoders": kind}), "fp32", CPU)


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_dropped_captions_are_what_the_pipeline_reads_without_a_prompt(
    model: ModelConfig, dataset: EncodedDataset, unprompted: tuple[Tensor, Tensor], kind: str
) -> None:
    denoiser, batch = with_text_encoders(model, kind), dataset.batch([0, 1, 2])
    caption_mask = torch.tensor([1.0, 0.0, 1.0])
    for found, whole, none in zip(
        denoiser.conditioning(batch, caption_mask), denoiser.conditioning(batch), unprompted, strict=True
    ):
        assert torch.equal(found[[0, 2]], whole[[0, 2]])
        torch.testing.assert_close(found[1], none[0], rtol=0, atol=1e-5)
        assert not torch.allclose(found[1], whole[1], atol=1e-2)


def test_empty_caption_is_embedded_again_when_text_encoders_freeze(
    model: ModelConfig, dataset: EncodedDataset
) -> None:
    denoiser = with_text_encoders(model, "trained_then_frozen")
    add_adapters(denoiser.parts, PARAMS.lora, seed=0)
    changes = {
        "steps": 2,
        "batch_size": 2,
        "warmup_steps": 0,
        "text_encoder_steps": 1,
        "caption_dropout": 1.0,
    }
    config = PARAMS.training.model_copy(
        update={**changes, "micro_batch_size": 2, "text_encoder_learning_rate": 0.1}
    )
    training = Trainer(denoiser, dataset, config, seed=0)
    assert len(list(training)) == 2
    after, empty = training._denoiser.null_conditioning, denoiser.null_conditioning
    if empty is None:
        assert after is None
        return
    assert after is not None
    assert not torch.allclose(after.prompt_embeds, empty.prompt_embeds)
    dropped = torch.zeros(1)
    batch = replace(dataset[0], prompt_embeds=torch.zeros(1), pooled_prompt_embeds=torch.zeros(1))
    torch.testing.assert_close(
        denoiser.conditioning(batch, dropped), (after.prompt_embeds, after.pooled_prompt_embeds)
    )
