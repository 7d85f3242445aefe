import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sdxl_lora.adapters.lora import add_adapters, load_lora, lora_parameters, save_lora
from sdxl_lora.config import LoraConfig, ModelConfig, Params, TrainingConfig, load_params
from sdxl_lora.data.batch_sampler import batch_order
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.kernels.cuda_graph import GraphedCallable
from sdxl_lora.runtime.device import deterministic_kernels
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.training import trainer
from sdxl_lora.training.activation_checkpointing import find_units
from sdxl_lora.training.batches import draw_noise, training_batches
from sdxl_lora.training.denoiser import Denoiser, load_denoiser, with_captions_embedded
from sdxl_lora.training.trainer import (
    StepMetrics,
    Trainer,
    learning_rate_factor,
    loss_curve,
    mean_metrics,
    prepare_modules,
    summarise,
)
from tests.support.encoded import write_encoded_dataset

CPU = torch.device("cpu")
SEED = 7
EPSILON = 2.0**-24
"""Relative error of one fp32 rounding."""
FP32_PASS = 2e-5
"""Relative error of fp32 losses and gradients at equal weights, if their sums are taken in another order.

A sum of n products is off by some sqrt(n) EPSILON: n is 1,000 here, so by 2e-6. The errors of the 100 layers
that a value goes through add up at random, to sqrt(100) times that. Measured: losses 3e-7, gradients 5e-6.
"""
LATENTS = torch.Size((1, 4, 16, 16))


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(Path("recipes/demo.yaml"))


