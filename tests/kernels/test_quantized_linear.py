"""Quantised layers against the formats' definitions, and against dense layers of the same weights."""

import copy
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.functional import linear

from sdxl_lora.adapters.lora import add_adapters, load_lora, lora_parameters, save_lora
from sdxl_lora.adapters.merged_linear import cat_or_view, project
from sdxl_lora.config import Params, Quantization, TrainingConfig, load_params
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.kernels.quantized_linear import NF4_BLOCK_SIZE, QuantizedLinear, quantize, unpack
from sdxl_lora.models.fused_unet import projections_of_same_input
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.training.batches import training_batches
from sdxl_lora.training.denoiser import Denoiser, load_denoiser
from sdxl_lora.training.train_step import ParameterGroup, TrainStep
from sdxl_lora.training.trainer import StepMetrics, Trainer, denoising_loss, mean_metrics, prepare_modules
from tests.support.encoded import write_encoded_dataset

CPU = torch.device("cpu")
KINDS: list[Quantization] = ["int8", "nf4"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LATENTS = torch.Size((1, 4, 16, 16))
# Dettmers et al. 2023, arXiv:2305.14314, appendix E
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def frozen_linear(bias: bool = True, dtype: torch.dtype = torch.float32, size: int = 128) -> nn.Linear:
    """(size) -> (size + 64), with normal weights."""
    layer = nn.Linear(size, size + 64, bias=bias).requires_grad_(False)
    for number, parameter in enumerate(layer.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=keyed_generator("layer", number)) * 0.05)
    return layer.to(dtype)


def quantised(layer: nn.Module, kind: Quantization, device: torch.device = CPU) -> Any:
    return quantize(copy.deepcopy(layer), kind, device)


def blocks(weight: Tensor) -> Tensor:
    return weight.detach().float().reshape(-1, NF4_BLOCK_SIZE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 0.004, 0.01), ("nf4", 0.08, 0.1)])
def test_error_is_that_of_the_format(
    kind: Quantization, least: float, most: float, dtype: torch.dtype
) -> None:
    layer = frozen_linear(dtype=dtype, size=512)
    packed = quantised(layer, kind)
    assert packed.weight.dtype == dtype
    assert packed.weight.shape == layer.weight.shape
    error = blocks(packed.weight) - blocks(layer.weight)
    assert least < error.norm() / blocks(layer.weight).norm() < most


@pytest.mark.parametrize("size", [32, 96, 128])
def test_nf4_takes_the_nearest_of_its_sixteen_levels(size: int) -> None:
    """Also where a block runs on from one row into the next."""
    layer = frozen_linear(size=size)
    weight, scales = blocks(layer.weight), blocks(layer.weight).abs().amax(dim=1, keepdim=True)
    nearest = (weight[..., None] / scales[..., None] - NF4).abs().argmin(dim=-1)
    torch.testing.assert_close(blocks(quantised(layer, "nf4").weight), NF4[nearest] * scales)


def test_int8_is_off_by_half_a_step_at_most() -> None:
    layer = frozen_linear()
    steps = blocks(layer.weight).abs().amax(dim=1, keepdim=True) / 127
    error = blocks(quantised(layer, "int8").weight) - blocks(layer.weight)
    assert (error.abs() <= steps * 0.5001).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros(kind: Quantization, dtype: torch.dtype) -> None:
    layer = frozen_linear(dtype=dtype)
    layer.weight[3] = 0
    layer.weight[:, 7] = 0
    weight = quantised(layer, kind).weight
    assert not weight[3].any()
    assert not weight[:, 7].any()
    assert weight.isfinite().all()


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.25), ("nf4", 4.25)])
def test_bits_of_a_weight(kind: Quantization, bits: float) -> None:
    packed = quantised(frozen_linear(dtype=torch.bfloat16), kind)
    size = sum(buffer.nbytes for buffer in packed.buffers())
    assert 8 * size / packed.weight.numel() == bits
    assert [name for name, _ in packed.named_parameters()] == ["bias"]


def test_adapters_and_layers_of_broken_blocks_keep_their_precision() -> None:
    model = nn.ModuleList([frozen_linear(), nn.Linear(64, 64), nn.Linear(5, 5).requires_grad_(False)])
    model.append(nn.Conv2d(8, 8, 3).requires_grad_(False))
    quantize(model, "nf4", CPU)
    assert [type(layer) for layer in model] == [QuantizedLinear, nn.Linear, nn.Linear, nn.Conv2d]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_the_dense_one_of_its_weights(kind: Quantization, bias: bool) -> None:
    packed = quantised(frozen_linear(bias), kind)
    x = torch.randn(2, 3, 128, generator=keyed_generator("x")).requires_grad_()
    dy = torch.randn(2, 3, 192, generator=keyed_generator("dy"))
    ours, theirs = packed(x), linear(x, packed.weight, packed.bias)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(output, x, dy)[0] for output in (ours, theirs)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_memory_has_the_shapes(kind: Quantization) -> None:
    meta = torch.device("meta")
    packed = quantised(frozen_linear(dtype=torch.float16).to(meta), kind, meta)
    x = torch.empty(3, 128, device=meta, dtype=torch.float16, requires_grad=True)
    y = packed(x)
    assert y.shape == (3, 192)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.device.type == "meta"
    real = quantised(frozen_linear(dtype=torch.float16), kind)
    assert [b.nbytes for b in packed.buffers()] == [b.nbytes for b in real.buffers()]


