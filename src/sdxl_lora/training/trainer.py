"""Fine-tuning the adapters: the sequence of steps, the loss, the schedules. Knows no file, log or tracker.

One step, from file to file:

    batches.training_batches       examples in their order, with noise, timesteps and dropped captions
    Trainer.__iter__               one step after the other, and the freezing of text encoders
    train_step.TrainStep           forward, backward, update; on a GPU a captured graph
    denoising_loss                 the weighted error of the UNet's prediction
    denoiser.Denoiser              captions -> text encoders -> UNet, whose layers models.fused_unet replaces
    adapters.merged_linear         adapted layers, forward and backward
    flat_parameters, optimizers    the adapters' storage, and what moves them
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from statistics import fmean
from time import perf_counter

import pandas as pd
import torch
from torch import Tensor, nn

from sdxl_lora.adapters.lora import lora_parameters
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

_NUM_UNET_GROUPS = 1  # the first of `make_train_step`'s


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of an optimizer step."""

    step: int
    """Counted from 1."""
    loss: float
    """Weighted denoising loss, averaged over the step's examples."""
    grad_norm: float
    """Euclidean norm, before clipping, of the gradients of all adapters that are not frozen."""
    learning_rate: float
    """Of the UNet's adapters."""
    loss_scale: float
    """Factor of fp16 loss scaling; 1 in other precisions."""
    seconds: float
    """Wall time of the step."""


class NotFiniteError(FloatingPointError):
    """Raised when a step's loss or gradient norm is not finite; carries its metrics and micro-batches."""

    def __init__(self, message: str, metrics: StepMetrics, batches: Sequence[TrainingBatch]) -> None:
        super().__init__(message)
        self.metrics = metrics
        self.batches = batches


