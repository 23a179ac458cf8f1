"""One look for all figures, whose colours follow the page: light, dark or on paper."""

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

# matplotlib knows no CSS variables: it draws in these colours, which are then replaced.
_SENTINELS = {name: f"#fe{place:04x}" for place, name in enumerate(LIGHT)}
_SETTINGS = report_settings(*(_SENTINELS[name] for name in ("ink", "muted", "rule")))


def colour(name: str) -> str:
    """What to draw in, for a colour of the page: `ink`, `accent`, …"""
    return _SENTINELS[name]


def exit_name(number: int) -> str:
    """The name of an exit's colour, the same wherever that exit is shown."""
    return f"exit{number % EXIT_COLOURS}"


def exit_colour(number: int) -> str:
    """What to draw an exit in."""
    return colour(exit_name(number))


def variables() -> str:
    """The colours as CSS."""
    light, dark = (" ".join(f"--{name}: {value};" for name, value in each.items()) for each in (LIGHT, DARK))
    return (
        f":root {{ color-scheme: light dark; --font: {FONT}; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )


def drawn(make: Callable[[], Figure]) -> str:
    """A figure as the text of an SVG that can be opened alone; the same figure gives the same text.

    Args:
        make: draws it, with `colour`.
    """
    text = StringIO()
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        # Text stays text: that the font it is measured with lacks a letter does not show.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        make().savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _themed(text.getvalue())


def _themed(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", f"var(--font, {FONT})", svg)
    for name, sentinel in _SENTINELS.items():
        svg = svg.replace(sentinel, f"var(--{name}, {LIGHT[name]})")
    return alone(svg)


def alone(svg: str) -> str:
    """An SVG with the colours of the page, so that it can be opened without it."""
    style = f"<style>\n{variables()}\nsvg {{ background: var(--paper); }}\n{RENDERING}\n</style>"
    end = svg.index(">", svg.index("<svg")) + 1
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg[:end]}\n{style}{svg[end:]}'


RENDERING = "svg * { stroke-linejoin: round; stroke-linecap: butt; }"


def inline(svg: str, key: str, label: str) -> str:
    """What `alone` made as a part of a page, which has the colours.

    Args:
        svg: its text.
        key: makes its identifiers unique within the page.
        label: what a reader who cannot see it is told.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", svg)
    view, width = re.search(r'viewBox="[^"]*"', svg), re.search(r'width="([\d.]+(?:pt)?)"', svg)
    assert view is not None and width is not None
    body = svg[svg.index(">") + 1 :]
    spoken = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg {view[0]} style="--width: {width[1]}" role="img" aria-label="{spoken}">{body}'


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels at `values`, in the same order, no two closer than `gap`, moved as little as can be.

    Least in squares: with the gaps taken off, places that must not fall (isotonic regression).
    """
    order = np.argsort(values, kind="stable")
    gaps = gap * np.arange(len(values))
    places = np.empty(len(values))
    places[order] = isotonic_regression(np.asarray(values, dtype=float)[order] - gaps).x + gaps
    return [float(place) for place in places]


def jinja() -> Environment:
    """The templates of this package: what is put in is escaped, and a name that is not known an error."""
    return Environment(
        loader=PackageLoader("netfission.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
