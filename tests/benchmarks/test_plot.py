"""The plots are SVG that draws what it was given."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from tests.benchmarks.plot import Panel, bars, panels

SVG = "{http://www.w3.org/2000/svg}"


def parse(text: str) -> ET.Element:
    return ET.fromstring(text)  # noqa: S314 - our own


def test_bars_are_as_long_as_their_values() -> None:
    """Half of the longest is half as long."""
    drawn = parse(bars("a < b", {"one": (10.0, 5.0)}))
    first, second = (float(rect.attrib["width"]) for rect in drawn.iter(f"{SVG}rect"))
    assert first == pytest.approx(2 * second)


def test_a_panel_has_a_line_for_each_contestant() -> None:
    """Less is lower, a label stands below each point, and the size holds all panels."""
    panel = Panel("many & more", ["1", "10"], {"ours": [1.0, 2.0], "idiom, publish": [4.0, 4.0]})
    drawn = parse(panels("title", [panel] * 3))
    lines = [line.attrib["points"] for line in drawn.iter(f"{SVG}polyline")]
    assert len(lines) == 6
    (_, y0), (_, y1) = (point.split(",") for point in lines[0].split())
    assert float(y0) > float(y1)
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert texts.count("many & more") == texts.count("10") == 3
    assert float(drawn.attrib["height"]) > float(drawn.attrib["width"]) / 2


def test_a_wide_range_is_drawn_logarithmically() -> None:
    """Each factor of ten is the same step, and the title says so."""
    drawn = parse(panels("title", [Panel("wide", ["a", "b", "c"], {"ours": [1, 10, 100]})]))
    (line,) = drawn.iter(f"{SVG}polyline")
    heights = [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2])
    assert "wide (logarithmic)" in [text.text for text in drawn.iter(f"{SVG}text")]
