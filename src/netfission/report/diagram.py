"""A fissioned network drawn as its paths: boxes whose area is what they hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from netfission.network import FissionNetwork
from netfission.profiling.cost import Size
from netfission.report.figures import clipped
from netfission.report.run_data import Run
from netfission.report.style import alone, exit_name, jinja
from netfission.utils.plot_style import FONT, LIGHT

_COLUMN = 144  # pixels, of a path
_SPARSE_COLUMN = 164  # where it says what is not removed, too
_BOX = 46  # the side of the largest box
_AXIS = 26  # of a path's boxes, within its column
LINE = 13.5  # pixels, of text
_LEAST = 3  # the side of the smallest
_GAP = 26  # between rows
_BADGE = 11  # radius


@dataclass(frozen=True)
class Box:
    """A path's copy of a step.

    Attributes:
        x, y: of its centre.
        side: of the square.
        colour: name of its colour.
        lines: of text beside it.
        text_y: of the first line.
    """

    x: float
    y: float
    side: float
    colour: str
    lines: list[str]
    text_y: float


@dataclass(frozen=True)
class Edge:
    """A line from one thing to the next.

    Attributes:
        d: an SVG path.
        colour: name of its colour.
    """

    d: str
    colour: str


@dataclass(frozen=True)
class Badge:
    """An exit's end, or the ensemble.

    Attributes:
        x, y: of its centre.
        name: in it.
        colour: name of its colour.
        lines: of text beside it.
    """

    x: float
    y: float
    name: str
    colour: str
    lines: list[str]


@dataclass(frozen=True)
class Drawing:
    """All of it, in pixels.

    Attributes:
        width, height: of the whole.
        image: what goes in.
        boxes: see `Box`.
        edges: see `Edge`.
        badges: see `Badge`.
    """

    width: float
    height: float
    image: str
    boxes: list[Box]
    edges: list[Edge]
    badges: list[Badge]


def draw_network(run: Run) -> str:
    """The network of a run whose method is fission, as the text of an SVG that can be opened alone."""
    environment = jinja()
    environment.filters["px"] = lambda value, line=0: f"{value + LINE * line:.1f}"
    template = environment.get_template("network.svg.j2")
    return alone(template.render(drawing=lay_out(run), colours=LIGHT, font=FONT))


def lay_out(run: Run) -> Drawing:
    """Place the paths of a run's network: a column a path, a row a step, top to bottom."""
    network = run.network
    assert isinstance(network, FissionNetwork)
    parts, sparse = run.costs.parts, run.costs.size.parameters_stored != run.costs.size.parameters_nonzero
    column = _SPARSE_COLUMN if sparse else _COLUMN
    axes = [number * column + _AXIS for number in range(network.exits)]
    row = max(_BOX, (5 if sparse else 3) * LINE)
    largest = max(size.parameters_stored for part in parts for size in part.paths if size)
    boxes: list[Box] = []
    edges: list[Edge] = []
    top = 16.0 + _GAP
    tails = {0: (axes[0], 16.0)}  # exit → where its path has come to
    for part in parts:
        middle = top + row / 2
        reached = {}
        for number, size in enumerate(part.paths):
            if size is None:
                continue
            side = max(_BOX * sqrt(size.parameters_stored / largest), _LEAST)
            shared = number == 0 and None in part.paths
            own = "muted" if shared else exit_name(number)
            text = _text(part.name, size)
            boxes.append(Box(axes[number], middle, side, own, text, middle - (len(text) - 1) * LINE / 2 + 4))
            start = tails.get(number, tails[0])  # a new path leaves exit 0's
            edges.append(Edge(_elbow(start, (axes[number], middle - side / 2), top - _GAP / 2), own))
            reached[number] = (axes[number], middle + side / 2)
        tails |= reached
        top += row + _GAP
    ends = _ends(run, axes, top)
    edges += [Edge(_elbow(tails[number], (x, top), top), exit_name(number)) for number, x in enumerate(axes)]
    if network.exits > 1:
        y, below = top + 2 * _BADGE, ends[-1].y - _BADGE
        edges += [
            Edge(_elbow((x, y), (axes[0], below), y + _GAP / 2), exit_name(number))
            for number, x in enumerate(axes)
        ]
    image = "image " + "×".join(map(str, run.spec.shape))
    return Drawing(network.exits * column, ends[-1].y + _BADGE + 8, image, boxes, edges, ends)


def _ends(run: Run, axes: Sequence[float], top: float) -> list[Badge]:
    """The exits, and below them the ensemble where there are several."""
    measured = run.evaluation
    of = "ensemble"
    exits: list[list[str]] = [[]] * len(axes)
    ensemble: list[str] = []
    if measured is not None:
        of = f"ensemble: mean of {measured.average}"
        exits = [[f"{100 * each['top1']:.2f} %"] for each in measured.exits]
        ensemble = [f"{100 * measured.ensemble['top1']:.2f} %"]
    badges = [
        Badge(x, top + _BADGE, str(number), exit_name(number), [f"exit {number}", *own])
        for number, (x, own) in enumerate(zip(axes, exits, strict=True))
    ]
    if len(axes) > 1:
        badges.append(Badge(axes[0], top + 3 * _BADGE + _GAP, "E", "ink", [of, *ensemble]))
    return badges


def _elbow(start: tuple[float, float], end: tuple[float, float], turn: float) -> str:
    """From start to end; where they are not one above the other, across at the height `turn`."""
    (x, y), (to_x, to_y) = start, end
    across = f"V{turn:.1f}H{to_x:.1f}" if x != to_x else ""
    return f"M{x:.1f} {y:.1f}{across}V{to_y:.1f}"


def _text(name: str, size: Size) -> list[str]:
    lines = [clipped(name, 13), f"{short(size.parameters_stored)} params"]
    if size.parameters_nonzero != size.parameters_stored:
        lines.append(f"{short(size.parameters_nonzero)} non-zero")
    lines.append(f"{short(size.macs_dense)} MACs")
    if size.macs_effective != size.macs_dense:
        lines.append(f"{short(size.macs_effective)} effective")
    return lines


def short(number: float) -> str:
    """A count in three digits: 691, 34.5 k, 6.30 M, 1.23 G."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * factor:
            value = number / factor
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"
    return f"{number:.0f}"
