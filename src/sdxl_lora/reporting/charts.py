"""Charts as SVG elements for pages without scripts and network: lines, a stacked bar, a histogram.

Texts stay texts, so a chart is 10 to 20 KB. Equal numbers give equal bytes whatever the user's Matplotlib
settings.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from itertools import accumulate

import matplotlib as mpl
import matplotlib.style
from markupsafe import Markup
from matplotlib.figure import Figure

_INK, _LIMIT = "#5b6675", "#b91c1c"
_LINES = ("#8a94a6", "#c2410c", "#0f766e")
_PARTS = ("#334155", "#0f766e", "#b45309", "#0369a1", "#7c3aed", "#94a3b8", "#cbd5e1")
_STYLE = {
    "svg.fonttype": "none",  # the browser's fonts, instead of an outline for each letter
    "svg.hashsalt": "sdxl-lora",  # ids depend on the content only
    "text.parse_math": False,  # a `$` in a name is a `$`
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.grid.axis": "y",
    "grid.color": "#e3e7ed",
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


class _Chart:
    """A figure that is drawn in a `with _chart(...)` block; `svg` is its SVG element afterwards."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_subplot()
        self.svg = Markup("")


@contextmanager
def _chart(label: str, height: float, width: float = 5.6) -> Iterator[_Chart]:
    """Draw a chart in the block, with our style and no other.

    Args:
        label: the chart in words, for screen readers.
        height: inches, of 96 CSS pixels.
        width: inches.
    """
    with mpl.style.context(["default", _STYLE]):  # `default` undoes the user's matplotlibrc
        chart = _Chart(width, height)
        yield chart
        stream = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # version, time and addresses
        chart.figure.savefig(stream, format="svg", transparent=True, metadata=no_metadata)
    text = stream.getvalue()
    element = text[text.index("<svg ") :]  # without XML declaration and document type
    # In HTML an SVG element needs no namespaces, and the pages must not name other hosts.
    element = re.sub(r' xmlns(:\w+)?="[^"]*"', "", element)
    chart.svg = Markup(element.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))


def line_chart(x: Sequence[float], lines: Mapping[str, Sequence[float]], x_label: str, log: bool) -> Markup:
    """Return a chart with one line a name, and a legend.

    Args:
        x: whole numbers, such as steps.
        lines: positive if `log`.
        log: whether the vertical axis is logarithmic; otherwise it starts at 0.
    """
    with _chart(", ".join(lines), height=2.4) as chart:
        for number, (name, values) in enumerate(lines.items()):
            marker = "o" if len(x) == 1 else ""  # a line of one point cannot be seen
            colour = _LINES[number % len(_LINES)]
            chart.axes.plot(x, values, marker=marker, color=colour, label=name, gid=f"line-{number}")
        chart.axes.set_xlabel(x_label)
        chart.axes.locator_params(axis="x", integer=True)
        chart.axes.grid(axis="y")
        chart.axes.legend()
        if log:
            chart.axes.set_yscale("log")
            chart.axes.yaxis.set_major_formatter("{x:g}")  # not 10^-2, which is set by `parse_math`
        else:
            chart.axes.set_ylim(bottom=0)
    return chart.svg


def stacked_bar(parts: Mapping[str, float], mark: float, mark_label: str, unit: str) -> Markup:
    """Return a bar whose parts add up, a mark on their axis, and a legend with all values.

    Args:
        parts: not negative; those that are 0 are left out.
        mark: a value to compare with the sum.
    """
    shown = {name: value for name, value in parts.items() if value}
    with _chart(", ".join(shown), height=1.0 + 0.18 * len(shown)) as chart:
        starts = accumulate(shown.values(), initial=0.0)
        for number, ((name, value), start) in enumerate(zip(shown.items(), starts, strict=False)):
            colour, label = _PARTS[number % len(_PARTS)], f"{name}: {value:.2f} {unit}"
            chart.axes.barh(0, value, left=start, color=colour, label=label, gid=f"bar-{number}")
        chart.axes.axvline(mark, color=_LIMIT, linewidth=2, gid="mark")
        chart.axes.set_title(mark_label, fontsize="medium")
        chart.axes.set_xlabel(unit)
        chart.axes.set_yticks([])
        chart.figure.legend(loc="outside lower center", ncols=2)
    return chart.svg


def token_histogram(tokens: Sequence[int], limit: int) -> Markup:
    """Return a histogram of captions by their number of CLIP tokens, with a bar for each number.

    Args:
        tokens: of each caption.
        limit: captions.max_tokens; longer captions have another colour.
    """
    counts = dict(sorted(Counter(tokens).items()))
    with _chart("Histogram of caption lengths", height=2.4, width=9) as chart:
        colours = [_LIMIT if length > limit else "#5b7fd1" for length in counts]
        bars = chart.axes.bar(list(counts), list(counts.values()), width=0.9, color=colours)
        for length, bar in zip(counts, bars, strict=True):
            bar.set_gid(f"tokens-{length}")
        chart.axes.axvline(limit + 0.5, color=_LIMIT, linestyle="--", linewidth=1, gid="limit")
        chart.axes.set_xlim(0, max(limit, *counts) + 1)
        chart.axes.set_xlabel(f"CLIP tokens; the limit is {limit}")
        chart.axes.set_ylabel("captions")
        chart.axes.locator_params(axis="y", integer=True)
    return chart.svg
