"""The logged model as MLflow's own `diffusers` flavour loads it."""

import socket
from pathlib import Path
from typing import NoReturn

import mlflow
import pytest
import torch
from mlflow.models import Model

from sdxl_lora.adapters.lora_file import WEIGHTS_FILE
from sdxl_lora.config import Params, load_params
from sdxl_lora.inference.sampling import load_adapter
from sdxl_lora.models.sdxl import load_pipeline
from sdxl_lora.tracking.logged_model import write_model
from tests.support.adapters import write_adapter


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(Path("recipes/demo.yaml"))


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("_no_network")
def test_mlflow_draws_what_the_pipeline_draws(params: Params, tmp_path: Path) -> None:
    write_adapter(tmp_path, params.model, params.lora)
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(folder, Model(), params.model, params.sampling, tmp_path / WEIGHTS_FILE)
    plain = load_pipeline(params.model, "fp32", torch.device("cpu"))
    load_adapter(plain, tmp_path)
    loaded = mlflow.diffusers.load_model(str(folder)).load_pipeline(torch_dtype=torch.float32, device="cpu")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"}
    expected, found = (p("a lamp", latents=latents, **options).images for p in (plain, loaded))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.usefixtures("_no_network")
def test_base_model_of_the_hub_is_pinned_as_in_params(tmp_path: Path) -> None:
    params = load_params(Path("recipes/sdxl-naruto-16gb.yaml"))
    (tmp_path / "weights").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(folder, Model(), params.model, params.sampling, tmp_path / "weights")
    adapter = mlflow.diffusers.load_model(str(folder))
    assert (adapter.base_model, adapter.base_model_revision) == (params.model.base, params.model.revision)
    signature = Model.load(str(folder)).signature
    defaults = {param.name: param.default for param in signature.params.params}
    assert (defaults["height"], defaults["width"]) == (1024, 1024)
    assert defaults["num_inference_steps"] == params.sampling.num_inference_steps
    assert "torch==" in (folder / "requirements.txt").read_text()
