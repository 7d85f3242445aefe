"""Metrics of base model and adapter as rows of a table, for the model card and the run's page."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class MetricRow(NamedTuple):
    """One metric of base model and adapter."""

    name: str
    base: float
    adapter: float
    change: str
    """The adapter's change with the ends of its interval; empty if it was not measured."""


def metric_rows(metrics: Mapping[str, Any], names: Iterable[str] | None = None) -> list[MetricRow]:
    """Return a row for each metric that both base model and adapter have.

    Args:
        metrics: content of metrics.json, or one of its sections of captions.
        names: metrics to look at; None: all.
    """
    values = {name: metrics.get(name) for name in (metrics if names is None else names)}
    return [
        MetricRow(name.replace("_", " "), value["base"], value["adapter"], _change(name, metrics))
        for name, value in values.items()
        if isinstance(value, Mapping) and {"base", "adapter"} <= value.keys()
    ]


def _change(name: str, metrics: Mapping[str, Any]) -> str:
    if name == "held_out_loss":
        loss = metrics[name]
        ends = f"{loss['change_percent_low']:+.3g} to {loss['change_percent_high']:+.3g}"
        return f"{loss['change_percent']:+.3g} % ({ends})"
    if change := metrics["change"].get(name):
        return f"{change['mean']:+.3g} ({change['low']:+.3g} to {change['high']:+.3g})"
    return ""
