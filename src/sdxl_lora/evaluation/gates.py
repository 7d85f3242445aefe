"""What an adapter must reach to be promoted, and whether it does."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sdxl_lora.config import GatesConfig


@dataclass(frozen=True)
class Gate:
    """One demand and what became of it."""

    name: str
    """Its key in `evaluation.gates`."""
    figure: str
    """What was measured, in words."""
    value: float | None
    """None: it was not measured."""
    limit: float
    passed: bool
    reason: str
    """Why it failed; empty if it passed."""


def evaluate_gates(metrics: Mapping[str, Any], config: GatesConfig) -> list[Gate]:
    """Every demand that `config` makes, held against the figures of `metrics.json`.

    A demand on something that was not measured fails.
    """
    demands = [
        ("held_out_loss_change", "at_most", ("held_out_loss", "change_percent_high")),
        ("style_distance_change", "at_most", ("change", "style_distance", "high")),
        ("style_probability", "at_least", ("style_probability", "adapter")),
        ("clip_score_change", "at_least", ("change", "clip_score", "mean")),
        ("diversity_kept", "at_least", ("diversity_kept",)),
        ("copied", "at_most", ("copied", "adapter")),
    ]
    limits = config.model_dump()
    assert set(limits) == {name for name, _, _ in demands}, "every key of evaluation.gates is judged"
    return [
        _gate(name, ".".join(figure), _figure_at(metrics, figure), bound, limits[name])
        for name, bound, figure in demands
        if limits[name] is not None
    ]


def _gate(name: str, figure: str, value: float | None, bound: str, limit: float) -> Gate:
    if value is None:
        return Gate(name, figure, None, limit, False, f"{figure} was not measured")
    passed = value <= limit if bound == "at_most" else value >= limit
    wanted = bound.replace("_", " ")
    reason = "" if passed else f"{figure} is {value:.4g}, should be {wanted} {limit:g}"
    return Gate(name, figure, value, limit, passed, reason)


def _figure_at(metrics: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    """The figure under these keys; None if there is none."""
    for key in keys:
        if key not in metrics:
            return None
        metrics = metrics[key]
    value: Any = metrics
    return float(value)


def gate_verdict(gates: list[Gate]) -> dict[str, int]:
    """1 for what passed and 0 for what failed, by gate and in all."""
    return {"all": int(all(gate.passed for gate in gates)), **{gate.name: int(gate.passed) for gate in gates}}


def failures(path: Path) -> dict[str, str]:
    """Why gates failed, by gate, from the table that evaluation wrote; empty if all passed or none was asked.

    Raises:
        FileNotFoundError: nothing was evaluated.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: run `dvc repro evaluate_lora` first")
    gates = pd.read_csv(path)
    failed = gates[~gates["passed"].astype(bool)]
    return dict(zip(failed["name"], failed["reason"], strict=True))
