import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib as mpl
import pytest

from sdxl_lora.reporting.charts import line_chart, stacked_bar, token_histogram

Points = list[tuple[float, float]]


class Chart:
    """What an SVG element shows: texts, and the points of each path by the id of its group."""

    def __init__(self, svg: str) -> None:
        root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
        self.texts = ["".join(text.itertext()) for text in root.iter("text")]
        self.groups = {group.attrib.get("id", ""): group for group in root.iter("g")}
        (self.left, self.bottom), _, (self.right, self.top), *_ = self.points("patch_2")  # of the axes

    def points(self, name: str) -> Points:
        path = next(self.groups[name].iter("path")).attrib["d"]
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", path)]
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def edges(self, name: str) -> tuple[float, float, float, float]:
        """Left, right, top and bottom of a bar."""
        xs, ys = zip(*self.points(name), strict=True)
        return min(xs), max(xs), min(ys), max(ys)


def test_line_goes_through_its_values_above_zero() -> None:
    chart = Chart(line_chart([10, 20, 30], {"loss": [4.0, 2.0, 1.0]}, "step", log=False))
    (x0, y0), (x1, y1), (x2, y2) = chart.points("line-0")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.01)
    heights = [chart.bottom - y for y in (y0, y1, y2)]
    assert [height / heights[2] for height in heights] == pytest.approx([4, 2, 1], rel=1e-3)
    assert {"loss", "step", "0", "4", "10", "30"} <= set(chart.texts)


def test_equal_ratios_are_equal_heights_on_a_logarithmic_axis() -> None:
    chart = Chart(line_chart([0, 1, 2], {"a": [0.01, 0.1, 1], "b": [1, 1, 1]}, "x", log=True))
    first, second = chart.points("line-0"), chart.points("line-1")
    assert first[0][1] - first[1][1] == pytest.approx(first[1][1] - first[2][1], abs=0.01)
    assert first[2][1] == second[0][1]
    assert {"0.01", "0.1", "1"} <= set(chart.texts)


def test_single_value_is_shown_as_a_point() -> None:
    svg = line_chart([5], {"a": [0.0]}, "x", log=False)
    assert "<use " in svg[svg.index('id="line-0"') :]


def test_parts_of_a_bar_lie_side_by_side_and_the_mark_on_their_axis() -> None:
    chart = Chart(stacked_bar({"a": 1.0, "nothing": 0.0, "b <&>": 3.0}, 2.0, "half", "GiB"))
    (left, middle, *_), (start, right, *_) = chart.edges("bar-0"), chart.edges("bar-1")
    assert (left, middle) == pytest.approx((chart.left, start), abs=0.01)
    assert right - start == pytest.approx(3 * (middle - left), rel=1e-3)
    assert chart.points("mark")[0][0] == pytest.approx((left + right) / 2, abs=0.01)
    assert {"a: 1.00 GiB", "b <&>: 3.00 GiB", "half"} <= set(chart.texts)
    assert not any("nothing" in text for text in chart.texts)


def test_mark_beyond_the_parts_is_still_on_the_chart() -> None:
    chart = Chart(stacked_bar({"a": 1.0}, 4.0, "m", ""))
    assert chart.edges("bar-0")[1] < chart.points("mark")[0][0] <= chart.right


def test_histogram_has_a_bar_for_every_length_and_colours_those_over_the_limit() -> None:
    chart = Chart(svg := token_histogram([5, 5, 5, 5, 80, 77, 77], limit=77))
    heights = {}
    for length in (5, 77, 80):
        _, _, top, bottom = chart.edges(f"tokens-{length}")
        assert bottom == pytest.approx(chart.bottom, abs=0.01)
        heights[length] = bottom - top
    assert heights[5] == pytest.approx(2 * heights[77], rel=1e-3) == pytest.approx(4 * heights[80], rel=1e-3)
    limit = chart.points("limit")[0][0]
    assert chart.edges("tokens-77")[1] <= limit <= chart.edges("tokens-80")[0]
    assert chart.edges("tokens-80")[1] <= chart.right
    colours = re.findall(r'<g id="tokens-\d+">\s*<path [^>]*fill: (#\w+)', svg)
    assert len(colours) == 3
    assert colours[0] == colours[1] != colours[2]
    assert chart.groups.keys() >= {"tokens-5"}


def test_names_are_text_and_neither_markup_nor_formulas() -> None:
    svg = line_chart([0, 1], {"<b>&$x$": [1, 2]}, "<i>", log=False)
    assert {"<b>&$x$", "<i>"} <= set(Chart(svg).texts)
    assert 'aria-label="&lt;b&gt;&amp;$x$"' in svg


def test_chart_names_no_host_and_asks_for_nothing() -> None:
    svg = line_chart([0, 1], {"a": [1, 2]}, "x", log=False)
    assert not re.findall(r"https?:|<image|@import|url\((?!#)|href=\"(?!#)", svg)


def test_chart_depends_on_its_numbers_alone(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 30\nsvg.fonttype: path\n")
    chart = line_chart([0, 1], {"a": [1, 2]}, "x", log=False)
    with mpl.rc_context(fname=tmp_path / "matplotlibrc"):
        assert line_chart([0, 1], {"a": [1, 2]}, "x", log=False) == chart
    assert line_chart([0, 1], {"a": [1, 3]}, "x", log=False) != chart
