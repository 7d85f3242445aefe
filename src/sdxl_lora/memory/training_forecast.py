"""How much GPU memory training will take, by part, before any weight is loaded: seconds on a CPU.

The library's own training step runs once on tensors without data. What it allocates is replayed through the
arithmetic of PyTorch's allocator, for any choice of checkpointed units.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import inf

import torch

from sdxl_lora.adapters.lora import add_adapters, lora_parameters, named_parts
from sdxl_lora.config import LoraConfig, TrainingConfig
from sdxl_lora.data.encoded_dataset import Batch
from sdxl_lora.kernels.quantized_linear import quantize
from sdxl_lora.memory.caching_allocator import MIB, CachingAllocator
from sdxl_lora.memory.trace import Event, MemoryTrace
from sdxl_lora.models.architecture import SDXLArchitecture
from sdxl_lora.models.loading import DTYPES
from sdxl_lora.models.sdxl import NoiseSchedule, predict
from sdxl_lora.storage.atomic_io import GIB
from sdxl_lora.training.activation_checkpointing import find_units
from sdxl_lora.training.batches import NoiseDraws, TrainingBatch
from sdxl_lora.training.denoiser import Denoiser
from sdxl_lora.training.trainer import has_dropout, make_train_step, prepare_modules

META = torch.device("meta")
_NUM_TIMESTEPS = 1000

CUBLAS_WORKSPACE = 32 * MIB
"""What cuBLAS keeps for each thread on each stream: CUBLAS_WORKSPACE_CONFIG is :4096:8, eight times 4 MiB."""
_THREADS = 2
"""The one of the forward pass and autograd's own."""
_KERNEL_SCRATCH = 64 * MIB
"""What other kernels take for themselves and no trace sees. Measured peaks were above the rest of a forecast
by -0.05 to 0.04 GiB in seven configurations of 5 to 22 GiB on an H100."""


@dataclass(frozen=True)
class TrainingSpec:
    """What is trained, and on what."""

    shapes: SDXLArchitecture
    trains_text_encoders: bool
    lora: LoraConfig
    config: TrainingConfig
    latents: torch.Size
    """Of an example, (1, 4, H/8, W/8)."""


@dataclass(frozen=True)
class MemoryForecast:
    """Peak GPU memory that PyTorch reserves in one phase, by part, bytes. CUDA's own context is not in it."""

    weights: int
    """The base model's."""
    adapters: int
    """Trained weights: fp32 master, gradient, copy to compute with, moving average."""
    optimizer: int
    """AdamW's moments."""
    activations: int
    """Whatever a step or a forward pass makes, at the moment when it is most."""
    previews: int
    """What drawing previews adds beside a recorded training step."""
    cache: int
    """Held by PyTorch's allocator and not in use: rounding, and gaps that nothing fits in."""
    workspace: int
    """Scratch memory of kernels, cuBLAS' foremost."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def gib(self) -> dict[str, float]:
        """The parts and their total, GiB."""
        return {name: value / GIB for name, value in {**asdict(self), "total": self.total}.items()}


@dataclass(frozen=True)
class _Unit:
    """A unit that may be checkpointed."""

    name: str
    number: int
    """As the trace's events have it."""
    freed: frozenset[int]
    """Allocations that live on after the forward pass only if the unit is not checkpointed."""
    freed_bytes: int
    flops: int
    """Floating point operations of its forward pass, which checkpointing does again."""


@dataclass(frozen=True)
class TrainingTrace:
    """One micro-batch's forward and backward pass without checkpointing, allocation by allocation."""

    setup: Sequence[Event]
    """Weights and adapters."""
    step: Sequence[Event]
    outputs: Sequence[set[int]]
    """Allocations that each unit's forward pass hands on."""
    weights: int
    """Bytes of the frozen weights."""
    adapters: int
    """Bytes of the trained weights in all their copies."""
    optimizer: int
    """Bytes of the optimizer's state, made after the first step."""
    update: int
    """Bytes that an update makes in passing: AdamW in fp32, the square roots of all second moments."""
    recorded: bool
    """Whether a CUDA graph keeps the step's memory to itself."""
    flops: int
    """Floating point operations of the pass: matrix products, convolutions, attention."""
    units: tuple[_Unit, ...]
    """Those that checkpointing frees something of, the most bytes per recomputed operation first."""


