"""Gates: the limits that an adapter's metrics must meet before it may be promoted."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sdxl_lora.config import GatesConfig


@dataclass(frozen=True)
class Gate:
    """One limit and whether the adapter meets it."""

    name: str
    """Its key in `evaluation.gates`."""
    figure: str
    """Path of the figure in metrics.json, joined by dots."""
    value: float | None
    """None if the figure was not measured."""
    limit: float
    passed: bool
    reason: str
    """Why it failed; empty if it passed."""


def evaluate_gates(metrics: Mapping[str, Any], config: GatesConfig) -> list[Gate]:
    """Compare the figures of metrics.json with every limit that `config` sets.

    A gate whose figure was not measured fails.
    """
    gates = [
        ("held_out_loss_change", "at_most", ("held_out_loss", "change_percent_high")),
        ("style_distance_change", "at_most", ("change", "style_distance", "high")),
        ("style_probability", "at_least", ("style_probability", "adapter")),
        ("clip_score_change", "at_least", ("change", "clip_score", "mean")),
        ("diversity_kept", "at_least", ("diversity_kept",)),
        ("copied", "at_most", ("copied", "adapter")),
    ]
    limits = config.model_dump()
    assert set(limits) == {name for name, _, _ in gates}, "every key of evaluation.gates has a gate"
    return [
        _evaluate_gate(name, ".".join(figure), _figure_at(metrics, figure), bound, limits[name])
        for name, bound, figure in gates
        if limits[name] is not None
    ]


def _evaluate_gate(name: str, figure: str, value: float | None, bound: str, limit: float) -> Gate:
    if value is None:
        return Gate(name, figure, None, limit, False, f"{figure} was not measured")
    passed = value <= limit if bound == "at_most" else value >= limit
    wanted = bound.replace("_", " ")
    reason = "" if passed else f"{figure} is {value:.4g}, should be {wanted} {limit:g}"
    return Gate(name, figure, value, limit, passed, reason)


def _figure_at(metrics: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    """Return the figure under these keys; None if there is none."""
    for key in keys:
        if key not in metrics:
            return None
        metrics = metrics[key]
    value: Any = metrics
    return float(value)


def gate_verdict(gates: list[Gate]) -> dict[str, int]:
    """Return 1 for passed and 0 for failed, for each gate and, under `all`, for all of them."""
    return {"all": int(all(gate.passed for gate in gates)), **{gate.name: int(gate.passed) for gate in gates}}


def read_gate_failures(path: Path) -> dict[str, str]:
    """Read from the table of gates why each failed gate failed; empty if all passed or there are none.

    Raises:
        FileNotFoundError: nothing was evaluated.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: run `dvc repro evaluate_lora` first")
    gates = pd.read_csv(path)
    failed = gates[~gates["passed"].astype(bool)]
    return dict(zip(failed["name"], failed["reason"], strict=True))