@pytest.fixture(scope="module")
def params() -> Params:
    params = load_params(Path("recipes/demo.yaml"))
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0}
    training = {
        "steps": 24,
        "batch_size": 8,
        "accumulation": 1,
        "learning_rate": 1e-2,
        "text_encoder_learning_rate": 1e-3,
        "warmup_steps": 1,
        "ema_decay": None,
        "attention": "sdpa",
    }
    return params.model_copy(
        update={
            "model": params.model.model_copy(update={"text_encoders": "trained"}),
            "lora": params.lora.model_copy(update=lora),
            "training": params.training.model_copy(update=training),
        }
    )


@pytest.fixture(scope="module")
def dataset(params: Params, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    return write_encoded_dataset(tmp_path_factory.mktemp("quantization") / "encoded", params.model)


def adapted(params: Params, kind: Quantization, device: torch.device = CPU) -> Denoiser:
    """The demo's model, text encoders too, with adapters that change something."""
    denoiser = load_denoiser(params.model, "fp32", device, kind)
    add_adapters(denoiser.parts, params.lora, 0)
    for number, parameter in enumerate(adapters(denoiser)):
        if not parameter.any():
            parameter.data = (
                torch.randn(parameter.shape, generator=keyed_generator("b", number)).to(device) * 0.02
            )
    return denoiser


def adapters(denoiser: Denoiser) -> list[nn.Parameter]:
    return [parameter for module in denoiser.modules for parameter in lora_parameters(module)]


def linear_layers(denoiser: Denoiser) -> dict[str, nn.Linear]:
    return {
        f"{number}.{name}": layer
        for number, module in enumerate(denoiser.modules)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }


def loss_and_gradient(denoiser: Denoiser, dataset: EncodedDataset, params: Params) -> tuple[Tensor, Tensor]:
    """Of the first step, by all adapters, flat."""
    for module in denoiser.modules:
        module.train()
    examples = next(training_batches(denoiser, dataset, params.training, seed=0))
    loss = denoising_loss(denoiser, examples, min_snr_gamma=5.0, seeded=False)
    gradients = torch.autograd.grad(loss, adapters(denoiser))
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_a_dense_model_with_the_same_weights(
    params: Params, dataset: EncodedDataset, kind: Quantization, checkpointing: bool
) -> None:
    """Against PEFT's, diffusers' and transformers' own modules."""
    packed, dense = adapted(params, kind), adapted(params, "none")
    for name, layer in linear_layers(packed).items():
        if isinstance(layer, QuantizedLinear):
            linear_layers(dense)[name].weight.data = layer.weight
    plain = adapted(params, "none")
    config = params.training.model_copy(update={"gradient_checkpointing": checkpointing})
    prepare_modules(packed, config, LATENTS)
    (loss, gradient), (dense_loss, dense_gradient), (_, plain_gradient) = (
        loss_and_gradient(denoiser, dataset, params) for denoiser in (packed, dense, plain)
    )
    torch.testing.assert_close(loss, dense_loss)
    assert (gradient - dense_gradient).norm() / dense_gradient.norm() < 1e-5
    assert (gradient - plain_gradient).norm() / plain_gradient.norm() > 1e-3  # the test can tell


@pytest.mark.parametrize("kind", KINDS)
def test_every_frozen_linear_layer_of_the_model_is_quantised(params: Params, kind: Quantization) -> None:
    denoiser = adapted(params, kind)
    for name, layer in linear_layers(denoiser).items():
        assert isinstance(layer, QuantizedLinear) != (".lora_" in name), name
    assert denoiser.unet.dtype == torch.float32


def test_nothing_dense_lives_on_after_the_forward_pass(
    params: Params, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[weakref.ref[Tensor]] = []

    def unpack_and_remember(*arguments: Any) -> Tensor:
        weight = unpack(*arguments)
        written.append(weakref.ref(weight))
        return weight

    for module in ("kernels.quantized_linear", "adapters.merged_linear"):
        monkeypatch.setattr(f"sdxl_lora.{module}.unpack", unpack_and_remember)
    denoiser = adapted(params, "nf4")
    prepare_modules(denoiser, params.training.model_copy(update={"gradient_checkpointing": False}), LATENTS)
    written.clear()
    examples = next(training_batches(denoiser, dataset, params.training, seed=0))
    loss = denoising_loss(denoiser, examples, min_snr_gamma=None, seeded=False)
    forward = len(written)
    assert forward > 30
    assert not any(weight() is not None for weight in written)
    loss.backward()
    assert len(written) > 1.5 * forward
    assert not any(weight() is not None for weight in written)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_projections_are_written_out_without_a_copy(params: Params, kind: Quantization) -> None:
    denoiser = adapted(params, kind)
    prepare_modules(denoiser, params.training, LATENTS)
    attention = denoiser.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    bases = [layer.base_layer for layer in projections_of_same_input(attention)]
    for name in ("codes", "scales"):
        parts = [base.get_buffer(name) for base in bases]
        assert cat_or_view(parts).data_ptr() == parts[0].data_ptr()


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("cpu", "int8"),
        pytest.param("cpu", "nf4", marks=pytest.mark.slow),  # a minute in bitsandbytes' decoder
        *(pytest.param("cuda", kind, marks=pytest.mark.gpu) for kind in KINDS),
    ],
)
def test_training_learns_and_the_adapter_fits_the_base_as_it_is(
    params: Params, dataset: EncodedDataset, kind: Quantization, device: str, tmp_path: Path
) -> None:
    config = params.training
    denoiser = load_denoiser(params.model, "fp32", torch.device(device), kind)
    add_adapters(denoiser.parts, params.lora, 0)
    prepare_modules(denoiser, config, LATENTS)
    frozen = [buffer.clone() for layer in linear_layers(denoiser).values() for buffer in layer.buffers()]
    reports: list[StepMetrics] = list(Trainer(denoiser, dataset, config, 7))
    assert mean_metrics(reports[-6:])["loss"] < 0.9 * mean_metrics(reports[:6])["loss"]
    after = [buffer for layer in linear_layers(denoiser).values() for buffer in layer.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(frozen, after, strict=True))
    save_lora(tmp_path, denoiser.parts)
    base = load_denoiser(params.model, "fp32", CPU)
    before = loss_of(base, dataset, config)
    load_lora(tmp_path, base.parts)
    for ours, theirs in zip(adapters(base), adapters(denoiser), strict=True):
        assert torch.equal(ours, theirs.cpu())
    assert loss_of(base, dataset, config) < 0.9 * before


