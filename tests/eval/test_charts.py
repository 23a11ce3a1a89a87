import re
import xml.etree.ElementTree as ET

import pytest

from vistok.eval.report.charts import (
    HEIGHT,
    WIDTH,
    Axis,
    Series,
    bar_chart,
    line_chart,
    linear_ticks,
    log_ticks,
    tick_text,
)


def svg(markup):
    """The drawing alone, parsed as XML: that fails on anything unbalanced or unescaped."""
    return ET.fromstring(re.match(r"<svg.*?</svg>", markup, re.DOTALL)[0])


def places(root, number=0):
    """Centres of the circles of the first series."""
    marks = [g for g in root.findall("g") if g.get("class") == f"c{number}"][0].findall("path")
    found = [re.match(r"M(-?[\d.]+),(-?[\d.]+)a", mark.get("d")).groups() for mark in marks]
    return [(float(x) + 4.5, float(y)) for x, y in found]


def test_equal_steps_of_a_logarithmic_axis_are_equal_ratios():
    chart = line_chart([Series("a", [(1, 0, ""), (10, 1, ""), (100, 2, "")])], Axis("x", log=True), Axis("y"), "t")
    (x0, y0), (x1, y1), (x2, y2) = places(svg(chart))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x1 > x0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y1  # larger values stand higher


def test_points_without_a_place_are_left_out():
    points = [(0, 1, ""), (-1, 1, ""), (1, float("nan"), ""), (1, None, ""), (2, 3, "kept"), (4, 5, "kept")]
    chart = line_chart([Series("a", points), Series("gone", points[:4])], Axis("x", log=True), Axis("y"), "t")
    assert len(places(svg(chart))) == 2 and "gone" not in chart


def test_nothing_to_draw_gives_nothing():
    assert line_chart([Series("a", [(0, 1, "")])], Axis("x", log=True), Axis("y"), "t") == ""
    assert bar_chart([], "x", Axis("y"), "t") == ""
    assert bar_chart([("a", float("nan"))], "x", Axis("y"), "t") == ""


@pytest.mark.parametrize(
    "points", [[(5, 5, "")], [(0, 0, "")], [(1, 2, ""), (2, 2, "")], [(1e-9, 1e12, ""), (2, 3, "")]]
)
def test_degenerate_ranges_stay_inside_the_frame(points):
    root = svg(line_chart([Series("a", points)], Axis("x"), Axis("y"), "t"))
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in places(root))


def test_series_carry_their_names_beside_them_and_in_a_legend():
    series = [Series(name, [(1, i, ""), (2, i + 1, "")]) for i, name in enumerate(["tokenizer", "jpeg", "webp"])]
    chart = line_chart(series, Axis("x"), Axis("y"), "t")
    labels = [text.text for text in svg(chart).findall("text") if "label" in text.get("class", "")]
    assert labels == ["tokenizer", "jpeg", "webp"]
    assert re.findall(r"</svg>(\w+)</li>", chart) == labels


def test_labels_do_not_cover_each_other():
    series = [Series(f"series {i}", [(1, 1, ""), (2, 2, "")]) for i in range(4)]
    texts = [
        t for t in svg(line_chart(series, Axis("x"), Axis("y"), "t")).findall("text") if "label" in t.get("class", "")
    ]
    spots = [(float(t.get("x")), float(t.get("y"))) for t in texts]
    assert all(abs(a[0] - b[0]) > 30 or abs(a[1] - b[1]) >= 13 for i, a in enumerate(spots) for b in spots[:i])


def test_a_single_series_has_no_legend():
    assert "legend" not in line_chart([Series("a", [(1, 1, "")])], Axis("x"), Axis("y"), "t")


def test_names_are_escaped_and_title_and_description_present():
    series = [Series("<script>", [(1, 1, "<b>")]), Series("&", [(2, 2, "")])]
    chart = line_chart(series, Axis("<x>"), Axis("<y>"), "<title>", "what it <shows>")
    root = svg(chart)
    assert root.find("title").text == "<title>" and root.find("desc").text == "what it <shows>"
    assert root.get("role") == "img" and "<script>" not in chart and "<b>" not in chart
    svg(bar_chart([("<a>", 1)], "<x>", Axis("<y>"), "<t>"))


def test_every_point_tells_its_numbers():
    hints = [
        t.text
        for t in svg(line_chart([Series("jpeg", [(0.25, 31.5, "q=50")])], Axis("x"), Axis("y"), "t")).iter("title")
    ]
    assert "jpeg: q=50 (0.25; 31.5)" in hints


def test_heights_of_bars_are_proportional_to_their_values():
    bars = svg(bar_chart([("8", 1), ("16", 2), ("32", 4)], "tokens", Axis("images"), "t")).findall("rect")
    heights = [float(bar.get("height")) for bar in bars]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.1) and heights[2] == pytest.approx(4 * heights[0], abs=0.1)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (23.7, 23.9), (1e-7, 3e-7), (0, 50000)])
def test_linear_ticks_are_round_and_inside(low, high):
    ticks = linear_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert 3 <= len(ticks) <= 8 and low - 1e-9 <= ticks[0] and ticks[-1] <= high * (1 + 1e-9)
    assert f"{step:.0e}"[0] in "125" and f"{step:.3g}".strip("0.e-+")[0] in "125"


@pytest.mark.parametrize(("low", "high"), [(0.001, 1000), (0.05, 2), (1, 1e9)])
def test_log_ticks_are_inside_and_ascend(low, high):
    ticks = log_ticks(low, high)
    assert len(ticks) >= 3 and ticks == sorted(ticks) and low <= ticks[0] and ticks[-1] <= high


def test_tick_texts_are_short():
    assert [tick_text(v) for v in (0, 0.05, -2, 50000, 12_800_000, 1e-13)] == ["0", "0.05", "−2", "50k", "12.8M", "0"]
