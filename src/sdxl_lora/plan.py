"""What a recipe will take of a GPU's memory, and on which cards it fits: `python -m sdxl_lora.plan`.

Needs neither a GPU nor the base model's weights.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from math import inf
from pathlib import Path

import torch

from sdxl_lora.config import Params, load_params
from sdxl_lora.forecast import Forecast, Workload
from sdxl_lora.hardware import GIB
from sdxl_lora.paths import PARAMS
from sdxl_lora.phases import InferenceTrace, forecast_inference, trace_encoding, trace_sampling
from sdxl_lora.planning import Plan, Planner, refusal
from sdxl_lora.shapes import read_shapes

CARDS = (8, 10, 12, 16, 24)
USABLE = 0.9
"""Share of a card's nominal memory that PyTorch can have. The rest is ECC's, the driver's and CUDA's own: a
T4 of 16 GB shows 14.75 GiB, of which CUDA takes some 0.3."""


def plan_recipe(params: Params) -> Iterator[str]:
    """The forecast as text, piece by piece as it is made."""
    shapes = read_shapes(params.model)
    side = params.encoding.resolution // shapes.pixels_per_latent
    trained = params.model.text_encoders != "frozen"
    work = Workload(shapes, trained, params.lora, params.training, torch.Size((1, 4, side, side)))
    planner, budget = Planner(work), params.training.vram_gib
    limit = inf if budget is None else budget * GIB
    plan = planner.fastest(limit)
    others = {"encode": trace_encoding(shapes, params), "sample": trace_sampling(shapes, params)}
    if plan is None:
        shown = planner.smallest()
        yield refusal(work, shown)
    else:
        shown = planner.exact(plan, limit)
        yield (
            f"training.vram_gib {budget:g}: {description(shown, work)}"
            if budget
            else description(shown, work)
        )
    assert shown.forecast is not None
    encode, sample = (forecast_inference(trace) for trace in others.values())
    yield phase_table({"encode": encode, "train": shown.forecast, "sample": sample})
    yield f"A card leaves about {USABLE:.0%} of its memory to PyTorch:"
    for card in CARDS:
        yield card_line(card, planner.fastest(card * USABLE * GIB), others, work)


def phase_table(phases: Mapping[str, Forecast]) -> str:
    """Peak memory by part and phase, GiB."""
    rows = [f"{'peak GPU memory, GiB':22}" + "".join(f"{name:>9}" for name in phases)]
    for part in (*asdict(next(iter(phases.values()))), "total"):
        values = [forecast.gib()[part] for forecast in phases.values()]
        rows.append(f"  {part:20}" + "".join(f"{value:9.2f}" if value else f"{'-':>9}" for value in values))
    return "\n".join(rows)


def card_line(card: int, plan: Plan | None, others: Mapping[str, InferenceTrace], work: Workload) -> str:
    """Whether the recipe fits on a card of so many GiB, and with which plan."""
    usable = card * USABLE
    verdicts = [f"trains in {description(plan, work)}" if plan else "training does not fit"]
    verdicts += [f"{name} does not fit" for name, trace in others.items() if not fits(trace, usable * GIB)]
    return f"  {card:3} GiB ({usable:4.1f})  " + "; ".join(verdicts)


def fits(trace: InferenceTrace, budget: float) -> bool:
    try:
        forecast_inference(trace, budget)
    except MemoryError:
        return False
    return True


def description(plan: Plan, work: Workload) -> str:
    """A plan in words."""
    assert plan.forecast is not None
    size, total = plan.micro_batch_size, plan.forecast.total / GIB
    words = f"{total:.1f} GiB: {size} of {work.config.batch_size} examples at once"
    if plan.checkpointed:
        return f"{words}, {len(plan.checkpointed)} blocks checkpointed ({plan.recomputed:+.0%} arithmetic)"
    return f"{words}, no checkpointing"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sdxl_lora.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=PARAMS, help=f"default: {PARAMS}")
    parser.add_argument("--vram", type=float, metavar="GIB", help="in place of training.vram_gib")
    arguments = parser.parse_args()
    try:
        params = load_params(arguments.recipe)
        if arguments.vram is not None:
            training = params.training.model_copy(update={"vram_gib": arguments.vram})
            params = params.model_copy(update={"training": training})
        for text in plan_recipe(params):
            print(text, flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"plan: {error}")


if __name__ == "__main__":
    main()