@pytest.fixture(scope="module")
def dataset(params: Params, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    return write_encoded_dataset(tmp_path_factory.mktemp("training") / "encoded", params.model)


@pytest.fixture(params=["frozen", "trained"])
def model(params: Params, request: pytest.FixtureRequest) -> ModelConfig:
    return params.model.model_copy(update={"text_encoders": request.param})


@pytest.fixture
def freezing(params: Params) -> ModelConfig:
    return params.model.model_copy(update={"text_encoders": "trained_then_frozen"})


@pytest.fixture
def lora(params: Params) -> LoraConfig:
    return params.lora.model_copy(update={"rank": 4, "alpha": 8.0, "dropout": 0.0})


@pytest.fixture
def config(params: Params) -> TrainingConfig:
    return params.training.model_copy(
        update={
            "steps": 4,
            "batch_size": 2,
            "micro_batch_size": "auto",
            "optimizer": "adamw",
            "learning_rate": 1e-2,
            "text_encoder_learning_rate": 1e-3,
            "warmup_steps": 1,
            "schedule": "cosine",
            "ema_decay": None,
            "max_grad_norm": 0.1,
            "min_snr_gamma": 5.0,
            "caption_dropout": 0.5,
            "text_encoder_steps": None,
        }
    )


def with_(config: TrainingConfig, **changes: Any) -> TrainingConfig:
    return config.model_copy(update=changes)


def adapted(model: ModelConfig, lora: LoraConfig) -> Denoiser:
    denoiser = load_denoiser(model, "fp32", CPU)
    add_adapters(denoiser.parts, lora, SEED)
    return denoiser


def trained(
    model: ModelConfig, lora: LoraConfig, dataset: EncodedDataset, config: TrainingConfig
) -> tuple[Denoiser, list[StepMetrics]]:
    denoiser = adapted(model, lora)
    prepare_modules(denoiser, config, LATENTS)
    return denoiser, list(Trainer(denoiser, dataset, config, SEED))


def weights(denoiser: Denoiser) -> list[Tensor]:
    return [p.detach().clone() for module in denoiser.modules for p in lora_parameters(module)]


def embeds(dataset: EncodedDataset) -> list[Tensor]:
    """Prompt embeddings and pooled ones of all examples."""
    batch = dataset.batch(range(len(dataset)))
    assert batch.prompt_embeds is not None
    assert batch.pooled_prompt_embeds is not None
    return [batch.prompt_embeds, batch.pooled_prompt_embeds]


def frozen_weights(denoiser: Denoiser) -> Iterator[Tensor]:
    for module in denoiser.modules:
        yield from (p.detach() for p in module.parameters() if not p.requires_grad)


@contextmanager
def kept_gradients() -> Iterator[list[list[Tensor | None]]]:
    """Keeps, for each step of any optimizer, the gradients that it is given: a flat one for each group."""
    kept: list[list[Tensor | None]] = []

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        kept.append([None if gradient is None else gradient.clone() for gradient in gradients])

    handle = register_optimizer_step_pre_hook(keep)
    yield kept
    handle.remove()


@pytest.mark.parametrize(
    ("text_encoders", "text_encoder_steps"),
    [("frozen", None), ("trained", None), ("trained_then_frozen", 1), ("trained_then_frozen", 2)],
)
def test_step_is_that_of_torch_alone(
    params: Params,
    lora: LoraConfig,
    dataset: EncodedDataset,
    config: TrainingConfig,
    text_encoders: str,
    text_encoder_steps: int | None,
) -> None:
    """Against the textbook: PEFT's modules, torch's AdamW, the loss written out, text encoders always run.

    AdamW divides a gradient by its size: where one is nearly 0, rounding decides which way a weight moves by
    a whole rate. So gradients are compared with autograd's, and then torch's AdamW is given ours.
    """
    model = params.model.model_copy(update={"text_encoders": text_encoders})
    config = with_(config, text_encoder_steps=text_encoder_steps)
    with kept_gradients() as kept:
        ours, reports = trained(model, lora, dataset, config)
    denoiser = adapted(model, lora)
    unet = denoiser.unet
    parts = [lora_parameters(module) for module in denoiser.modules]
    adapted_text = [p for part in parts[1:] for p in part]
    optimizer = torch.optim.AdamW(
        [{"params": part, "lr": 0.0} for part in parts], betas=config.betas, weight_decay=config.weight_decay
    )
    parameters = [p for part in parts for p in part]
    order = torch.randperm(8, generator=keyed_generator(SEED, "order", 0))
    alphas = denoiser.noise_schedule.alphas_cumprod
    assert len(kept) == config.steps
    for step in range(config.steps):
        if step == text_encoder_steps:
            for parameter in adapted_text:
                parameter.requires_grad_(False)
        factor = learning_rate_factor(step, config)
        for group, rate in zip(optimizer.param_groups, [1e-2, 1e-3, 1e-3], strict=False):
            group["lr"] = factor * rate
        batch = dataset.batch(order[2 * step : 2 * step + 2].tolist())
        random = draw_noise(batch, 2 * step, 1000, config.caption_dropout, SEED)
        prompt_embeds, pooled = denoiser.conditioning(batch, random.caption_mask)
        alpha = alphas[random.timesteps].view(-1, 1, 1, 1)
        prediction = unet(
            alpha.sqrt() * random.latents + (1 - alpha).sqrt() * random.noise,
            random.timesteps,
            prompt_embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": batch.time_ids.float()},
        ).sample
        weight = (5.0 * (1 - alpha) / alpha).clamp(max=1.0)
        assert config.min_snr_gamma == 5.0
        loss = (weight * (prediction - random.noise) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        assert reports[step].loss == pytest.approx(loss.item(), rel=FP32_PASS)
        assert reports[step].grad_norm == pytest.approx(norm.item(), rel=FP32_PASS)
        for part, gradient in zip(parts, kept[step], strict=True):
            expected = [parameter.grad.flatten() for parameter in part if parameter.grad is not None]
            assert (gradient is None) == (not expected)
            if gradient is not None:
                theirs = torch.cat(expected)
                assert (gradient - theirs).norm() <= FP32_PASS * theirs.norm()
                for parameter, flat in zip(part, gradient.split([p.numel() for p in part]), strict=True):
                    parameter.grad = flat.view_as(parameter)
        optimizer.step()
    for mine, other in zip(weights(ours), weights(denoiser), strict=True):
        # Equal gradients: a dozen roundings a step, of weights near 1 and of updates of about a rate, 1e-2.
        error = 12 * config.steps * EPSILON
        torch.testing.assert_close(mine, other, rtol=error, atol=1e-2 * error)


def test_training_changes_lora_weights_alone(
    model: ModelConfig, lora: LoraConfig, dataset: EncodedDataset, config: TrainingConfig
) -> None:
    untrained = adapted(model, lora)
    denoiser, _ = trained(model, lora, dataset, config)
    before, after = frozen_weights(untrained), frozen_weights(denoiser)
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))
    pairs = zip(weights(untrained), weights(denoiser), strict=True)
    assert not any(torch.equal(b, a) for b, a in pairs)