class Trainer(Iterable[StepMetrics]):
    """Trains the adapters of a denoiser in place and yields each step's metrics.

    It can be saved between two steps. A process that loads the state resumes to a bit-identical result: every
    random draw is a function of the seed and a position, which is the number of completed steps.
    """

    def __init__(
        self, denoiser: Denoiser, dataset: EncodedDataset, config: TrainingConfig, seed: int
    ) -> None:
        self.history: list[StepMetrics] = []
        """Metrics of the completed steps, those before a resume included."""
        self._denoiser, self._dataset = denoiser, dataset
        self._config, self._seed = config, seed
        self._train_step = make_train_step(denoiser, config)
        self._asked_to_stop = False

    @property
    def step(self) -> int:
        """Completed steps."""
        return len(self.history)

    @property
    def is_finished(self) -> bool:
        return self.step == self._config.steps

    def stop(self) -> None:
        """Stop after the present step; with several processes, all stop together, one step later at most.

        May be called at any time, also from a signal handler.
        """
        self._asked_to_stop = True

    def __iter__(self) -> Iterator[StepMetrics]:
        """Train from the completed steps on.

        Raises:
            NotFiniteError: a loss or gradient is not finite; names the step and the images.
        """
        for module in self._denoiser.modules:
            module.train()
        batches = self._capture_and_read_ahead()
        all_stop = False
        while not self.is_finished and not self._stops(all_stop):
            start = perf_counter()
            if self._must_freeze_text_encoders():
                self._freeze_text_encoders()
                # The batch read ahead holds token ids. The same examples are drawn again, with embeddings.
                batches = self._capture_and_read_ahead()
            rate = learning_rate_factor(self.step, self._config)
            taken = self._accumulate(batches)
            result = self._train_step.update(rate, self._asked_to_stop)
            metrics = StepMetrics(
                step=self.step + 1,
                loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rate=rate * self._config.learning_rate,
                loss_scale=result.loss_scale,
                seconds=perf_counter() - start,
            )
            _require_finite(metrics, self._config, taken)
            self.history.append(metrics)
            all_stop = result.stop
            yield metrics
        if self.is_finished:
            self._train_step.finish()
            for module in self._denoiser.modules:
                module.eval()

    def _accumulate(self, batches: "_ReadAhead") -> list[TrainingBatch]:
        """Add the gradients of a step's micro-batches; return the batches."""
        taken = []
        for _ in range(self._config.accumulation):
            self._train_step.accumulate(batches.current)  # on a GPU returns at once
            taken.append(batches.current)
            batches.advance()  # noise is drawn on the CPU while the GPU computes
        return taken

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the remaining steps depend on, and the history. No copies: a step changes them."""
        rows = [astuple(metrics) for metrics in self.history]
        return {"reports": torch.tensor(rows, dtype=torch.float64), **self._train_step.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from the state of a Trainer with the same arguments; no step may have been trained here.

        Text encoders that were frozen by then are frozen before the first step, with the weights that they
        were frozen with, so the captions' embeddings are the same.
        """
        self.history = [StepMetrics(int(step), *rest) for step, *rest in state["reports"].tolist()]
        self._train_step.load_state_dict(state)

    def _capture_and_read_ahead(self) -> "_ReadAhead":
        """Capture the step's graphs and return the micro-batches from the next step on."""
        self._train_step.capture(one_batch_per_size(self._denoiser, self._dataset, self._config))
        return _ReadAhead(
            training_batches(self._denoiser, self._dataset, self._config, self._seed, self.step)
        )

    def _must_freeze_text_encoders(self) -> bool:
        """Return whether the text encoders have had their steps; never again once they are frozen."""
        steps = self._config.text_encoder_steps
        return steps is not None and self.step >= steps and self._denoiser.text_encoders is not None

    def _freeze_text_encoders(self) -> None:
        """Train the UNet alone from here on, with the captions embedded once for all."""
        text_encoders, empty = self._denoiser.text_encoders, self._denoiser.null_conditioning
        assert text_encoders is not None, "they are frozen already"
        for text_encoder in text_encoders:
            text_encoder.eval()  # no dropout in the embeddings
        if empty is not None:
            empty = embed_null_conditioning(text_encoders, empty.token_ids)
        unet_alone = replace(self._denoiser, text_encoders=None, null_conditioning=empty)
        # Before the captions are embedded: it drops the graphs, whose memory embedding needs.
        self._train_step.freeze_groups_from(_NUM_UNET_GROUPS, _make_loss(unet_alone, self._config))
        self._dataset = with_captions_embedded(self._denoiser, self._dataset)
        self._denoiser = unet_alone

    def _stops(self, all_stop: bool) -> bool:
        """Return whether to stop before the next step.

        Several processes must stop at the same step, or one waits for the others' gradients for ever. So
        they follow the last step's sum of stop requests, and not a request that only this one has seen.
        """
        return all_stop if distributed_state().num_processes > 1 else self._asked_to_stop


class _ReadAhead:
    """Micro-batches of which the next one is always drawn already."""

    def __init__(self, batches: Iterator[TrainingBatch]) -> None:
        self._batches = batches
        self.current = next(batches)

    def advance(self) -> None:
        """Draw the batch after the current one."""
        self.current = next(self._batches)


def make_train_step(denoiser: Denoiser, config: TrainingConfig) -> TrainStep[TrainingBatch]:
    """Return the TrainStep over all adapters: a group for the UNet, then one for each text encoder."""
    groups = [
        ParameterGroup(
            lora_parameters(module),
            config.learning_rate if part == "unet" else config.text_encoder_learning_rate,
        )
        for part, module in denoiser.parts.items()
    ]
    # A graph would replay the same dropout masks in every step.
    use_graph = denoiser.device.type == "cuda" and not has_dropout(denoiser)
    return TrainStep(_make_loss(denoiser, config), groups, config, DTYPES[config.precision], use_graph)


def _make_loss(denoiser: Denoiser, config: TrainingConfig) -> Callable[[TrainingBatch], Tensor]:
    """Return the loss that a TrainStep minimises."""
    return partial(denoising_loss, denoiser, min_snr_gamma=config.min_snr_gamma, seeded=has_dropout(denoiser))


