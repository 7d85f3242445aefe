import xml.etree.ElementTree as ElementTree

import pytest

from sdxl_lora.reporting.charts import (
    BAR_HEIGHT,
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    line_chart,
    stacked_bar,
)

SVG = "{http://www.w3.org/2000/svg}"


def drawn(chart: str) -> tuple[list[list[tuple[float, float]]], list[str]]:
    """Points of each line, and all texts."""
    root = ElementTree.fromstring(chart)
    lines = [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]
        for line in root.iter("polyline")
    ]
    return lines, [str(text.text) for text in root.iter("text")]


def test_lines_span_the_axes() -> None:
    (line,), texts = drawn(line_chart([10, 20, 30], {"loss": [4.0, 2.0, 1.0]}, "step", log=False))
    height = HEIGHT - BOTTOM - TOP
    assert [x for x, _ in line] == pytest.approx([LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT], abs=0.1)
    assert [y for _, y in line] == pytest.approx([TOP, TOP + height / 2, TOP + 3 * height / 4], abs=0.1)
    assert {"loss", "by step", "0", "4", "10", "30"} <= set(texts)


def test_equal_ratios_are_equal_heights_on_a_logarithmic_axis() -> None:
    (first, second), _ = drawn(line_chart([0, 1, 2], {"a": [1, 10, 100], "b": [1, 1, 1]}, "x", log=True))
    assert first[0][1] - first[1][1] == pytest.approx(first[1][1] - first[2][1], abs=0.2)
    assert first[0][1] == second[2][1] == HEIGHT - BOTTOM


def test_one_value_over_and_over_is_drawn_without_dividing_by_zero() -> None:
    (line,), _ = drawn(line_chart([5], {"a": [0.0]}, "x", log=False))
    assert line == [(LEFT, HEIGHT - BOTTOM)]


def test_parts_of_a_bar_lie_side_by_side_and_the_mark_on_their_axis() -> None:
    chart = stacked_bar({"a": 1.0, "nothing": 0.0, "b <&>": 3.0}, 2.0, "half", "GiB")
    root = ElementTree.fromstring(chart)
    bars = [bar.attrib for bar in root.iter("rect") if bar.attrib["height"] == str(BAR_HEIGHT)]
    width = WIDTH - RIGHT - LEFT
    assert [float(bar["x"]) for bar in bars] == pytest.approx([LEFT, LEFT + width / 4], abs=0.1)
    assert [float(bar["width"]) for bar in bars] == pytest.approx([width / 4, 3 * width / 4], abs=0.1)
    mark = next(root.iter("path")).attrib["d"]
    assert mark.startswith(f"M{LEFT + width / 2:.1f} ")
    assert {"a: 1.00 GiB", "b <&>: 3.00 GiB", "half"} == {text.text for text in root.iter("text")}


def test_mark_beyond_the_parts_is_still_on_the_chart() -> None:
    mark = next(ElementTree.fromstring(stacked_bar({"a": 1.0}, 4.0, "m", "")).iter("path")).attrib["d"]
    assert mark.startswith(f"M{WIDTH - RIGHT:.1f} ")


def test_names_are_no_markup() -> None:
    _, texts = drawn(line_chart([0, 1], {"<b>&": [1, 2]}, "<i>", log=False))
    assert {"<b>&", "by <i>"} <= set(texts)