def test_same_seed_gives_a_bit_identical_adapter(
    model: ModelConfig, lora: LoraConfig, dataset: EncodedDataset, config: TrainingConfig
) -> None:
    config, lora = with_(config, optimizer="adamw_8bit"), lora.model_copy(update={"dropout": 0.3})
    first, second = (trained(model, lora, dataset, config)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A GPU with deterministic kernels."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with deterministic_kernels(True):
        yield torch.device("cuda")


def trained_on_gpu(
    model: ModelConfig,
    lora: LoraConfig,
    dataset: EncodedDataset,
    config: TrainingConfig,
    device: torch.device,
    checkpointing: bool = False,
    use_graph: bool = True,
) -> tuple[Denoiser, list[StepMetrics]]:
    denoiser = load_denoiser(model, config.precision, device)
    add_adapters(denoiser.parts, lora, SEED)
    units = find_units(denoiser.parts) if checkpointing else ()
    prepare_modules(denoiser, config, LATENTS, units)
    with graphs_if(use_graph):
        return denoiser, list(Trainer(denoiser, dataset, config, SEED))


@contextmanager
def graphs_if(use_graph: bool) -> Iterator[None]:
    """Makes the step run eagerly on a GPU, too, unless `use_graph`."""
    with pytest.MonkeyPatch.context() as patch:
        if not use_graph:
            patch.setattr(GraphedCallable, "has", lambda *_: True)
            patch.setattr(
                GraphedCallable, "replay", lambda self, inputs: self._function(inputs.to(self._device))
            )
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_replayed_steps_are_bit_identical_to_eager_ones(
    model: ModelConfig,
    lora: LoraConfig,
    dataset: EncodedDataset,
    config: TrainingConfig,
    cuda: torch.device,
    precision: str,
    checkpointing: bool,
) -> None:
    config = with_(config, precision=precision, optimizer="adamw_8bit")
    eager, reports = trained_on_gpu(model, lora, dataset, config, cuda, checkpointing, use_graph=False)
    replayed, again = trained_on_gpu(model, lora, dataset, config, cuda, checkpointing)
    twice, _ = trained_on_gpu(model, lora, dataset, config, cuda, checkpointing)
    assert [(r.loss, r.grad_norm) for r in reports] == [(r.loss, r.grad_norm) for r in again]
    for other in (replayed, twice):
        assert all(torch.equal(a, b) for a, b in zip(weights(eager), weights(other), strict=True))
    assert {weight.dtype for weight in weights(eager)} == {torch.float32}


@pytest.mark.gpu
def test_two_hundred_steps_follow_mixed_precision_training_as_usually_done(
    params: Params, lora: LoraConfig, dataset: EncodedDataset, config: TrainingConfig, cuda: torch.device
) -> None:
    """Against autocast, fp32 adapters in PEFT's own layers, a gradient scaler and torch's AdamW.

    The curves are those of learning: on the same draws, adapters that stay as they are lose twice as much.
    Early and late steps cannot be compared, as each has other timesteps.
    """
    model = params.model.model_copy(update={"text_encoders": "trained"})
    config = with_(config, steps=200, precision="fp16", learning_rate=1e-3, warmup_steps=10)
    _, reports = trained_on_gpu(model, lora, dataset, config, cuda)
    denoiser = load_denoiser(model, "fp16", cuda)
    add_adapters(denoiser.parts, lora, SEED)
    assert denoiser.text_encoders is not None
    rates = [config.learning_rate, *[config.text_encoder_learning_rate] * 2]
    groups = [{"params": lora_parameters(m)} for m in denoiser.modules]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, weight_decay=config.weight_decay)
    parameters = [p for group in groups for p in group["params"]]
    scaler = torch.amp.GradScaler("cuda")
    alphas, losses = denoiser.noise_schedule.alphas_cumprod, []
    for step in range(config.steps):
        indices = next(batch_order(dataset.latents_shapes, 2, SEED, step))
        random = draw_noise(dataset.batch(indices), 2 * step, 1000, config.caption_dropout, SEED).to(cuda)
        with torch.autocast("cuda", torch.float16):
            errors = denoiser.per_example_mse(
                dataset.batch(indices).to(cuda),
                random.latents,
                random.noise,
                random.timesteps,
                random.caption_mask,
            )
        weight = (5.0 * (1 - alphas) / alphas).clamp(max=1.0)[random.timesteps]
        loss = (weight * errors).mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * learning_rate_factor(step, config)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    ours = torch.tensor([report.loss for report in reports]).view(10, 20).mean(1)
    theirs = torch.tensor(losses).view(10, 20).mean(1)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.0)
    still = with_(config, learning_rate=1e-12, text_encoder_learning_rate=1e-12)
    _, reports = trained_on_gpu(model, lora, dataset, still, cuda)
    untrained = torch.tensor([report.loss for report in reports]).view(10, 20).mean(1)
    assert (ours / untrained)[1:].max() < 0.7  # 0.46 to 0.57 in fp32 on a CPU


