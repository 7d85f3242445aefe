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
from sdxl_lora.memory.training_forecast import TrainingSpec
from sdxl_lora.models.architecture import SDXLArchitecture
from sdxl_lora.storage.atomic_io import GIB

_Subject = TypeVar("_Subject")
_Changes = dict[str, Callable[[_Subject], _Subject]]
"""By what to write into params."""
_GRID = 64  # pixels: a multiple of it passes through every level of the UNet
_TILE = 512  # pixels


def minimum_memory_with(
    params: Params, spec: TrainingSpec, phases: Collection[str]
) -> Iterator[tuple[str, str, float]]:
    """Changes of params for each of `phases`, with the least memory that then does.

    Args:
        phases: of `train`, `sample` and `encode`.

    Yields:
        Phase, what to write into params, GiB: of params as they are, of each change, of all together.
    """
    found = {
        "train": _minimum_gib(spec, _training_changes(spec), _training_minimum_gib),
        "sample": _minimum_gib(
            params, _sampling_changes(params), partial(_inference_minimum_gib, trace_sampling, spec)
        ),
        "encode": _minimum_gib(
            params, _encoding_changes(params), partial(_inference_minimum_gib, trace_encoding, spec)
        ),
    }
    for phase, rows in found.items():
        if phase in phases:
            yield from ((phase, name, least) for name, least in rows)


def _minimum_gib(
    subject: _Subject, ways: _Changes[_Subject], least: Callable[[_Subject], float]
) -> Iterator[tuple[str, float]]:
    """The least GiB of `subject` as it is, with each change, and with all of several."""
    yield "as it is", least(subject)
    for name, change in ways.items():
        yield name, least(change(subject))
    if len(ways) > 1:
        yield "all of these", least(reduce(lambda changed, change: change(changed), ways.values(), subject))


def _training_changes(spec: TrainingSpec) -> _Changes[TrainingSpec]:
    """What makes training take less: the planner's proposals, and a lower resolution."""
    pixels = spec.shapes.pixels_per_latent
    found = changes(spec)
    if side := lower(spec.latents[-1] * pixels) // pixels:
        found[resolution_name(spec, side)] = partial(with_side, side=side)
    return found


def _sampling_changes(params: Params) -> _Changes[Params]:
    """What makes sampling take less."""
    config, found = params.sampling, _Changes[Params]()
    if config.batch_size > 1:
        found["sampling.batch_size 1"] = partial(_with_params, section="sampling", batch_size=1)
    if resolution := lower(config.resolution):
        change = partial(_with_params, section="sampling", resolution=resolution)
        found[f"sampling.resolution {resolution}"] = change
    return found


def _encoding_changes(params: Params) -> _Changes[Params]:
    """What makes encoding take less."""
    config, found = params.encoding, _Changes[Params]()
    if config.batch_size > 1:
        found["encoding.batch_size 1"] = partial(_with_params, section="encoding", batch_size=1)
    if config.vae_tile is None and config.resolution > _TILE:
        found[f"encoding.vae_tile {_TILE}"] = partial(_with_params, section="encoding", vae_tile=_TILE)
    return found


def lower(resolution: int) -> int:
    """Three quarters of a resolution in pixels, on the grid; 0 if there is none so low."""
    return resolution * 3 // 4 // _GRID * _GRID


def _with_params(params: Params, section: str, **update: object) -> Params:
    """`params` with some keys of a section changed."""
    return params.model_copy(update={section: getattr(params, section).model_copy(update=update)})


def _training_minimum_gib(spec: TrainingSpec) -> float:
    """The least memory in which a training goes through, GiB, rounded up."""
    return needed_gib(Planner(spec).smallest())


def _inference_minimum_gib(
    trace_phase: Callable[[SDXLArchitecture, Params], InferenceTrace], spec: TrainingSpec, params: Params
) -> float:
    """The least memory in which another phase goes through, GiB, rounded up."""
    trace = trace_phase(spec.shapes, params)
    budgets = range(1, ceil(forecast_inference(trace).total / GIB * STEPS_A_GIB) + 1)
    index = bisect_left(budgets, True, key=lambda steps: fits(trace, steps * GIB / STEPS_A_GIB))
    return budgets[min(index, len(budgets) - 1)] / STEPS_A_GIB
