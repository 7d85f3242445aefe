"""What to write into params so that a phase takes less GPU memory, and how little will then do."""

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator
from functools import partial, reduce
from math import ceil
from typing import TypeVar

from sdxl_lora.config import Params
from sdxl_lora.memory.inference_forecast import (
    InferenceTrace,
    fits,
    forecast_inference,
    trace_encoding,
    trace_sampling,
)
from sdxl_lora.memory.planner import STEPS_A_GIB, Planner, changes, needed_gib, resolution_name, with_side
from sdxl_lora.memory.training_forecast import Workload
from sdxl_lora.models.architecture import Shapes
from sdxl_lora.storage.atomic_io import GIB

Subject = TypeVar("Subject")
Changes = dict[str, Callable[[Subject], Subject]]
"""By what to write into params."""
GRID = 64  # pixels: a multiple of it passes through every level of the UNet
TILE = 512  # pixels


def economies(params: Params, work: Workload, phases: Collection[str]) -> Iterator[tuple[str, str, float]]:
    """Changes of params for each of `phases`, with the least memory that then does.

    Args:
        phases: of `train`, `sample` and `encode`.

    Yields:
        Phase, what to write into params, GiB: of params as they are, of each change, of all together.
    """
    found = {
        "train": leasts(work, training_changes(work), least_of_training),
        "sample": leasts(params, sampling_changes(params), partial(least_of_inference, trace_sampling, work)),
        "encode": leasts(params, encoding_changes(params), partial(least_of_inference, trace_encoding, work)),
    }
    for phase, rows in found.items():
        if phase in phases:
            yield from ((phase, name, least) for name, least in rows)


def leasts(
    subject: Subject, ways: Changes[Subject], least: Callable[[Subject], float]
) -> Iterator[tuple[str, float]]:
    """The least GiB of `subject` as it is, with each change, and with all of several."""
    yield "as it is", least(subject)
    for name, change in ways.items():
        yield name, least(change(subject))
    if len(ways) > 1:
        yield "all of these", least(reduce(lambda changed, change: change(changed), ways.values(), subject))


def training_changes(work: Workload) -> Changes[Workload]:
    """What makes training take less: the planner's proposals, and a lower resolution."""
    pixels = work.shapes.pixels_per_latent
    found = changes(work)
    if side := lower(work.latents[-1] * pixels) // pixels:
        found[resolution_name(work, side)] = partial(with_side, side=side)
    return found


def sampling_changes(params: Params) -> Changes[Params]:
    """What makes sampling take less."""
    config, found = params.sampling, Changes[Params]()
    if config.batch_size > 1:
        found["sampling.batch_size 1"] = partial(with_keys, section="sampling", batch_size=1)
    if resolution := lower(config.resolution):
        change = partial(with_keys, section="sampling", resolution=resolution)
        found[f"sampling.resolution {resolution}"] = change
    return found


def encoding_changes(params: Params) -> Changes[Params]:
    """What makes encoding take less."""
    config, found = params.encoding, Changes[Params]()
    if config.batch_size > 1:
        found["encoding.batch_size 1"] = partial(with_keys, section="encoding", batch_size=1)
    if config.vae_tile is None and config.resolution > TILE:
        found[f"encoding.vae_tile {TILE}"] = partial(with_keys, section="encoding", vae_tile=TILE)
    return found


def lower(resolution: int) -> int:
    """Three quarters of a resolution in pixels, on the grid; 0 if there is none so low."""
    return resolution * 3 // 4 // GRID * GRID


def with_keys(params: Params, section: str, **update: object) -> Params:
    """`params` with some keys of a section changed."""
    return params.model_copy(update={section: getattr(params, section).model_copy(update=update)})


def least_of_training(work: Workload) -> float:
    """The least memory in which a training goes through, GiB, rounded up."""
    return needed_gib(Planner(work).smallest())


def least_of_inference(
    trace_phase: Callable[[Shapes, Params], InferenceTrace], work: Workload, params: Params
) -> float:
    """The least memory in which another phase goes through, GiB, rounded up."""
    trace = trace_phase(work.shapes, params)
    budgets = range(1, ceil(forecast_inference(trace).total / GIB * STEPS_A_GIB) + 1)
    index = bisect_left(budgets, True, key=lambda steps: fits(trace, steps * GIB / STEPS_A_GIB))
    return budgets[min(index, len(budgets) - 1)] / STEPS_A_GIB
