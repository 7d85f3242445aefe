"""`sdxl-lora plan`: a recipe's peak GPU memory by phase, and the cards that it fits.

Needs neither a GPU nor the base model's weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from math import inf
from pathlib import Path

import torch

from sdxl_lora.config import Params, load_params
from sdxl_lora.memory.inference_forecast import fits, forecast_inference, trace_encoding, trace_sampling
from sdxl_lora.memory.planner import ForecastPlan, Planner, shortage
from sdxl_lora.memory.savings import minimum_memory_with
from sdxl_lora.memory.training_forecast import MemoryForecast
from sdxl_lora.memory.training_trace import TrainingSpec
from sdxl_lora.models.architecture import read_architecture
from sdxl_lora.runtime.device import CUDA_CONTEXT
from sdxl_lora.storage.atomic_io import GIB

CARDS = (8, 10, 12, 16, 24)
_USABLE_SHARE = 0.92
"""Share of a card's nominal memory for programs: 14.75 GiB of a T4's 16. ECC and driver take the rest."""
MEANINGS = {
    "weights": "of the base model",
    "adapters": "trained weights, their copies and gradients",
    "optimizer": "moments of AdamW",
    "activations": "largest amount during a pass",
    "previews": "one image through UNet and VAE during training",
    "cache": "held by PyTorch, not in use",
    "workspace": "scratch memory of kernels",
}
_NOT_INCLUDED = f"""\
Not included: CUDA's context ({CUDA_CONTEXT / GIB:.1f} GiB on an H100), a screen, other programs.
Not forecast: evaluate_lora and main memory."""


def run_plan(recipe: Path, vram_gib: float | None) -> None:
    """Print the forecast of a params file, piece by piece.

    Args:
        vram_gib: GPU memory for training, GiB; None: training.vram_gib of the file.

    Raises:
        ValueError: the file does not fit the schema.
        FileNotFoundError: it does not exist.
    """
    params = load_params(recipe)
    if vram_gib is not None:
        training = params.training.model_copy(update={"vram_gib": vram_gib})
        params = params.model_copy(update={"training": training})
    for text in plan_recipe(params):
        print(text, flush=True)


def plan_recipe(params: Params) -> Iterator[str]:
    """Yield the forecast as text, piece by piece as it is made."""
    shapes = read_architecture(params.model)
    side = params.encoding.resolution // shapes.pixels_per_latent
    trained = params.model.text_encoders != "frozen"
    spec = TrainingSpec(shapes, trained, params.lora, params.training, torch.Size((1, 4, side, side)))
    planner, budget = Planner(spec), params.training.vram_gib
    limit = inf if budget is None else budget * GIB
    plan = planner.fastest(limit)
    others = {"encode": trace_encoding(shapes, params), "sample": trace_sampling(shapes, params)}
    tight = {"train"} if plan is None else set()
    shown = planner.smallest() if plan is None else planner.exact(plan, limit)
    yield (
        f"{shortage(spec, shown)}; see the end for what lowers it."
        if plan is None
        else _headline(shown, spec)
    )
    encode, sample = (forecast_inference(trace) for trace in others.values())
    yield _phase_table({"encode": encode, "train": shown.forecast, "sample": sample})
    yield _NOT_INCLUDED
    yield "\nCards, with training.vram_gib set to what each leaves to PyTorch (in brackets):"
    for card in CARDS:
        usable = card * _USABLE_SHARE * GIB - CUDA_CONTEXT
        plan = planner.fastest(usable)
        failing = [name for name, trace in others.items() if not fits(trace, usable)]
        tight |= {*failing, *([] if plan else ["train"])}
        yield _card_line(card, usable, plan, failing, spec)
    if tight:
        yield "\nSettings that lower the memory of what does not fit:"
        for phase, setting in minimum_memory_with(params, tight):
            yield f"  {phase:7} {setting}"


def _headline(plan: ForecastPlan, spec: TrainingSpec) -> str:
    """Return a line on the plan for these params, and on how to pin it."""
    budget, config = spec.config.vram_gib, spec.config
    allowed = "Without training.vram_gib" if budget is None else f"Within training.vram_gib {budget:g}"
    pinned = plan.applied_to(config)
    line = f"{allowed}: {_plan_description(plan, spec)}."
    if pinned == config:
        return line
    return (
        f"{line}\nTo pin this plan: training.micro_batch_size {pinned.micro_batch_size}, "
        f"training.checkpointing {pinned.checkpointing}."
    )


def _phase_table(phases: Mapping[str, MemoryForecast]) -> str:
    """Peak memory by part and phase, GiB, with what the parts are."""
    rows = [f"{'peak GPU memory, GiB':22}" + "".join(f"{name:>9}" for name in phases)]
    most = max(phases, key=lambda name: phases[name].total)
    for part in (*asdict(phases[most]), "total"):
        values = [forecast.gib()[part] for forecast in phases.values()]
        cells = "".join(f"{value:9.2f}" if value else f"{'-':>9}" for value in values)
        rows.append(f"  {part:20}{cells}   {MEANINGS.get(part, f'most: {most}')}")
    return "\n".join(rows)


def _card_line(
    card: int, usable: float, plan: ForecastPlan | None, failing: list[str], spec: TrainingSpec
) -> str:
    """Whether the recipe fits on a card, and with which plan.

    Args:
        card: nominal memory, GiB.
        usable: bytes of it that PyTorch can have.
        failing: other phases that do not fit.
    """
    verdicts = [f"trains {_plan_description(plan, spec)}" if plan else "train does not fit"]
    verdicts += [f"{name} does not fit" for name in failing]
    return f"  {card:3} GiB ({usable / GIB:4.1f})  " + "; ".join(verdicts)


def _plan_description(plan: ForecastPlan, spec: TrainingSpec) -> str:
    """Return a plan as text."""
    size, total = plan.micro_batch_size, plan.forecast.total / GIB
    words = f"{size} of {spec.config.batch_size} examples at once in {total:.1f} GiB"
    if plan.checkpointed:
        return f"{words}, {len(plan.checkpointed)} blocks checkpointed ({plan.recomputed:+.0%} arithmetic)"
    return f"{words}, no checkpointing"
