"""Line charts as SVG: what a page without scripts and network can draw. Knows numbers, no files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 240  # pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 24, 30  # pixels round the plot
_COLOURS = ("#8a94a6", "#c2410c", "#0f766e")
_SHADES = ("#334155", "#0f766e", "#b45309", "#0369a1", "#7c3aed", "#94a3b8", "#cbd5e1")
_TICKS = 4
BAR_HEIGHT, BAR_TOP = 28, 22  # pixels
_LEGEND_LINE = 20


@dataclass(frozen=True)
class _Axis:
    """Maps values onto pixels."""

    low: float
    high: float
    start: float
    """Pixel of `low`."""
    end: float
    """Pixel of `high`."""
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / ((high - low) or 1) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            return [self.low * (self.high / self.low) ** (n / _TICKS) for n in range(_TICKS + 1)]
        return [self.low + (self.high - self.low) * n / _TICKS for n in range(_TICKS + 1)]


def line_chart(x: Sequence[float], lines: Mapping[str, Sequence[float]], x_label: str, log: bool) -> str:
    """An SVG element with one line a name, and a legend.

    Args:
        lines: positive if `log`.
        log: whether the vertical axis is logarithmic.
    """
    values = [value for line in lines.values() for value in line]
    across = _Axis(min(x), max(x), LEFT, WIDTH - RIGHT)
    up = _Axis(min(values) if log else 0.0, max(values), HEIGHT - BOTTOM, TOP, log)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(lines))}">']
    for tick in up.ticks():
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in across.ticks():
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{tick:.4g}</text>')
    for number, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in zip(x, line, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + 120 * number}" y="14" style="fill: {colour}">{escape(name)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="14" text-anchor="end">by {escape(x_label)}</text></svg>')
    return "".join(parts)


def stacked_bar(parts: Mapping[str, float], mark: float, mark_label: str, unit: str) -> str:
    """An SVG element: parts side by side as one bar, a mark on their axis, and a legend with all values.

    Args:
        parts: none negative; those that are 0 are left out.
        mark: a value to hold the sum against.
    """
    shown = {name: value for name, value in parts.items() if value}
    axis = _Axis(0, max(sum(shown.values()), mark), LEFT, WIDTH - RIGHT)
    height = BAR_TOP + BAR_HEIGHT + _LEGEND_LINE * (len(shown) + 1)
    elements = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(", ".join(shown))}">']
    start = 0.0
    for number, ((name, value), colour) in enumerate(zip(shown.items(), _SHADES, strict=False)):
        x, width = axis(start), axis(start + value) - axis(start)
        y = BAR_TOP + BAR_HEIGHT + _LEGEND_LINE * (number + 1)
        elements += [
            _rectangle(x, BAR_TOP, width, BAR_HEIGHT, colour),
            _rectangle(LEFT, y - 10, 12, 12, colour),
            f'<text x="{LEFT + 20}" y="{y}">{escape(name)}: {value:.2f} {escape(unit)}</text>',
        ]
        start += value
    x = axis(mark)
    elements.append(f'<path class="mark" d="M{x:.1f} {BAR_TOP - 6}V{BAR_TOP + BAR_HEIGHT + 6}"/>')
    elements.append(f'<text x="{x:.1f}" y="14" text-anchor="end">{escape(mark_label)}</text></svg>')
    return "".join(elements)


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="{height:g}" fill="{colour}"/>'
