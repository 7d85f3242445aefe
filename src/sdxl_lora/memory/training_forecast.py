"""Peak GPU memory of training, by part, before any weight is loaded.

Replays the events of one traced step through the arithmetic of PyTorch's allocator, for any number of
checkpointed units. Knows no tensor and no model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import inf

from sdxl_lora.memory.caching_allocator import MIB, CachingAllocator
from sdxl_lora.memory.trace import Allocate, EnterBackward, Event, Free, LeaveUnit, NeedWorkspace
from sdxl_lora.memory.training_trace import TrainingTrace
from sdxl_lora.storage.atomic_io import GIB
from sdxl_lora.training.optimizers import OPTIMIZERS

CUBLAS_WORKSPACE = 32 * MIB
"""Scratch memory of cuBLAS for each thread and stream: CUBLAS_WORKSPACE_CONFIG is :4096:8, 8 times 4 MiB."""
_THREADS = 2
"""The thread of the forward pass and that of autograd."""
_STEP_WORKSPACES = _THREADS * CUBLAS_WORKSPACE
_KERNEL_SCRATCH = 64 * MIB
"""Scratch memory of other kernels, which no trace sees. Measured peaks were above the rest of a forecast
by -0.05 to 0.04 GiB in seven configurations of 5 to 22 GiB on an H100."""


@dataclass(frozen=True)
class MemoryForecast:
    """Peak GPU memory that PyTorch reserves in a phase, by part, bytes; without that of the CUDA context."""

    weights: int
    """Weights of the base model."""
    adapters: int
    """Trained weights: fp32 master, gradient, copy to compute with, moving average."""
    optimizer: int
    """The optimizer's state."""
    activations: int
    """Tensors of a step or a forward pass, at the moment when they take most."""
    previews: int
    """Memory that previews add to that of a training step."""
    cache: int
    """Reserved by PyTorch's allocator and not in use: rounding, and gaps too small for any request."""
    workspace: int
    """Scratch memory of kernels, mainly of cuBLAS."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def gib(self) -> dict[str, float]:
        """Return the parts and their total, GiB."""
        return {name: value / GIB for name, value in {**asdict(self), "total": self.total}.items()}


@dataclass(frozen=True)
class _StepMemory:
    """Memory of one training step, bytes."""

    activations: int
    """Peak of its tensors."""
    graph_reserved: int
    """Reserved next to the main pool from the first step to the end of training."""
    capture_peak: int
    """Most bytes that are reserved at once while a CUDA graph is captured; 0 without a graph."""


def with_checkpointing(trace: TrainingTrace, count: int) -> list[Event]:
    """Return the step's events as they would be with the first `count` units checkpointed.

    A checkpointed unit frees its activations at the end of its forward pass. Where its backward pass begins
    it allocates them again, and all else that its forward pass allocates and frees.
    """
    chosen = trace.units[:count]
    freed = {unit.number: [Free(key) for key in sorted(unit.freed)] for unit in chosen}
    recomputations = {unit.number: unit.recomputation for unit in chosen}
    events: list[Event] = []
    for event in trace.step:
        match event:
            case LeaveUnit(number):
                events += freed.get(number, [])
            case EnterBackward(number):
                events += recomputations.pop(number, ())  # once, though each output has such an event
            case Allocate() | Free() | NeedWorkspace():
                events.append(event)
    return events


def forecast_training(
    trace: TrainingTrace, preview: Sequence[Event], count: int, budget: float = inf
) -> MemoryForecast:
    """Return the peak memory of training with the first `count` units checkpointed.

    The main pool serves the weights, the optimizer, previews, and the step if no CUDA graph runs it. A graph
    has another pool, and the calls before its capture leave segments of theirs behind.

    Args:
        trace: of a step without checkpointing.
        preview: from `MetaTrainingRun.preview`.
        count: how many of `trace.units` are checkpointed.
        budget: bytes that may be reserved; near it PyTorch's allocator returns what it has cached.

    Raises:
        MemoryError: the budget is too small.
    """
    step = with_checkpointing(trace, count)
    main_pool = CachingAllocator(budget - _KERNEL_SCRATCH)
    replay_events(trace.setup, main_pool)
    if trace.is_graphed:  # the measurement of attention runs on the default stream: `choose_attention`
        for thread in range(_THREADS):
            main_pool.allocate(("attention", thread), CUBLAS_WORKSPACE)
    main_pool.empty_cache()  # as PyTorch does before it captures a graph
    main_pool.reset_peaks()  # set-up never takes more than the steps after it
    memory = _capture_step(step, main_pool) if trace.is_graphed else _run_step(step, main_pool)
    # From here on the graph's memory is gone for good, and all else has to fit into the rest of the budget.
    main_pool.limit -= memory.graph_reserved
    if main_pool.reserved > main_pool.limit:
        raise MemoryError(f"a captured step takes {main_pool.reserved + memory.graph_reserved} bytes")
    spec = OPTIMIZERS[trace.spec.config.optimizer]
    optimizer = spec.state_bytes(trace.num_parameters)
    main_pool.allocate("optimizer", optimizer)
    main_pool.allocate("update", spec.update_bytes(trace.num_parameters))
    main_pool.release("update")
    between_steps = main_pool.allocated
    preview_peak = replay_events(preview, main_pool) - between_steps
    # Without a graph, previews reuse the step's activations, which are free between steps. A graph keeps
    # them.
    reused = 0 if trace.is_graphed else memory.activations
    parts = {
        "weights": trace.weights,
        "adapters": trace.adapters,
        "optimizer": optimizer,
        "activations": memory.activations,
        "previews": max(0, preview_peak - reused),
        # With a graph: the default stream's, those of the calls before the capture, and those of the capture.
        "workspace": _KERNEL_SCRATCH + _STEP_WORKSPACES * (3 if trace.is_graphed else 1),
    }
    total = _KERNEL_SCRATCH + max(memory.capture_peak, main_pool.peak_reserved + memory.graph_reserved)
    return MemoryForecast(**parts, cache=total - sum(parts.values()))


def _run_step(step: Sequence[Event], main_pool: CachingAllocator) -> _StepMemory:
    """Replay a step that no CUDA graph runs, in the main pool.

    Raises:
        MemoryError: it does not fit below the limit of `main_pool`.
    """
    persistent_bytes = main_pool.allocated
    peak = replay_events(step, main_pool)
    return _StepMemory(peak - persistent_bytes - _STEP_WORKSPACES, graph_reserved=0, capture_peak=0)


def _capture_step(step: Sequence[Event], main_pool: CachingAllocator) -> _StepMemory:
    """Replay a step that a CUDA graph runs, next to the main pool.

    Raises:
        MemoryError: the calls before the capture do not fit below the limit of `main_pool`.
    """
    warmup_pool, step_pool = replay_capture(step, main_pool)
    return _StepMemory(
        activations=step_pool.peak_allocated - _STEP_WORKSPACES,
        graph_reserved=warmup_pool.reserved + step_pool.reserved,
        capture_peak=main_pool.reserved + warmup_pool.peak_reserved,
    )


def replay_capture(
    step: Sequence[Event], main_pool: CachingAllocator
) -> tuple[CachingAllocator, CachingAllocator]:
    """Return the pool of the calls before a capture, and that of the capture itself (`GraphedCallable`).

    Each has a stream and workspaces of its own. What the calls had cached is returned to the GPU, except for
    the segments in which their workspaces lie.

    Raises:
        MemoryError: the calls do not fit below the limit of `main_pool`.
    """
    warmup_pool = CachingAllocator(main_pool.limit - main_pool.reserved)
    replay_events(step, warmup_pool)
    warmup_pool.empty_cache()
    # Without a limit, since PyTorch returns no cached memory during a capture: the caller compares the sum.
    step_pool = CachingAllocator()
    replay_events(step, step_pool)
    return warmup_pool, step_pool


def replay_events(events: Iterable[Event], pool: CachingAllocator) -> int:
    """Serve the allocations of `events` from a pool.

    Returns:
        The most bytes of the pool that were in use at once.
    """
    peak = pool.allocated
    for event in events:
        match event:
            case Allocate(key, size):
                pool.allocate(key, size)
            case NeedWorkspace(thread):
                pool.allocate(("workspace", thread), CUBLAS_WORKSPACE)
            case Free(key):
                pool.release(key)
        peak = max(peak, pool.allocated)
    return peak
