import xml.etree.ElementTree as ElementTree

import pytest

from sdxl_lora.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, line_chart

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


def test_names_are_no_markup() -> None:
    _, texts = drawn(line_chart([0, 1], {"<b>&": [1, 2]}, "<i>", log=False))
    assert {"<b>&", "by <i>"} <= set(texts)
