"""Draw the paths of a fissioned network as boxes whose area is their number of parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from netfission.network import FissionNetwork
from netfission.profiling.cost import Size
from netfission.report.run_data import NetworkRun
from netfission.report.style import exit_colour_name, standalone_svg, template_environment
from netfission.utils.errors import shortened
from netfission.utils.plot_style import FONT, LIGHT

_COLUMN = 144  # width of a path in pixels
_SPARSE_COLUMN = 164  # the same if non-zero parameters are shown, too
_LARGEST_BOX = 46  # side in pixels
_AXIS = 26  # of a path's boxes, from the left of its column
LINE = 13.5  # height of a line of text in pixels
_SMALLEST_BOX = 3  # side in pixels
_GAP = 26  # between rows
_BADGE = 11  # radius


@dataclass(frozen=True)
class Box:
    """A step of a path.

    Attributes:
        x, y: of the centre.
        side: of the square.
        colour: name of the colour.
        lines: of text beside the box.
        text_y: y of the first line of text.
    """

    x: float
    y: float
    side: float
    colour: str
    lines: list[str]
    text_y: float


@dataclass(frozen=True)
class Edge:
    """A line between two steps.

    Attributes:
        d: an SVG path.
        colour: name of the colour.
    """

    d: str
    colour: str


@dataclass(frozen=True)
class Badge:
    """The end of an exit, or the ensemble.

    Attributes:
        x, y: of the centre.
        name: text inside.
        colour: name of the colour.
        lines: of text beside the badge.
    """

    x: float
    y: float
    name: str
    colour: str
    lines: list[str]


@dataclass(frozen=True)
class Drawing:
    """The whole drawing, in pixels.

    Attributes:
        width, height: of the drawing.
        image: description of the input.
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


def draw_network(run: NetworkRun) -> str:
    """Draw the network of a run with method fission as the text of a standalone SVG."""
    environment = template_environment()
    environment.filters["px"] = lambda value, line=0: f"{value + LINE * line:.1f}"
    template = environment.get_template("network.svg.j2")
    return standalone_svg(template.render(drawing=lay_out(run), colours=LIGHT, font=FONT))


def lay_out(run: NetworkRun) -> Drawing:
    """Lay out the paths of a run's network: one column per path, one row per step, from top to bottom."""
    network = run.network
    assert isinstance(network, FissionNetwork)
    parts, sparse = run.costs.parts, run.costs.size.parameters_stored != run.costs.size.parameters_nonzero
    column = _SPARSE_COLUMN if sparse else _COLUMN
    axes = [number * column + _AXIS for number in range(network.exits)]
    row = max(_LARGEST_BOX, (5 if sparse else 3) * LINE)
    largest = max(size.parameters_stored for part in parts for size in part.paths if size)
    boxes: list[Box] = []
    edges: list[Edge] = []
    top = 16.0 + _GAP
    tails = {0: (axes[0], 16.0)}  # exit → where its path ends so far
    for part in parts:
        middle = top + row / 2
        reached = {}
        for number, size in enumerate(part.paths):
            if size is None:
                continue
            side = max(_LARGEST_BOX * sqrt(size.parameters_stored / largest), _SMALLEST_BOX)
            shared = number == 0 and None in part.paths
            box_colour = "muted" if shared else exit_colour_name(number)
            text = _text(part.name, size)
            boxes.append(
                Box(axes[number], middle, side, box_colour, text, middle - (len(text) - 1) * LINE / 2 + 4)
            )
            start = tails.get(number, tails[0])  # a new path starts from exit 0's
            edges.append(Edge(_elbow(start, (axes[number], middle - side / 2), top - _GAP / 2), box_colour))
            reached[number] = (axes[number], middle + side / 2)
        tails |= reached
        top += row + _GAP
    ends = _ends(run, axes, top)
    edges += [
        Edge(_elbow(tails[number], (x, top), top), exit_colour_name(number)) for number, x in enumerate(axes)
    ]
    if network.exits > 1:
        y, below = top + 2 * _BADGE, ends[-1].y - _BADGE
        edges += [
            Edge(_elbow((x, y), (axes[0], below), y + _GAP / 2), exit_colour_name(number))
            for number, x in enumerate(axes)
        ]
    image = "image " + "×".join(map(str, run.spec.shape))
    return Drawing(network.exits * column, ends[-1].y + _BADGE + 8, image, boxes, edges, ends)


def _ends(run: NetworkRun, axes: Sequence[float], top: float) -> list[Badge]:
    """Return the exits, and below them the ensemble if there are several."""
    evaluation = run.evaluation
    title = "ensemble"
    exits: list[list[str]] = [[]] * len(axes)
    ensemble: list[str] = []
    if evaluation is not None:
        task = run.spec.find_task()
        title = f"ensemble: {task.rule(evaluation.average)}"
        exits = [[task.in_short(measures)] for measures in evaluation.exits]
        ensemble = [task.in_short(evaluation.ensemble)]
    badges = [
        Badge(x, top + _BADGE, str(number), exit_colour_name(number), [name, *accuracy])
        for number, (x, name, accuracy) in enumerate(zip(axes, run.exit_names, exits, strict=True))
    ]
    if len(axes) > 1:
        badges.append(Badge(axes[0], top + 3 * _BADGE + _GAP, "E", "ink", [title, *ensemble]))
    return badges


def _elbow(start: tuple[float, float], end: tuple[float, float], turn: float) -> str:
    """Return a path from start to end; if they are not one above the other, it crosses at height `turn`."""
    (x, y), (to_x, to_y) = start, end
    across = f"V{turn:.1f}H{to_x:.1f}" if x != to_x else ""
    return f"M{x:.1f} {y:.1f}{across}V{to_y:.1f}"


def _text(name: str, size: Size) -> list[str]:
    lines = [shortened(name, 13), f"{short(size.parameters_stored)} params"]
    if size.parameters_nonzero != size.parameters_stored:
        lines.append(f"{short(size.parameters_nonzero)} non-zero")
    lines.append(f"{short(size.macs_dense)} MACs")
    if size.macs_effective != size.macs_dense:
        lines.append(f"{short(size.macs_effective)} effective")
    return lines


def short(number: float) -> str:
    """Write a count in three digits.

    Example:
        >>> [short(count) for count in (691, 34_512, 6_300_000, 1_234_000_000)]
        ['691', '34.5 k', '6.30 M', '1.23 G']
    """
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * factor:
            value = number / factor
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"
    return f"{number:.0f}"