def test_accumulation_equals_a_larger_batch(
    model: ModelConfig, lora: LoraConfig, dataset: EncodedDataset, config: TrainingConfig
) -> None:
    """At adapters that change something and, as AdamW would enlarge rounding, do not move."""
    still = with_(config, batch_size=4, learning_rate=0.0, text_encoder_learning_rate=0.0)
    runs = []
    for micro_batch_size in ("auto", 2):
        denoiser = adapted(model, lora)
        with torch.no_grad():
            parameters = [p for module in denoiser.modules for p in lora_parameters(module)]
            for number, parameter in enumerate(parameters):
                parameter.add_(
                    0.05 * torch.randn(parameter.shape, generator=keyed_generator("moved", number))
                )
        with kept_gradients() as kept:
            steps = Trainer(denoiser, dataset, with_(still, micro_batch_size=micro_batch_size), SEED)
            runs.append(([(r.loss, r.grad_norm) for r in steps], kept))
    (reports, gradients), (part_reports, part_gradients) = runs
    for whole, parts in zip(reports, part_reports, strict=True):
        assert parts == pytest.approx(whole, rel=FP32_PASS)
    for step, part_step in zip(gradients, part_gradients, strict=True):
        for gradient, of_parts in zip(step, part_step, strict=True):
            assert gradient is not None
            assert of_parts is not None
            assert (of_parts - gradient).norm() <= FP32_PASS * gradient.norm()
    assert any(gradient.any() for gradient in gradients[0] if gradient is not None)


def test_loss_falls_on_examples_seen_again_and_again(
    model: ModelConfig, lora: LoraConfig, dataset: EncodedDataset, config: TrainingConfig
) -> None:
    config = with_(config, steps=24, batch_size=8, optimizer="adamw_8bit", max_grad_norm=1.0)
    _, reports = trained(model, lora, dataset, config)
    first, last = mean_metrics(reports[:6]), mean_metrics(reports[-6:])
    assert last["loss"] < 0.9 * first["loss"]


def test_bf16_trains_fp32_adapters(
    model: ModelConfig, lora: LoraConfig, dataset: EncodedDataset, config: TrainingConfig
) -> None:
    denoiser = load_denoiser(model, "bf16", CPU)
    add_adapters(denoiser.parts, lora, SEED)
    config = with_(config, steps=2)
    reports = list(Trainer(denoiser, dataset, with_(config, precision="bf16"), SEED))
    _, exact = trained(model, lora, dataset, config)
    assert {weight.dtype for weight in weights(denoiser)} == {torch.float32}
    assert {weight.dtype for weight in frozen_weights(denoiser)} == {torch.bfloat16}
    assert [r.loss for r in reports] == pytest.approx([r.loss for r in exact], rel=0.1)


