"""The memory events of one training step, from a run of the library's code on tensors without data.

Seconds on a CPU, before any weight is loaded. Knows nothing of the GPU's allocator: `training_forecast`
replays the events through it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from sdxl_lora.adapters.lora import add_adapters, lora_parameters
from sdxl_lora.config import LoraConfig, TrainingConfig
from sdxl_lora.data.encoded_dataset import Batch
from sdxl_lora.kernels.quantized_linear import quantize
from sdxl_lora.memory.trace import (
    Allocate,
    EnterBackward,
    EnterUnit,
    Event,
    Free,
    LeaveUnit,
    MemoryTrace,
    live_bytes,
)
from sdxl_lora.models.architecture import SDXLArchitecture
from sdxl_lora.models.loading import DTYPES
from sdxl_lora.models.sdxl import NoiseSchedule, predict
from sdxl_lora.training.activation_checkpointing import find_units
from sdxl_lora.training.batches import NoiseDraws, TrainingBatch
from sdxl_lora.training.denoiser import Denoiser
from sdxl_lora.training.previews import PREVIEW_TILE
from sdxl_lora.training.trainer import has_dropout, make_train_step, prepare_modules

META = torch.device("meta")
_NUM_TIMESTEPS = 1000


@dataclass(frozen=True)
class TrainingSpec:
    """The model that is trained, how, and on which size of images."""

    shapes: SDXLArchitecture
    trains_text_encoders: bool
    lora: LoraConfig
    config: TrainingConfig
    latents: torch.Size
    """Shape of one example's latents, (1, 4, H/8, W/8)."""


@dataclass(frozen=True)
class Unit:
    """A block of the model that may be checkpointed."""

    name: str
    number: int
    """The unit's number in the events."""
    freed: frozenset[int]
    """Allocations that survive the forward pass only if the unit is not checkpointed."""
    freed_bytes: int
    flops: int
    """Floating point operations of its forward pass, which checkpointing repeats."""
    recomputation: tuple[Allocate | Free, ...]
    """Allocations of that repetition: those of the forward pass without the outputs, which still exist."""


@dataclass(frozen=True)
class TrainingTrace:
    """One micro-batch's forward and backward pass without checkpointing, allocation by allocation."""

    spec: TrainingSpec
    setup: Sequence[Event]
    """Weights and adapters."""
    step: Sequence[Event]
    weights: int
    """Bytes of the frozen weights."""
    adapters: int
    """Bytes of the trained weights in all their copies."""
    num_parameters: int
    """Trained weights."""
    is_graphed: bool
    """Whether a CUDA graph runs the step, in a memory pool of the graph."""
    flops: int
    """Floating point operations of the pass: matrix products, convolutions, attention."""
    units: tuple[Unit, ...]
    """Those whose checkpointing frees memory, the most bytes per repeated operation first."""


class MetaTrainingRun:
    """Training of a model without weights: allocates in the same order as a real one."""

    def __init__(self, spec: TrainingSpec, checkpointed: Iterable[str] = ()) -> None:
        """Load, adapt and prepare the model.

        Args:
            spec: the training.
            checkpointed: names of units to run with checkpointing.
        """
        self._spec = spec
        self._trace = MemoryTrace(META)
        self._denoiser = denoiser = make_denoiser(spec)
        with self._trace:
            for module in denoiser.modules:
                self._trace.hold([*module.parameters(), *module.buffers()])
            self._weights = live_bytes(self._trace.events)
            add_adapters(denoiser.parts, spec.lora, seed=0)
            prepare_modules(denoiser, spec.config, spec.latents, checkpointed)
            self._train_step = make_train_step(denoiser, spec.config)
        for module in denoiser.modules:
            module.train()
        self._units = find_units(denoiser.parts)
        self._setup = tuple(self._trace.events)

    def step(self, micro_batch_size: int) -> TrainingTrace:
        """Run one forward and backward pass and return its trace."""
        start = len(self._trace.events)
        with self._trace, self._trace.watching(self._units.values()):
            self._train_step.accumulate(make_examples(self._spec, micro_batch_size))
        events = self._trace.events[start:]
        trainable = [p for module in self._denoiser.modules for p in lora_parameters(module)]
        return TrainingTrace(
            spec=self._spec,
            setup=self._setup,
            step=events,
            weights=self._weights,
            adapters=live_bytes(self._setup) - self._weights,
            num_parameters=sum(parameter.numel() for parameter in trainable),
            is_graphed=not has_dropout(self._denoiser),
            flops=self._trace.total_flops,
            units=_rank_units(_make_units(list(self._units), events, self._trace)),
        )

    @torch.no_grad()
    def preview(self) -> list[Event]:
        """Return the events of a preview: load the VAE, run the UNet with and without caption, decode a tile.

        Empty if the params want no previews.
        """
        spec, denoiser = self._spec, self._denoiser
        if spec.config.preview_every is None:
            return []
        dtype = DTYPES[denoiser.precision]
        vae = spec.shapes.make_vae(denoiser.precision, META)
        width, pooled_width = spec.shapes.embedding_widths
        start = len(self._trace.events)
        with self._trace:
            self._trace.hold(vae.parameters())
            latents = torch.empty(2, *spec.latents[1:], dtype=dtype, device=META)
            predict(
                denoiser.unet,
                latents,
                torch.empty(2, dtype=torch.long, device=META),
                torch.empty(2, 77, width, dtype=dtype, device=META),
                torch.empty(2, pooled_width, dtype=dtype, device=META),
                torch.empty(2, 6, device=META),
            )
            tile = PREVIEW_TILE // spec.shapes.pixels_per_latent
            vae.decode(latents[:1, :, :tile, :tile])
        return self._trace.events[start:]


