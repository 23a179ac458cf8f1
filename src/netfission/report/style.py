"""Figures as SVG whose colours follow the page: light, dark or on paper."""

import re
import warnings
from collections.abc import Callable, Sequence
from io import StringIO

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from netfission.utils.plot_style import DARK, EXIT_COLOURS, FONT, LIGHT, report_settings
from netfission.utils.text import printable

# matplotlib knows no CSS variables: it draws in these colours, which are then replaced.
_SENTINELS = {name: f"#fe{index:04x}" for index, name in enumerate(LIGHT)}
_SETTINGS = report_settings(*(_SENTINELS[name] for name in ("ink", "muted", "rule")))


def colour(name: str) -> str:
    """Return what matplotlib draws in for a colour of the page: `ink`, `accent`, …"""
    return _SENTINELS[name]


def exit_colour_name(number: int) -> str:
    """Return the name of an exit's colour, which is the same in all figures.

    Example:
        >>> exit_colour_name(9)
        'exit1'
    """
    return f"exit{number % EXIT_COLOURS}"


def exit_colour(number: int) -> str:
    """Return what matplotlib draws an exit in."""
    return colour(exit_colour_name(number))


def css_variables() -> str:
    """Return the page's colours and font as CSS variables."""
    light, dark = (
        " ".join(f"--{name}: {value};" for name, value in colours.items()) for colours in (LIGHT, DARK)
    )
    return (
        f":root {{ color-scheme: light dark; --font: {FONT}; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )


def render_svg(draw: Callable[[], Figure]) -> str:
    """Render a figure as the text of a standalone SVG; the same figure gives the same text.

    Args:
        draw: draws the figure, in the colours of `colour`.

    Example:
        >>> from matplotlib.figure import Figure
        >>> "prefers-color-scheme: dark" in render_svg(lambda: Figure())
        True
    """
    text = StringIO()
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        # Text stays text: it does not matter if the font that measures it lacks a letter.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        draw().savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _with_variables(text.getvalue())


def _with_variables(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", f"var(--font, {FONT})", svg)
    for name, sentinel in _SENTINELS.items():
        svg = svg.replace(sentinel, f"var(--{name}, {LIGHT[name]})")
    return standalone_svg(svg)


def standalone_svg(svg: str) -> str:
    """Add the colours of the page to an SVG, so that it can be opened without the page."""
    style = f"<style>\n{css_variables()}\nsvg {{ background: var(--paper); }}\n{RENDERING}\n</style>"
    end = svg.index(">", svg.index("<svg")) + 1
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg[:end]}\n{style}{svg[end:]}'


RENDERING = "svg * { stroke-linejoin: round; stroke-linecap: butt; }"


def inline_svg(svg: str, key: str, label: str) -> str:
    """Turn a standalone SVG into a part of the page, which has the colours.

    Args:
        svg: text of the SVG.
        key: prefix that makes its identifiers unique within the page.
        label: description for readers who cannot see the figure.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", svg)
    view, width = re.search(r'viewBox="[^"]*"', svg), re.search(r'width="([\d.]+(?:pt)?)"', svg)
    assert view is not None and width is not None
    body = svg[svg.index(">") + 1 :]
    escaped = printable(label).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg {view[0]} style="--width: {width[1]}" role="img" aria-label="{escaped}">{body}'


def spread_labels(values: Sequence[float], gap: float) -> list[float]:
    """Move labels from `values` as little as possible, so that no two are closer than `gap`.

    Minimises the sum of squared moves. Without the gaps, the positions must not decrease, which is isotonic
    regression.

    Args:
        values: positions in any order.
        gap: least distance between two labels.

    Returns:
        Positions in the order of `values`.

    Example:
        >>> spread_labels([1.0, 1.0], 0.5)
        [0.75, 1.25]
    """
    order = np.argsort(values, kind="stable")
    gaps = gap * np.arange(len(values))
    positions = np.empty(len(values))
    positions[order] = isotonic_regression(np.asarray(values, dtype=float)[order] - gaps).x + gaps
    return [float(position) for position in positions]


def template_environment() -> Environment:
    """Return the environment of this package's templates: values are escaped, unknown names are errors."""
    return Environment(
        loader=PackageLoader("netfission.report"),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # no control characters
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