class MetaTrainingRun:
    """Training on a model without weights: everything that allocates, in the order in which it does."""

    def __init__(self, work: TrainingSpec, checkpointed: Iterable[str] = ()) -> None:
        """Loads, adapts and prepares the model.

        Args:
            checkpointed: names of units that really are.
        """
        self._spec = work
        self._trace = MemoryTrace(META)
        self._denoiser = denoiser = make_denoiser(work)
        with self._trace:
            for module in denoiser.modules:
                self._trace.hold([*module.parameters(), *module.buffers()])
            self._weights = live_bytes(self._trace.events)
            add_adapters(denoiser.unet, denoiser.text_encoders, work.lora, seed=0)
            prepare_modules(denoiser, work.config, work.latents, checkpointed)
            self._engine = make_train_step(denoiser, work.config)
        for module in denoiser.modules:
            module.train()
        self._units = find_units(named_parts(denoiser.unet, denoiser.text_encoders))
        self._setup = tuple(self._trace.events)

    def step(self, micro_batch_size: int) -> TrainingTrace:
        """A forward and backward pass."""
        start = len(self._trace.events)
        with self._trace, self._trace.watching(self._units.values()):
            self._engine.accumulate(make_examples(self._spec, micro_batch_size))
        events = self._trace.events[start:]
        trainable = [p for module in self._denoiser.modules for p in lora_parameters(module)]
        num_parameters = sum(parameter.numel() for parameter in trainable)
        return TrainingTrace(
            setup=self._setup,
            step=events,
            outputs=self._trace.outputs,
            weights=self._weights,
            adapters=live_bytes(self._setup) - self._weights,
            optimizer=optimizer_bytes(num_parameters, self._spec.config),
            update=num_parameters * 4 if self._spec.config.optimizer == "adamw" else 0,
            recorded=not has_dropout(self._denoiser),
            flops=self._trace.total_flops,
            units=_rank_units(list(self._units), events, self._trace),
        )

    @torch.no_grad()
    def preview(self) -> list[Event]:
        """What takes memory in a preview: the VAE, the UNet with and without the caption, decoding a tile.

        Nothing if params want no previews.
        """
        work, denoiser = self._spec, self._denoiser
        if work.config.preview_every is None:
            return []
        dtype = DTYPES[denoiser.precision]
        vae = work.shapes.make_vae(denoiser.precision, META)
        width, pooled_width = work.shapes.embedding_widths
        start = len(self._trace.events)
        with self._trace:
            self._trace.hold(vae.parameters())
            latents = torch.empty(2, *work.latents[1:], dtype=dtype, device=META)
            predict(
                denoiser.unet,
                latents,
                torch.empty(2, dtype=torch.long, device=META),
                torch.empty(2, 77, width, dtype=dtype, device=META),
                torch.empty(2, pooled_width, dtype=dtype, device=META),
                torch.empty(2, 6, device=META),
            )
            tile = vae.tile_latent_min_size
            vae.decode(latents[:1, :, :tile, :tile])
        return self._trace.events[start:]


def make_denoiser(work: TrainingSpec) -> Denoiser:
    precision = work.config.precision
    text_encoders = work.shapes.make_text_encoders(precision, META) if work.trains_text_encoders else None
    schedule = NoiseSchedule(torch.empty(_NUM_TIMESTEPS, device=META), "epsilon")
    denoiser = Denoiser(work.shapes.make_unet(precision, META), text_encoders, schedule, precision)
    for module in denoiser.modules:
        quantize(module, work.config.quantization, META)
    return denoiser


def make_examples(work: TrainingSpec, size: int) -> TrainingBatch:
    """A micro-batch as the loop gives it to the engine: zeros on the CPU."""
    width, pooled_width = work.shapes.embedding_widths
    frozen = not work.trains_text_encoders
    latents = torch.zeros(size, *work.latents[1:])
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


