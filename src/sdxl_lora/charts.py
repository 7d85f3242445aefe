"""Line charts as SVG: what a page without scripts and network can draw. Knows numbers, no files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 240  # pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 24, 30  # pixels round the plot
COLOURS = ("#8a94a6", "#c2410c", "#0f766e")
TICKS = 4


@dataclass(frozen=True)
class Axis:
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
            return [self.low * (self.high / self.low) ** (n / TICKS) for n in range(TICKS + 1)]
        return [self.low + (self.high - self.low) * n / TICKS for n in range(TICKS + 1)]


def line_chart(x: Sequence[float], lines: Mapping[str, Sequence[float]], x_label: str, log: bool) -> str:
    """An SVG element with one line a name, and a legend.

    Args:
        lines: positive if `log`.
        log: whether the vertical axis is logarithmic.
    """
    values = [value for line in lines.values() for value in line]
    across = Axis(min(x), max(x), LEFT, WIDTH - RIGHT)
    up = Axis(min(values) if log else 0.0, max(values), HEIGHT - BOTTOM, TOP, log)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(lines))}">']
    for tick in up.ticks():
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in across.ticks():
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{tick:.4g}</text>')
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in zip(x, line, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + 120 * number}" y="14" style="fill: {colour}">{escape(name)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="14" text-anchor="end">by {escape(x_label)}</text></svg>')
    return "".join(parts)