@torch.no_grad()
def loss_of(denoiser: Denoiser, dataset: EncodedDataset, config: TrainingConfig) -> float:
    examples = next(training_batches(denoiser, dataset, config, seed=1))
    return float(denoising_loss(denoiser, examples, min_snr_gamma=5.0, seeded=False))


@dataclass(frozen=True)
class Tokens:
    """A micro-batch for `attention_network`, (B, 128)."""

    x: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.x]

    def to(self, device: torch.device) -> Self:
        return type(self)(self.x.to(device))


def attention_network(kind: Quantization, device: torch.device) -> nn.ModuleDict:
    """Three merged layers with adapters, then one without, in fp16."""
    layers = {name: frozen_linear(size=128) for name in ("to_q", "to_k", "to_v")}
    layers["out"] = frozen_linear(size=192)
    network = quantize(nn.ModuleDict(layers).half(), kind, device)
    inject_adapter_in_model(PeftConfig(r=4, target_modules=["to_q", "to_k", "to_v"]), network)
    for number, parameter in enumerate(lora_parameters(network)):
        draws = torch.randn(parameter.shape, generator=keyed_generator("lora", number)) * 0.1
        parameter.data = draws.to(device)
    return network


def steps_of(
    kind: Quantization, device: torch.device, recorded: bool, config: TrainingConfig
) -> list[Tensor]:
    """The adapters after six steps."""
    network = attention_network(kind, device)

    def loss(tokens: Tokens) -> Tensor:
        outputs = project([network[name] for name in ("to_q", "to_k", "to_v")], tokens.x.half())
        return network["out"](sum(outputs)).float().square().mean()

    groups = [ParameterGroup(lora_parameters(network), 1e-2)]
    engine: TrainStep[Tokens] = TrainStep(loss, groups, config, torch.float16, recorded)
    for step in range(6):
        engine.accumulate(Tokens(torch.randn(64, 128, generator=keyed_generator("tokens", step)).to(device)))
        engine.update(1.0)
    engine.finish()
    return [parameter.detach().clone() for parameter in lora_parameters(network)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_graph_is_the_eager_step_to_the_bit(params: Params, kind: Quantization) -> None:
    device = torch.device("cuda")
    start = lora_parameters(attention_network(kind, device))
    recorded, eager = (steps_of(kind, device, recorded, params.training) for recorded in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(recorded, eager, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(recorded, start, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "share"), [("int8", 0.75), ("nf4", 0.45)])
def test_memory_falls(kind: Quantization, share: float) -> None:
    """Also while the layers go to the GPU, forward and backward."""
    device = torch.device("cuda")
    model = nn.Sequential(*(nn.Linear(2048, 2048, dtype=torch.float16) for _ in range(64)))
    dense = sum(parameter.nbytes for parameter in model.requires_grad_(False).parameters())
    x = torch.ones(4, 2048, device=device, dtype=torch.float16, requires_grad=True)
    (x @ x.T).sum().backward()  # cuBLAS takes its workspace
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    quantize(model, kind, device)(x).sum().backward()
    assert torch.cuda.max_memory_reserved() - before < share * dense


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_writes_the_weights_that_a_cpu_does(kind: Quantization, dtype: torch.dtype) -> None:
    packed = quantised(frozen_linear(dtype=dtype, size=96), kind)
    expected = packed.weight
    torch.testing.assert_close(packed.to("cuda").weight.cpu(), expected)