def make_denoiser(spec: TrainingSpec) -> Denoiser:
    """Return the model that `spec` trains, on the `meta` device."""
    precision = spec.config.precision
    text_encoders = spec.shapes.make_text_encoders(precision, META) if spec.trains_text_encoders else None
    schedule = NoiseSchedule(torch.empty(_NUM_TIMESTEPS, device=META), "epsilon")
    denoiser = Denoiser(spec.shapes.make_unet(precision, META), text_encoders, schedule, precision)
    for module in denoiser.modules:
        quantize(module, spec.config.quantization, META)
    return denoiser


def make_examples(spec: TrainingSpec, size: int) -> TrainingBatch:
    """Return a micro-batch as the training loop passes it to the step: zeros on the CPU."""
    width, pooled_width = spec.shapes.embedding_widths
    frozen = not spec.trains_text_encoders
    latents = torch.zeros(size, *spec.latents[1:])
    batch = Batch(
        latents_mean=latents,
        latents_std=latents,
        token_ids=torch.zeros(size, 2, 77, dtype=torch.long),
        time_ids=torch.zeros(size, 6, dtype=torch.int32),
        prompt_embeds=torch.zeros(size, 77, width) if frozen else None,
        pooled_prompt_embeds=torch.zeros(size, pooled_width) if frozen else None,
    )
    draws = NoiseDraws(latents, latents, torch.zeros(size, dtype=torch.long), torch.zeros(size))
    return TrainingBatch(batch, draws, images=[], dropout_seed=0)


def _make_units(names: Sequence[str], events: Iterable[Event], trace: MemoryTrace) -> list[Unit]:
    """Return every unit with what its checkpointing would free and repeat.

    Args:
        names: of the units, in the order of their numbers.
        events: of a step without checkpointing.
        trace: where the step ran.
    """
    # By the first gradient every unit has run forward. What is alive then is kept for the backward pass.
    forward = list(takewhile(lambda event: not isinstance(event, EnterBackward), events))
    freed_in_forward = {event.key for event in forward if isinstance(event, Free)}
    passes = _split_by_unit(forward)
    units = []
    for number, name in enumerate(names):
        outputs, forward_pass = trace.outputs[number], passes.get(number, [])
        sizes = {event.key: event.size for event in forward_pass if isinstance(event, Allocate)}
        freed = frozenset(sizes.keys() - freed_in_forward - outputs)
        recomputation = tuple(event for event in forward_pass if event.key not in outputs)
        freed_bytes = sum(sizes[key] for key in freed)
        units.append(Unit(name, number, freed, freed_bytes, trace.flops[number], recomputation))
    return units


def _split_by_unit(events: Iterable[Event]) -> dict[int, list[Allocate | Free]]:
    """Return the allocations and frees between the start and the end of each unit's forward pass."""
    passes: dict[int, list[Allocate | Free]] = {}
    inside: int | None = None
    for event in events:
        match event:
            case EnterUnit(unit):
                inside = unit
                passes[unit] = []
            case LeaveUnit():
                inside = None
            case Allocate() | Free() if inside is not None:
                passes[inside].append(event)
    return passes


def _rank_units(units: Iterable[Unit]) -> tuple[Unit, ...]:
    """Return the units whose checkpointing frees memory, the most bytes per repeated operation first.

    Of equal ones the earlier comes first: its backward pass comes later, when more memory is free again.
    """
    worthwhile = [unit for unit in units if unit.freed_bytes]
    return tuple(sorted(worthwhile, key=lambda unit: -unit.freed_bytes / unit.flops))