def optimizer_bytes(num_parameters: int, config: TrainingConfig) -> int:
    """Bytes of AdamW's two moments.

    In 8 bits each block of 256 values has an fp32 scale, as bitsandbytes chooses (Dettmers et al. 2022,
    arXiv:2110.02861, section 2.1, has 2,048).
    """
    if config.optimizer == "adamw_8bit":
        return num_parameters * 2 + -(-num_parameters // 256) * 2 * 4
    return num_parameters * 2 * 4


def _rank_units(names: Sequence[str], events: Sequence[Event], trace: MemoryTrace) -> tuple[_Unit, ...]:
    """The units whose checkpointing frees memory, the most bytes per recomputed operation first.

    Of equal ones the earlier comes first: its turn in the backward pass comes later, when more is free again.
    """
    freed = _freed_allocations(events, trace.outputs)
    sizes = {event.key: event.size for event in events if event.kind == "allocate"}
    units = [
        _Unit(name, number, keys, sum(sizes[key] for key in keys), trace.flops[number])
        for number, (name, keys) in enumerate(zip(names, freed, strict=True))
    ]
    worthwhile = [unit for unit in units if unit.freed_bytes]
    return tuple(sorted(worthwhile, key=lambda unit: -unit.freed_bytes / unit.flops))


def _freed_allocations(events: Iterable[Event], outputs: Sequence[set[int]]) -> list[frozenset[int]]:
    """Of each unit, what its forward pass allocates and does not hand on, kept for the backward pass."""
    kept: list[set[int]] = [set() for _ in outputs]
    owners: dict[int, int] = {}
    inside: int | None = None
    for event in events:
        if event.kind == "backward":
            break
        if event.kind == "enter":
            inside = event.key
        elif event.kind == "leave":
            inside = None
        elif event.kind == "allocate" and inside is not None:
            owners[event.key] = inside
            kept[inside].add(event.key)
        elif event.kind == "free" and event.key in owners:
            kept[owners[event.key]].discard(event.key)
    return [frozenset(keys - outputs[number]) for number, keys in enumerate(kept)]


def with_checkpointing(trace: TrainingTrace, count: int) -> list[Event]:
    """The step's events as they would be with the first `count` units checkpointed.

    A chosen unit's activations are freed at its end, and made again, with all that its forward pass makes in
    passing, where its backward pass begins.
    """
    chosen = {unit.number: unit for unit in trace.units[:count]}
    forward: dict[int, list[Event]] = {number: [] for number in chosen}
    events: list[Event] = []
    inside: int | None = None
    for event in trace.step:
        if event.kind == "backward":
            events += forward.pop(event.key, [])
            continue
        if event.kind == "enter" and event.key in chosen:
            inside = event.key
        elif event.kind == "leave" and inside is not None:
            events += [Event("free", key, 0) for key in sorted(chosen[inside].freed)]
            inside = None
        elif event.kind in ("allocate", "free", "workspace"):
            events.append(event)
            if inside is not None and event.kind != "workspace" and event.key not in trace.outputs[inside]:
                forward[inside].append(event)
    return events


def forecast_training(
    trace: TrainingTrace, preview: Sequence[Event], count: int, budget: float = inf
) -> MemoryForecast:
    """Peak memory of training with the first `count` units checkpointed.

    Args:
        preview: from `MetaTrainingRun.preview`.
        budget: bytes that may be reserved; near it PyTorch's allocator gives up what it has cached.

    Raises:
        MemoryError: the budget does not do.
    """
    step = with_checkpointing(trace, count)
    lasting = CachingAllocator(budget - _KERNEL_SCRATCH)
    replay_events(trace.setup, lasting)
    for thread in range(_THREADS if trace.recorded else 0):  # attention was tried out on the default stream
        lasting.allocate(("tried", thread), CUBLAS_WORKSPACE)
    lasting.empty_cache()  # as PyTorch does before it records a graph
    lasting.peak_reserved = lasting.reserved
    held, beside, most = lasting.allocated, 0, 0
    if trace.recorded:
        calls, passing = record_events(step, lasting)
        beside, most = calls.reserved + passing.reserved, lasting.reserved + calls.peak_reserved
    else:
        replay_events(step, passing := lasting)
    activations = passing.peak_allocated - _THREADS * CUBLAS_WORKSPACE - (0 if trace.recorded else held)
    lasting.limit -= beside
    if lasting.reserved > lasting.limit:
        raise MemoryError(f"a recorded step takes {lasting.reserved + beside} bytes")
    lasting.allocate("optimizer", trace.optimizer)
    lasting.allocate("update", trace.update)
    lasting.release("update")
    before = lasting.peak_allocated = lasting.allocated
    replay_events(preview, lasting)
    previews = max(0, lasting.peak_allocated - before - (0 if trace.recorded else activations))
    parts = {
        "weights": trace.weights,
        "adapters": trace.adapters,
        "optimizer": trace.optimizer,
        "activations": activations,
        "previews": previews,
        "workspace": _KERNEL_SCRATCH + CUBLAS_WORKSPACE * _THREADS * (3 if trace.recorded else 1),
    }
    total = _KERNEL_SCRATCH + max(most, lasting.peak_reserved + beside)
    return MemoryForecast(**parts, cache=total - sum(parts.values()))


def record_events(
    step: Sequence[Event], lasting: CachingAllocator
) -> tuple[CachingAllocator, CachingAllocator]:
    """The memory of the calls before a capture, and that of the capture itself (`GraphedCallable`).

    Each has a stream, a pool and workspaces of its own. What the calls had cached is given up, but for the
    segments in which their workspaces lie.

    Raises:
        MemoryError: the calls do not fit below the limit of `lasting`.
    """
    calls = CachingAllocator(lasting.limit - lasting.reserved)
    replay_events(step, calls)
    calls.empty_cache()
    graph = CachingAllocator()  # while it is recorded nothing can be given up
    replay_events(step, graph)
    return calls, graph


def replay_events(events: Iterable[Event], allocator: CachingAllocator) -> None:
    """Lets the allocator serve the allocations of `events`."""
    for event in events:
        if event.kind == "allocate":
            allocator.allocate(event.key, event.size)
        elif event.kind == "workspace":
            allocator.allocate(("workspace", event.key), CUBLAS_WORKSPACE)
        elif event.kind == "free":
            allocator.release(event.key)


def live_bytes(events: Iterable[Event]) -> int:
    """What is still allocated after `events`."""
    sizes: dict[int, int] = {}
    for event in events:
        if event.kind == "allocate":
            sizes[event.key] = event.size
        elif event.kind == "free":
            del sizes[event.key]
    return sum(sizes.values())
