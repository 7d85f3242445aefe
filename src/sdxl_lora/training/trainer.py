"""Fine-tuning the adapters: the loop, and what one step is made of. Knows no file, no log and no tracker."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from statistics import fmean
from time import perf_counter

import pandas as pd
import torch
from torch import Tensor, nn

from sdxl_lora.adapters.lora import lora_parameters, named_parts
from sdxl_lora.config import AttentionBackend, TrainingConfig
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.kernels.attention import choose_attention
from sdxl_lora.models.diffusion import min_snr_weight
from sdxl_lora.models.fused_text_encoder import fuse_text_encoder
from sdxl_lora.models.fused_unet import attention_shapes, fuse_unet
from sdxl_lora.models.loading import DTYPES
from sdxl_lora.runtime.device import peak_memory_gib
from sdxl_lora.runtime.distributed import distributed_state
from sdxl_lora.training.activation_checkpointing import checkpoint_units
from sdxl_lora.training.batches import TrainingBatch, one_batch_per_size, training_batches
from sdxl_lora.training.denoiser import Denoiser, embed_null_conditioning, with_captions_embedded
from sdxl_lora.training.train_step import ParameterGroup, TrainStep


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did."""

    step: int
    """1 for the first."""
    loss: float
    """Weighted denoising loss, averaged over the step's examples."""
    grad_norm: float
    """Euclidean norm, before clipping, of the gradients of all adapters that are still trained."""
    learning_rate: float
    """Of the UNet's adapters."""
    loss_scale: float
    """Factor of fp16 loss scaling; 1 in other precisions."""
    seconds: float
    """Wall time of the step."""


class NotFiniteError(FloatingPointError):
    """A step whose loss or gradient is no number, with all that it was made from."""

    def __init__(self, message: str, report: StepMetrics, examples: Sequence[TrainingBatch]) -> None:
        super().__init__(message)
        self.report = report
        self.examples = examples