def prepare_modules(
    denoiser: Denoiser, config: TrainingConfig, latents: torch.Size, checkpointed: Iterable[str] = ()
) -> AttentionBackend:
    """Set up the base model's modules to train as `config` says; return the attention that was chosen.

    Args:
        latents: shape of the largest example's latents, (1, 4, H/8, W/8).
        checkpointed: names of the units that recompute their activations.

    Raises:
        ValueError: the attention cannot run here. The modules are left unchanged.
    """
    size = config.batch_size // config.accumulation
    shapes = attention_shapes(denoiser.unet, size, *latents[2:])
    backend = choose_attention(config.attention, shapes, DTYPES[config.precision], denoiser.device)
    fuse_unet(denoiser.unet, backend)
    for text_encoder in denoiser.text_encoders or ():
        fuse_text_encoder(text_encoder)
    checkpoint_units(denoiser.parts, checkpointed)
    return backend


def has_dropout(denoiser: Denoiser) -> bool:
    """Return whether a forward pass draws random numbers."""
    layers = (layer for module in denoiser.modules for layer in module.modules())
    return any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in layers)


def _require_finite(metrics: StepMetrics, config: TrainingConfig, batches: Sequence[TrainingBatch]) -> None:
    """Raise NotFiniteError if the loss is not finite, or a gradient is not for another reason than fp16.

    Large loss scales overflow fp16's gradients now and then: such a step is skipped, and the scale halved.
    A gradient that overflows at a scale below 1 has another cause.
    """
    checked = {"loss": metrics.loss}
    if config.precision != "fp16" or metrics.loss_scale < 1:
        checked["gradient norm"] = metrics.grad_norm
    for name, value in checked.items():
        if not math.isfinite(value):
            images = ", ".join(image for batch in batches for image in batch.images)
            message = (
                f"{name} is {value} at step {metrics.step}, on the images {images}: "
                "lower training.learning_rate, or set training.precision to bf16 or fp32"
            )
            raise NotFiniteError(message, metrics, batches)


def denoising_loss(
    denoiser: Denoiser, batch: TrainingBatch, min_snr_gamma: float | None, seeded: bool
) -> Tensor:
    """Return the mean over the examples of the squared error, times its Min-SNR weight if there is a gamma.

    Args:
        seeded: seed the adapters' dropout. Not allowed in a graph, which has none.
    """
    if seeded:
        torch.manual_seed(batch.dropout_seed)  # PEFT's dropout draws from the global generator
    draws = batch.draws
    errors = denoiser.per_example_mse(
        batch.batch, draws.latents, draws.noise, draws.timesteps, caption_mask=draws.caption_mask
    )
    if min_snr_gamma is not None:
        schedule = denoiser.noise_schedule
        alpha_bar = schedule.alphas_cumprod[draws.timesteps]
        errors = errors * min_snr_weight(alpha_bar, min_snr_gamma, schedule.prediction_type)
    return errors.mean()


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Return the share of the peak learning rate at `step`, from 0: a linear rise, then a cosine or 1.

    The cosine reaches 0 just after the last step (Loshchilov & Hutter 2017, arXiv:1608.03983).
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def mean_metrics(history: Sequence[StepMetrics]) -> dict[str, float]:
    """Return one point of the curves: the last step's number and the means of all other metrics."""
    columns = {
        field.name: [getattr(metrics, field.name) for metrics in history] for field in fields(StepMetrics)
    }
    return {"step": columns.pop("step")[-1], **{name: fmean(values) for name, values in columns.items()}}


def loss_curve(history: Sequence[StepMetrics], every: int) -> pd.DataFrame:
    """Return the curves of a whole run, a point every `every` steps."""
    starts = range(0, len(history), every)
    return pd.DataFrame([mean_metrics(history[start : start + every]) for start in starts])


def summarise(history: Sequence[StepMetrics], denoiser: Denoiser, config: TrainingConfig) -> dict[str, float]:
    """Return a whole run in a few numbers."""
    seconds = sum(metrics.seconds for metrics in history)
    examples = len(history) * config.batch_size * distributed_state().num_processes
    last_tenth = history[-max(1, len(history) // 10) :]
    return {
        "steps": len(history),
        "final_loss": fmean(metrics.loss for metrics in last_tenth),
        "trainable_parameters": sum(p.numel() for m in denoiser.modules for p in lora_parameters(m)),
        "peak_memory_gib": peak_memory_gib(denoiser.device),
        "seconds": seconds,
        "examples_per_second": examples / seconds,
    }
