import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from netfission.report.figures import draw
from netfission.report.style import colour, exit_colour, inline_svg, render_svg, spread_labels
from netfission.tasks.figures import Bars, Scatter
from netfission.utils.plot_style import DARK, LIGHT


def luminance(hexadecimal: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(hexadecimal[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_whatever_may_be_text_has_the_contrast_of_aa(colours):
    assert LIGHT.keys() == DARK.keys()
    for name in colours.keys() - {"paper", "panel", "rule"}:
        assert contrast(colours[name], colours["paper"]) >= 4.5, name


def plot() -> Figure:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=exit_colour(1), marker="o")
    axes.text(0.5, 0.5, "a $ b < c & 水 _", color=colour("ink"))
    axes.set_xlim(0, 0.5)  # so that there is a clip path to refer to
    return figure


def test_a_figure_is_themed_and_the_same_each_time():
    svg = render_svg(plot)
    assert svg == render_svg(plot)
    ET.fromstring(svg)
    assert "#fe00" not in svg
    assert "DejaVu" not in svg
    assert f"var(--exit1, {LIGHT['exit1']})" in svg
    assert "prefers-color-scheme: dark" in svg
    assert "a $ b &lt; c &amp; 水 _" in svg
    assert re.search(r"\d{4}-\d\d-\d\d", svg) is None


def test_a_figure_in_a_page_has_identifiers_of_its_own_and_no_style_for_the_page():
    one, other = (inline_svg(render_svg(plot), key, 'says "so" & <more>\x1b') for key in ("one", "other"))
    assert "<style" not in one
    roots = [ET.fromstring(each.replace("xlink:href", "href")) for each in (one, other)]
    first, second = ({each.get("id") for each in root.iter()} - {None} for root in roots)
    assert first and first.isdisjoint(second)
    assert {each[1:] for each in re.findall(r"#one-[\w-]+", one)} <= first
    assert not re.search(r"url\(#(?!one-)|href=\"#(?!one-)", one)
    assert roots[0].get("aria-label") == r'says "so" & <more>\x1b'
    assert roots[0].get("role") == "img"


@given(values=st.lists(st.floats(-100, 100), max_size=8), gap=st.floats(0.01, 10))
def test_labels_are_set_apart_and_no_farther(values, gap):
    positions = spread_labels(values, gap)
    ordered = sorted(positions)
    assert all(after - before >= gap - 1e-6 for before, after in pairwise(ordered))
    order = sorted(range(len(values)), key=lambda index: positions[index])
    assert [values[index] for index in order] == sorted(values)
    if all(b - a >= gap for a, b in pairwise(sorted(values))):
        assert positions == pytest.approx(values, abs=1e-6)


def test_names_of_targets_are_no_commands_in_figures():
    name = "\x1b[31mred"
    scatter = Scatter("a", "A", "it is", [0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0], name)
    for data in (Bars("a", "A", "it is", {name: 0.5}, "share"), scatter):
        assert "\x1b" not in render_svg(lambda data=data: draw(data))