def test_moving_average_is_saved_in_place_of_the_last_weights(
    model: ModelConfig, lora: LoraConfig, dataset: EncodedDataset, config: TrainingConfig
) -> None:
    denoiser = adapted(model, lora)
    average, trajectory = weights(denoiser), []
    steps = iter(Trainer(denoiser, dataset, with_(config, ema_decay=0.3), SEED))
    for step, _ in enumerate(steps):
        trajectory.append(weights(denoiser))
        decay = min(0.3, (step + 1) / (step + 10))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, trajectory[-1], strict=True)]
    torch.testing.assert_close(weights(denoiser), average)
    assert not torch.equal(weights(denoiser)[0], trajectory[-1][0])


def test_text_encoders_train_to_their_last_step_as_if_never_to_be_frozen(
    params: Params, freezing: ModelConfig, lora: LoraConfig, dataset: EncodedDataset, config: TrainingConfig
) -> None:
    config, runs = with_(config, optimizer="adamw_8bit", ema_decay=0.9), []
    for model, steps in ((params.model.model_copy(update={"text_encoders": "trained"}), None), (freezing, 2)):
        denoiser = adapted(model, lora)
        reports = islice(Trainer(denoiser, dataset, with_(config, text_encoder_steps=steps), SEED), 2)
        losses = [(report.loss, report.grad_norm) for report in reports]
        runs.append((losses, weights(denoiser)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_frozen_text_encoders_keep_the_adapters_that_embedded_the_captions(
    freezing: ModelConfig,
    lora: LoraConfig,
    dataset: EncodedDataset,
    config: TrainingConfig,
    ema_decay: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where an average is saved, in half precision, with dropout: what is loaded embeds them alike."""
    embedded: list[EncodedDataset] = []

    def spy(denoiser: Denoiser, dataset: EncodedDataset) -> EncodedDataset:
        embedded.append(with_captions_embedded(denoiser, dataset))
        return embedded[0]

    monkeypatch.setattr(trainer, "with_captions_embedded", spy)
    changes = {"text_encoder_steps": 2, "ema_decay": ema_decay, "batch_size": 4, "micro_batch_size": 2}
    config = with_(config, precision="bf16", **changes)
    denoiser = load_denoiser(freezing, "bf16", CPU)
    add_adapters(denoiser.parts, lora.model_copy(update={"dropout": 0.2}), SEED)
    path = [weights(denoiser) for _ in Trainer(denoiser, dataset, config, SEED)]
    num_unet = len(lora_parameters(denoiser.unet))
    assert not any(torch.equal(a, b) for a, b in zip(path[0], path[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(path[1][num_unet:], path[3][num_unet:], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(path[1][:num_unet], path[3][:num_unet], strict=True))
    save_lora(tmp_path, denoiser.parts)
    loaded = load_denoiser(freezing, "bf16", CPU)
    load_lora(tmp_path, loaded.parts)
    again = with_captions_embedded(loaded, dataset)
    assert len(embedded) == 1
    assert all(torch.equal(a, b) for a, b in zip(embeds(embedded[0]), embeds(again), strict=True))
    assert not any(torch.equal(a.float(), b) for a, b in zip(embeds(again), embeds(dataset), strict=True))


def test_no_example_and_no_draw_shifts_when_the_text_encoders_freeze(
    freezing: ModelConfig, lora: LoraConfig, dataset: EncodedDataset, config: TrainingConfig
) -> None:
    """Nothing moves: the learning rates are 0, so losses are those of text encoders that never freeze."""
    still = with_(config, steps=5, micro_batch_size=1, learning_rate=0.0, text_encoder_learning_rate=0.0)
    _, reports = trained(freezing, lora, dataset, still)
    _, frozen_reports = trained(freezing, lora, dataset, with_(still, text_encoder_steps=3))
    assert [r.loss for r in frozen_reports] == pytest.approx([r.loss for r in reports], rel=FP32_PASS)
    assert len({r.loss for r in reports}) == 5


def test_loss_that_is_not_finite_stops_and_names_the_images(
    params: Params, lora: LoraConfig, dataset: EncodedDataset, config: TrainingConfig
) -> None:
    denoiser = adapted(params.model.model_copy(update={"text_encoders": "frozen"}), lora)
    steps = iter(Trainer(denoiser, dataset, config, SEED))
    next(steps)
    with torch.no_grad():
        lora_parameters(denoiser.unet)[0].fill_(float("nan"))
    images = next(training_batches(denoiser, dataset, config, SEED, first=1)).images
    expected = f"loss is nan at step 2, on the images {images[0]}, {images[1]}:"
    with pytest.raises(FloatingPointError, match=re.escape(expected)):
        next(steps)


def test_missing_embeddings_name_the_stage_to_run(
    params: Params, lora: LoraConfig, dataset: EncodedDataset
) -> None:
    denoiser = adapted(params.model.model_copy(update={"text_encoders": "frozen"}), lora)
    batch = dataset[0]
    bare = type(batch)(batch.latents_mean, batch.latents_std, batch.token_ids, batch.time_ids, None, None)
    with pytest.raises(ValueError, match="dvc repro encode_dataset"):
        denoiser.conditioning(bare)


def test_draws_belong_to_positions_not_to_batches(dataset: EncodedDataset) -> None:
    whole = draw_noise(dataset.batch(range(4)), 10, 1000, 0.5, SEED)
    parts = [draw_noise(dataset.batch(pair), 10 + pair[0], 1000, 0.5, SEED) for pair in ((0, 1), (2, 3))]
    assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))
    assert torch.equal(whole.noise, torch.cat([part.noise for part in parts]))
    assert torch.equal(whole.timesteps, torch.cat([part.timesteps for part in parts]))


def test_draws_have_the_distributions_they_claim(dataset: EncodedDataset) -> None:
    batch = dataset.batch([0] * 400)
    random = draw_noise(batch, 0, 1000, 0.25, SEED)
    residual = (random.latents - batch.latents_mean) / batch.latents_std
    assert residual.std().item() == pytest.approx(1, abs=0.01)
    assert random.noise.std().item() == pytest.approx(1, abs=0.01)
    assert (residual * random.noise).mean().item() == pytest.approx(0, abs=0.01)
    assert random.timesteps.float().mean().item() == pytest.approx(499.5, abs=45)
    assert random.caption_mask.mean().item() == pytest.approx(0.75, abs=0.07)


def test_learning_rate_rises_linearly_then_falls_along_a_cosine(config: TrainingConfig) -> None:
    config = with_(config, steps=104, warmup_steps=4)
    factors = [learning_rate_factor(step, config) for step in range(104)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[54] == pytest.approx(0.5)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 1e-3


def test_constant_schedule_stays_at_the_peak(config: TrainingConfig) -> None:
    config = with_(config, schedule="constant", warmup_steps=0)
    assert {learning_rate_factor(step, config) for step in range(4)} == {1.0}


def test_loss_curve_averages_over_windows() -> None:
    reports = [StepMetrics(step, float(step), 1.0, 0.1, 1.0, 0.5) for step in range(1, 6)]
    curve = loss_curve(reports, 2)
    assert curve["step"].tolist() == [2, 4, 5]
    assert curve["loss"].tolist() == [1.5, 3.5, 5.0]


def test_summary_counts_what_was_trained(params: Params, lora: LoraConfig, config: TrainingConfig) -> None:
    denoiser = adapted(params.model.model_copy(update={"text_encoders": "trained"}), lora)
    reports = [StepMetrics(step, float(step), 1.0, 0.1, 1.0, 0.5) for step in range(1, 5)]
    summary = summarise(reports, denoiser, config)
    assert summary["trainable_parameters"] == sum(weight.numel() for weight in weights(denoiser)) > 0
    assert summary["final_loss"] == 4.0
    assert summary["seconds"] == 2.0
    assert summary["examples_per_second"] == 4.0
    assert summary["peak_memory_gib"] > 0.1