class Trainer(Iterable[StepMetrics]):
    """Trains the adapters of a denoiser in place and reports each step; they hold the result at the end.

    Between two steps it has a state. Another process that loads it goes on to the same result, to the bit:
    every draw is a function of the seed and a position, and the position is the number of steps done.
    """

    def __init__(
        self, denoiser: Denoiser, dataset: EncodedDataset, config: TrainingConfig, seed: int
    ) -> None:
        self.history: list[StepMetrics] = []
        """Of the steps that are done, those before a resume included."""
        self._denoiser, self._dataset = denoiser, dataset
        self._config, self._seed = config, seed
        self._train_step = make_train_step(denoiser, config)
        self._asked_to_stop = False

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.history)

    @property
    def is_finished(self) -> bool:
        return self.step == self._config.steps

    def stop(self) -> None:
        """Ends the iteration of all processes after a step: the one under way or, of several, the next.

        May be called at any time, from a signal handler too.
        """
        self._asked_to_stop = True

    def __iter__(self) -> Iterator[StepMetrics]:
        """Goes on from the steps that are done.

        Raises:
            NotFiniteError: the loss is no number; names the step and the images.
        """
        config, train_step, voted = self._config, self._train_step, False
        for module in self._denoiser.modules:
            module.train()
        micro_batches = self._micro_batches()
        examples = next(micro_batches)
        while not self.is_finished and not self._stops(voted):
            start = perf_counter()
            if self._text_encoders_have_had_their_steps():
                frozen = _freeze_text_encoders(train_step, self._denoiser, self._dataset, config)
                self._denoiser, self._dataset = frozen
                micro_batches = self._micro_batches()
                examples = next(micro_batches)  # the one drawn ahead, once more: now it has its embeddings
            taken = []
            for _ in range(config.accumulation):
                train_step.accumulate(examples)
                taken.append(examples)
                examples = next(micro_batches)  # drawn on the CPU while the GPU computes
            rate = learning_rate_factor(self.step, config)
            update = train_step.update(rate, self._asked_to_stop)
            voted, seconds, learning_rate = update.stop, perf_counter() - start, rate * config.learning_rate
            report = StepMetrics(
                self.step + 1, update.loss, update.grad_norm, learning_rate, update.loss_scale, seconds
            )
            _require_finite(report, config, taken)
            self.history.append(report)
            yield report
        if self.is_finished:
            train_step.finish()
            for module in self._denoiser.modules:
                module.eval()

    def state_dict(self) -> dict[str, Tensor]:
        """What the remaining steps depend on, and the reports. No copies: the next step changes them."""
        rows = [astuple(report) for report in self.history]
        return {"reports": torch.tensor(rows, dtype=torch.float64), **self._train_step.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from the state of another training with the same arguments, of which no step is done yet.

        Text encoders that were frozen by then are frozen again before the first step, from the weights that
        they were frozen with; they embed the captions as they did.
        """
        self.history = [StepMetrics(int(step), *rest) for step, *rest in state["reports"].tolist()]
        self._train_step.load_state_dict(state)

    def _micro_batches(self) -> Iterator[TrainingBatch]:
        self._train_step.capture(one_batch_per_size(self._denoiser, self._dataset, self._config))
        return training_batches(self._denoiser, self._dataset, self._config, self._seed, self.step)

    def _text_encoders_have_had_their_steps(self) -> bool:
        steps = self._config.text_encoder_steps
        return steps is not None and self.step >= steps and self._denoiser.text_encoders is not None

    def _stops(self, voted: bool) -> bool:
        """Whether all processes stop here. Several go by their last common vote, one need not vote."""
        return voted if distributed_state().num_processes > 1 else self._asked_to_stop


def train_lora(
    denoiser: Denoiser, dataset: EncodedDataset, config: TrainingConfig, seed: int
) -> Iterator[StepMetrics]:
    """The whole of a training whose state nobody asks for."""
    return iter(Trainer(denoiser, dataset, config, seed))


def make_train_step(denoiser: Denoiser, config: TrainingConfig) -> TrainStep[TrainingBatch]:
    """The TrainStep over all adapters: a group for the UNet and one for each text encoder."""
    rates = [config.learning_rate, config.text_encoder_learning_rate, config.text_encoder_learning_rate]
    groups = [
        ParameterGroup(lora_parameters(module), rate)
        for module, rate in zip(denoiser.modules, rates, strict=False)
    ]
    recorded = denoiser.device.type == "cuda" and not has_dropout(denoiser)
    return TrainStep(_make_loss(denoiser, config), groups, config, DTYPES[config.precision], recorded)


def _make_loss(denoiser: Denoiser, config: TrainingConfig) -> Callable[[TrainingBatch], Tensor]:
    """What the TrainStep minimises."""
    return partial(denoising_loss, denoiser, min_snr_gamma=config.min_snr_gamma, seeded=has_dropout(denoiser))


def _freeze_text_encoders(
    train_step: TrainStep[TrainingBatch], denoiser: Denoiser, dataset: EncodedDataset, config: TrainingConfig
) -> tuple[Denoiser, EncodedDataset]:
    """Goes on with the UNet alone; returns it, and the examples with their captions embedded once for all."""
    text_encoders, empty = denoiser.text_encoders, denoiser.null_conditioning
    assert text_encoders is not None, "they are frozen"
    for text_encoder in text_encoders:
        text_encoder.eval()
    if empty is not None:
        empty = embed_null_conditioning(text_encoders, empty.token_ids)
    unet_alone = replace(denoiser, text_encoders=None, null_conditioning=empty)
    train_step.freeze_groups_from(
        1, _make_loss(unet_alone, config)
    )  # before the captions, as it makes room on the GPU
    return unet_alone, with_captions_embedded(denoiser, dataset)


def prepare_modules(
    denoiser: Denoiser, config: TrainingConfig, latents: torch.Size, checkpointed: Iterable[str] = ()
) -> AttentionBackend:
    """Sets up the base model's modules to train as `config` says; returns the attention that was chosen.

    Args:
        latents: shape of the largest example's latents, (1, 4, H/8, W/8).
        checkpointed: names of the units that compute their activations twice.

    Raises:
        ValueError: the attention cannot run here; the modules are as they were.
    """
    size = config.batch_size // config.accumulation
    shapes = attention_shapes(denoiser.unet, size, *latents[2:])
    backend = choose_attention(config.attention, shapes, DTYPES[config.precision], denoiser.device)
    fuse_unet(denoiser.unet, backend)
    for text_encoder in denoiser.text_encoders or ():
        fuse_text_encoder(text_encoder)
    checkpoint_units(named_parts(denoiser.unet, denoiser.text_encoders), checkpointed)
    return backend


def has_dropout(denoiser: Denoiser) -> bool:
    """Whether a forward pass draws random numbers."""
    layers = (layer for module in denoiser.modules for layer in module.modules())
    return any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in layers)


def _require_finite(report: StepMetrics, config: TrainingConfig, examples: Sequence[TrainingBatch]) -> None:
    """Lets pass what fp16 overflows in its gradients now and then, and nothing else.

    Raises:
        NotFiniteError: the loss is infinite or no number, or a gradient is and no loss scale can help.
    """
    checked = {"loss": report.loss}
    if config.precision != "fp16" or report.loss_scale < 1:
        checked["gradient norm"] = report.grad_norm
    for name, value in checked.items():
        if not math.isfinite(value):
            images = ", ".join(image for part in examples for image in part.images)
            message = (
                f"{name} is {value} at step {report.step}, on the images {images}: "
                "lower training.learning_rate, or set training.precision to bf16 or fp32"
            )
            raise NotFiniteError(message, report, examples)


def denoising_loss(
    denoiser: Denoiser, examples: TrainingBatch, min_snr_gamma: float | None, seeded: bool
) -> Tensor:
    """Mean over the examples of the squared error, times its Min-SNR weight if there is a gamma.

    Args:
        seeded: seed the adapters' dropout.
    """
    if seeded:
        torch.manual_seed(examples.dropout_seed)
    draws = examples.draws
    errors = denoiser.per_example_mse(
        examples.batch, draws.latents, draws.noise, draws.timesteps, caption_mask=draws.caption_mask
    )
    if min_snr_gamma is not None:
        schedule = denoiser.noise_schedule
        alpha_bar = schedule.alphas_cumprod[draws.timesteps]
        errors = errors * min_snr_weight(alpha_bar, min_snr_gamma, schedule.prediction_type)
    return errors.mean()


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Share of the peak learning rate at `step`, counted from 0: a linear rise, then a cosine or nothing.

    The cosine reaches 0 just after the last step (Loshchilov & Hutter 2017, arXiv:1608.03983).
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def mean_metrics(reports: Sequence[StepMetrics]) -> dict[str, float]:
    """One point of the curves: the last report's step and the means of everything else."""
    columns = {
        field.name: [getattr(report, field.name) for report in reports] for field in fields(StepMetrics)
    }
    return {"step": columns.pop("step")[-1], **{name: fmean(values) for name, values in columns.items()}}


def loss_curve(reports: Sequence[StepMetrics], every: int) -> pd.DataFrame:
    """The curves of a whole run, a point every `every` steps."""
    starts = range(0, len(reports), every)
    return pd.DataFrame([mean_metrics(reports[start : start + every]) for start in starts])


def summarise(reports: Sequence[StepMetrics], denoiser: Denoiser, config: TrainingConfig) -> dict[str, float]:
    """The whole run in a few numbers."""
    seconds = sum(report.seconds for report in reports)
    examples = len(reports) * config.batch_size * distributed_state().num_processes
    last_tenth = reports[-max(1, len(reports) // 10) :]
    return {
        "steps": len(reports),
        "final_loss": fmean(report.loss for report in last_tenth),
        "trainable_parameters": sum(p.numel() for m in denoiser.modules for p in lora_parameters(m)),
        "peak_memory_gib": peak_memory_gib(denoiser.device),
        "seconds": seconds,
        "examples_per_second": examples / seconds,
    }
