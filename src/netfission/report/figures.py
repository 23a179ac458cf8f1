"""Draw the plots of a report from the files in a run's folder."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import singledispatch
from itertools import islice
from math import hypot
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

from netfission.data.corrupted import STRENGTHS
from netfission.evaluation.cascade import CascadeEvaluation, Point
from netfission.evaluation.corruption import Corruptions
from netfission.evaluation.metrics import accuracy_error
from netfission.evaluation.reliability import CalibrationCurve, ConfidenceBin, ReliabilityReport, WorstClass
from netfission.report.run_data import NetworkRun
from netfission.report.style import colour, exit_colour, spread_labels
from netfission.tasks.figures import FEW, Bars, Coverage, FigureData, Reliability, Scatter
from netfission.utils.errors import shortened
from netfission.utils.text import percent, printable

_SIZE = (4.4, 3.1)  # inches: two side by side on a screen, one on a phone, with text of the same size
_DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)))
_LINE_HEIGHT = 0.062  # of a line of text, as a share of a plot's height
_CONFUSED_SIZE, _SLACK = 7.5, 8.0  # of the text in bars, and what its layout may differ by, in points
_LONGEST_NAME, _SHORTEST_NAME = 14, 6  # of a class, in letters
_SPAN = (270, 170)  # approximate width and height of a plot in points
_CLOSE = 5  # difference of coverage in percentage points, within which dots share a label
_BADGE = 14  # diameter of a badge in points


def measure_against_cost(
    runs: Sequence[NetworkRun], measure: str, title: str, factor: float, *, errors: bool = False
) -> Figure:
    """Plot a measure of exits and ensembles against dense MACs, and effective MACs if they differ.

    Args:
        runs: evaluated runs of one task.
        measure: its name in the evaluations.
        title: of its axis.
        factor: by which it is multiplied.
        errors: whether it is a share of the test images, which then gets a bar of ± one standard error.
    """
    figure, axes = _plot()
    scale, unit = _unit(max(run.costs.size.macs_dense for run in runs))
    badges = []
    for run in runs:
        evaluation = run.evaluation
        assert evaluation is not None
        networks = [
            (costs.alone, values[measure], exit_colour(number), str(number))
            for number, (costs, values) in enumerate(zip(run.costs.exits, evaluation.exits, strict=False))
            if measure in values and run.exits > 1
        ]
        networks.append((run.costs.size, evaluation.ensemble[measure], colour("ink"), run.badge))
        points = [(size.macs_dense / scale, factor * value) for size, value, *_ in networks]
        if len(runs) > 1:
            for exit_point in points[:-1]:
                axes.plot(
                    *zip(exit_point, points[-1], strict=True), color=colour("muted"), linewidth=0.7, zorder=1
                )
        for (size, value, line_colour, name), (x, y) in zip(networks, points, strict=True):
            error = factor * accuracy_error(value, evaluation.n) if errors else 0
            axes.errorbar(x, y, yerr=error, color=line_colour, elinewidth=1, zorder=2)
            if size.macs_effective != size.macs_dense:
                effective = size.macs_effective / scale
                axes.plot([effective, x], [y] * 2, color=line_colour, linewidth=0.8, zorder=2)
                axes.plot(effective, y, "o", markersize=6, color=line_colour, fillstyle="none", zorder=3)
            badges.append((x, y, name, line_colour))
    singles: dict[int, list[str]] = {}
    for run in runs:
        singles.setdefault(run.single.size.macs_dense, []).append(run.letter)
    for macs, letters in singles.items():
        suffix = f" of {', '.join(letters)}" if len(singles) > 1 else "’s MACs"
        _mark_single(axes, macs / scale, f"single network{suffix}")
    axes.margins(x=0.12, y=0.15)
    axes.set_xlim(left=0)
    _draw_badges(axes, badges, most=100 if factor == 100 else None)
    axes.set(xlabel=f"MACs per image, {unit}", ylabel=f"test {title}")
    return figure


def learning_curves(run: NetworkRun, title: str = "accuracy, %", factor: float = 100) -> Figure:
    """Plot the score of each exit and of all together after every epoch.

    Args:
        run: of any task.
        title: of the score.
        factor: by which it is multiplied.
    """
    figure, axes = _plot()
    held_out = "val/ensemble" in run.epochs[0]
    split = "val" if held_out else "train"
    exits = [(f"exit{number}", name, exit_colour(number)) for number, name in enumerate(run.exit_names)]
    lines = [*(exits if run.exits > 1 else []), ("ensemble", run.whole, colour("ink"))]
    lines = [line for line in lines if line[0] in _logged_names(run, split)]
    in_training = _logged_names(run, "train")
    epochs = _column(run, "epoch")
    ends = []
    for name, line_title, line_colour in lines:
        width = 2.0 if name == "ensemble" else 1.3
        if held_out and name in in_training:
            training = _column(run, f"train/{name}", factor)
            style: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (2, 2)), "alpha": 0.6}
            if len(epochs) == 1:  # which make no line
                style |= {"marker": "o", "markersize": 3, "fillstyle": "none"}
            axes.plot(epochs, training, color=line_colour, **style)
        values = _column(run, f"{split}/{name}", factor)
        axes.plot(epochs, values, color=line_colour, linewidth=width, marker=_marker(run), markersize=3)
        ends.append((values[-1], line_title, line_colour))
    _label_ends(axes, epochs[-1], ends)
    _epoch_axis(axes, title)
    return figure


def likelihood_curves(run: NetworkRun) -> Figure:
    """Plot the negative log-likelihood of all exits together after every epoch."""
    figure, axes = _plot()
    epochs = _column(run, "epoch")
    ends = []
    for name, title, line_colour, dashes in (
        ("train/nll", "training", colour("muted"), (0, (2, 2))),
        ("val/nll", "validation", colour("ink"), "-"),
    ):
        if name in run.epochs[0]:
            values = _column(run, name)
            axes.plot(epochs, values, color=line_colour, linestyle=dashes, marker=_marker(run), markersize=3)
            ends.append((values[-1], title, line_colour))
    _label_ends(axes, epochs[-1], ends)
    _epoch_axis(axes, f"NLL of the {run.whole}, nats")
    return figure


def learning_curves_beside(
    runs: Sequence[NetworkRun], title: str = "accuracy, %", factor: float = 100
) -> Figure:
    """Plot the score of several runs after every epoch, each of all exits together.

    Args:
        runs: of one task.
        title: of the score.
        factor: by which it is multiplied.
    """
    figure, axes = _plot()
    ends = []
    for index, run in enumerate(runs):
        split = "val" if "val/ensemble" in run.epochs[0] else "train"
        epochs, values = _column(run, "epoch"), _column(run, f"{split}/ensemble", factor)
        axes.plot(
            epochs,
            values,
            color=colour("ink"),
            linestyle=_DASHES[index % len(_DASHES)],
            marker=_marker(run),
            markersize=3,
            linewidth=1.4,
        )
        ends.append((values[-1], run.letter, colour("ink")))
    _label_ends(axes, max(run.epochs[-1]["epoch"] for run in runs), ends)
    _epoch_axis(axes, title)
    return figure


def reliability(curve: CalibrationCurve) -> Figure:
    """Plot accuracy by confidence, and the distribution of confidence."""
    return _reliability(
        curve.bins, curve.metrics["ece"], "confidence: largest probability, %", "accuracy, %", "images, %"
    )


def _reliability(
    bins: Sequence[ConfidenceBin], ece: float, confidence: str, frequency: str, counted: str
) -> Figure:
    figure = Figure(figsize=_SIZE, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    width = 100 / len(bins)
    lefts = [width * index for index in range(len(bins))]
    for left, bin_ in zip(lefts, bins, strict=True):
        if bin_.count:
            alpha = 0.25 if bin_.count < FEW else 0.75
            upper.bar(
                left, 100 * bin_.accuracy, width * 0.9, align="edge", color=colour("accent"), alpha=alpha
            )
    upper.plot([0, 100], [0, 100], color=colour("muted"), linewidth=1, linestyle=(0, (3, 3)))
    filled = [bin_ for bin_ in bins if bin_.count]
    means = [100 * bin_.confidence for bin_ in filled], [100 * bin_.accuracy for bin_ in filled]
    upper.plot(*means, "o", markersize=3.5, color=colour("ink"), clip_on=False)
    upper.set(ylabel=frequency, ylim=(0, 103), xlim=(0, 100), yticks=range(0, 101, 25))
    upper.text(0.03, 0.95, f"ECE {percent(ece)} %", transform=upper.transAxes, va="top", fontsize=10)
    total = sum(bin_.count for bin_ in bins)
    shares = [100 * bin_.count / total for bin_ in bins]
    lower.bar(lefts, shares, width * 0.9, align="edge", color=colour("muted"))
    lower.set(ylabel=counted, xlabel=confidence)
    lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    figure.align_ylabels()
    return figure


def risk_coverage(report: ReliabilityReport) -> Figure:
    """Plot the error of the most confident answers against their share, with the validation thresholds."""
    figure, axes = _plot()
    curve = report.risk_coverage
    coverage = [100 * share for share in curve.coverage]
    risk = [100 * share for share in curve.risk]
    axes.plot(coverage, risk, color=colour("accent"))
    risks: dict[tuple[float, float], list[str]] = {}  # of dots that are close together, by the first of them
    for abstention in report.abstentions:
        if abstention.coverage == 0:
            continue
        point = (100 * abstention.coverage, 100 * abstention.error)
        axes.plot(*point, "o", markersize=5, color=colour("ink"), clip_on=False)
        first = next((other for other in risks if abs(other[0] - point[0]) <= _CLOSE), point)
        risks.setdefault(first, []).append(f"{100 * abstention.risk:g}")
    for point, close in risks.items():
        is_far = point[0] > 5 + 5 * len(close)  # from the axis, over which no label is written
        axes.annotate(
            f"{', '.join(close)} %",
            point,
            (-5, 5) if is_far else (2, 7),
            textcoords="offset points",
            ha="right" if is_far else "left",
            fontsize=8,
            bbox={"facecolor": colour("paper"), "linewidth": 0, "pad": 0.3},  # hides the curve
        )
    axes.set(xlabel="coverage: images answered, %", ylabel="wrong answers, %", xlim=(0, 102))
    axes.set_ylim(bottom=0)
    return figure


def cascade(evaluation: CascadeEvaluation) -> Figure:
    """Plot the accuracy of a cascade against its mean MACs."""
    figure, axes = _plot()
    points = [point for point in evaluation.points if point.accuracy is not None]
    curve = sorted((point for point in points if point.kind == "curve"), key=lambda point: point.macs)
    axes.plot(
        [point.macs for point in curve],
        [_percent(point) for point in curve],
        color=colour("accent"),
        marker="o",
        markersize=3,
    )
    badges = []
    for point in points:
        x, y = point.macs, _percent(point)
        if point.kind == "exit":
            number = int(point.name.split()[1])  # "exit 2", or "exit 2 (linear)"
            badges.append((x, y, str(number), exit_colour(number)))
        elif point.kind == "ensemble":
            badges.append((x, y, "E", colour("ink")))
        elif point.kind == "single":
            badges.append((x, y, "S", colour("muted")))
        elif point.kind == "chosen":
            axes.plot(
                x,
                y,
                "o",
                markersize=_BADGE + 3,
                markeredgewidth=1.6,
                color=colour("accent"),
                fillstyle="none",
                clip_on=False,
                zorder=6,
            )
    if evaluation.drawn_bound is not None:
        axes.axhline(
            100 * evaluation.drawn_bound, linestyle=":", color=colour("accent"), linewidth=1, zorder=0
        )
    _mark_single(axes, 1, "single network’s MACs")
    axes.margins(x=0.08, y=0.15)
    _draw_badges(axes, badges)
    axes.set(xlabel="mean MACs ÷ single network’s", ylabel=f"test {evaluation.measure}, %")
    return figure


def worst_classes(worst: Sequence[WorstClass]) -> Figure:
    """Plot the accuracy of the classes with the most errors, with the most frequent wrong predictions."""
    figure = Figure(figsize=(_SIZE[0], 0.6 + 0.27 * len(worst)), layout="constrained")
    axes = figure.subplots()
    texts: list[tuple[Text, float]] = []  # and where they have to end
    for row, one_class in enumerate(worst):
        share = 100 * one_class.accuracy
        axes.barh(row, 100, 0.62, color=colour("rule"), alpha=0.45)
        axes.barh(row, share, 0.62, color=colour("accent"))
        inside = share < 55
        text = axes.text(
            share + 1.5 if inside else 1.5,
            row,
            "",
            va="center",
            fontsize=_CONFUSED_SIZE,
            color=colour("ink" if inside else "paper"),
        )
        texts.append((text, 100 if inside else share))
    names = [f"{shortened(printable(one_class.name), 18)} ({one_class.n:,})" for one_class in worst]
    axes.set_yticks(range(len(worst)), names)
    axes.tick_params(axis="y", labelcolor=colour("ink"))
    axes.set_ylim(len(worst) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(0, 100), xlabel="correct, % of the class’s images")
    figure.draw_without_rendering()
    for (text, end), one_class in zip(texts, worst, strict=True):
        for others in _shorter_and_shorter(one_class.confused_with):
            text.set_text(others)
            # Not by `get_window_extent`, whose letters are fitted to pixels that a browser does not have.
            width = TextPath((0, 0), others, _CONFUSED_SIZE).get_extents().width
            room = axes.transData.transform((end, 0)) - axes.transData.transform(text.get_position())
            if width < room[0] * 72 / figure.dpi - _SLACK:
                break
    return figure


def _shorter_and_shorter(confused_with: Mapping[str, int]) -> Iterator[str]:
    """Yield classes with their counts: ever shorter names, then without the rarest ones."""
    for number in range(len(confused_with), 0, -1):
        for length in range(_LONGEST_NAME, _SHORTEST_NAME - 1, -1):
            yield ", ".join(
                f"{shortened(printable(name), length)} ×{times}"
                for name, times in islice(confused_with.items(), number)
            )


def corruption(measured: Corruptions) -> Figure:
    """Plot the accuracy under each corruption, and their mean, by strength."""
    figure, axes = _plot()
    strengths = [0, *STRENGTHS]
    clean = 100 * measured.clean.ensemble["top1"]
    for evaluations in measured.corruptions.values():
        values = [100 * evaluation.ensemble["top1"] for evaluation in evaluations]
        axes.plot(strengths, [clean, *values], color=colour("muted"), linewidth=0.8, alpha=0.5)
    means = [100 * measured.mean("top1", strength) for strength in STRENGTHS]
    axes.plot(strengths, [clean, *means], color=colour("accent"), linewidth=2.2, marker="o", markersize=4)
    _label_ends(axes, STRENGTHS[-1], [(means[-1], "mean", colour("accent"))])
    axes.set(xlabel="strength of the corruption", ylabel="accuracy, %", xticks=strengths)
    axes.set_ylim(bottom=0)
    return figure


@singledispatch
def draw(data: FigureData) -> Figure:
    """Draw a figure that a task describes."""
    raise NotImplementedError(type(data).__name__)


@draw.register
def _(data: Bars) -> Figure:
    figure = Figure(figsize=(_SIZE[0], 0.6 + 0.27 * len(data.values)), layout="constrained")
    axes = figure.subplots()
    for row, share in enumerate(data.values.values()):
        axes.barh(row, 100, 0.62, color=colour("rule"), alpha=0.45)
        axes.barh(row, 100 * (share or 0), 0.62, color=colour("accent"))
        inside = share is not None and share >= 0.85
        text = "–" if share is None else percent(share, 1)
        axes.text(
            100 * (share or 0) + (-1.5 if inside else 1.5),
            row,
            text,
            va="center",
            ha="right" if inside else "left",
            fontsize=8,
            color=colour("paper" if inside else "ink"),
        )
    axes.set_yticks(range(len(data.values)), [shortened(printable(name), 18) for name in data.values])
    axes.tick_params(axis="y", labelcolor=colour("ink"))
    axes.set_ylim(len(data.values) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(0, 100), xlabel=data.label)
    return figure


@draw.register
def _(data: Reliability) -> Figure:
    return _reliability(data.bins, data.ece, data.confidence, data.frequency, data.counted)


@draw.register
def _(data: Scatter) -> Figure:
    figure, axes = _plot()
    axes.vlines(data.truth, data.low, data.high, color=colour("accent"), linewidth=0.8, alpha=0.35)
    axes.plot(data.truth, data.predicted, "o", markersize=2.5, color=colour("ink"))
    ends = [min(data.truth), max(data.truth)]
    axes.plot(ends, ends, color=colour("muted"), linewidth=1, linestyle=(0, (3, 3)), zorder=3)
    name = shortened(printable(data.number), 24)
    axes.set(xlabel=f"{name}, true", ylabel=f"{name}, predicted")
    return figure


@draw.register
def _(data: Coverage) -> Figure:
    figure, axes = _plot()
    stated = [100 * share for share in data.stated]
    axes.plot([0, 100], [0, 100], color=colour("muted"), linewidth=1, linestyle=(0, (3, 3)))
    ends = []
    for (title, observed), name, dashes in zip(
        data.observed.items(), ("muted", "accent"), ("--", "-"), strict=False
    ):
        shares = [100 * share for share in observed]
        last = len(data.observed) == 1 or name == "accent"
        axes.plot(stated, shares, color=colour("accent" if last else name), linestyle="-" if last else dashes)
        ends.append((shares[-1], title, colour("accent" if last else name)))
    axes.set(
        xlabel="probability of the interval, %", ylabel="numbers inside, %", ylim=(0, 103), xlim=(0, 100)
    )
    _label_ends(axes, 100, ends)  # where the diagonal ends, which no name may cover
    return figure


def _plot() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.subplots()


def _draw_badges(
    axes: Axes, badges: Iterable[tuple[float, float, str, str]], most: float | None = 100
) -> None:
    """Draw points with their names inside, and move those that would overlap to the right.

    Args:
        axes: of the plot.
        badges: x, y, name and colour of each point.
        most: just above which the y axis ends; None for no such bound.
    """
    badges = list(badges)
    for x, y, _, badge_colour in badges:
        axes.plot(x, y, "o", markersize=3, color=badge_colour)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    if most is not None:
        high = min(high, most + 0.03 * (most - low))
    axes.set(xlim=(left, right), ylim=(low, high))
    taken: list[tuple[float, float]] = []
    for x, y, name, badge_colour in badges:
        across, up = _SPAN[0] * (x - left) / (right - left), _SPAN[1] * (y - low) / (high - low)
        shift = 0.0
        while any(hypot(across + shift - other, up - above) < _BADGE - 0.1 for other, above in taken):
            shift += _BADGE
        taken.append((across + shift, up))
        if shift:
            line = {"arrowstyle": "-", "color": badge_colour, "linewidth": 0.8}
            axes.annotate("", (x, y), (shift, 0), textcoords="offset points", arrowprops=line, zorder=4)
        axes.annotate(
            name,
            (x, y),
            (shift, 0),
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            color=colour("paper"),
            fontsize=8,
            weight="bold",
            zorder=5,
            annotation_clip=False,
            bbox={"boxstyle": "circle,pad=0.28", "facecolor": badge_colour, "edgecolor": colour("paper")},
        )


def _mark_single(axes: Axes, x: float, text: str) -> None:
    """Draw a line at the single network's cost, with a text above the plot."""
    axes.axvline(x, color=colour("muted"), linestyle=(0, (3, 3)), linewidth=1, zorder=0)
    axes.annotate(
        text,
        (x, 1),
        (0, 2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=colour("muted"),
    )


def _label_ends(axes: Axes, x: float, ends: Iterable[tuple[float, str, str]]) -> None:
    """Write the names of lines at their right ends.

    Args:
        axes: of the plot.
        x: where the lines end.
        ends: last value, name and colour of each line.
    """
    ends = list(ends)
    low, high = axes.get_ylim()
    positions = spread_labels([value for value, _, _ in ends], _LINE_HEIGHT * (high - low))
    for position, (_, name, line_colour) in zip(positions, ends, strict=True):
        axes.annotate(
            name,
            (x, position),
            (7, 0),
            textcoords="offset points",
            va="center",
            color=line_colour,
            annotation_clip=False,
        )


def _epoch_axis(axes: Axes, title: str) -> None:
    axes.set(xlabel="epoch", ylabel=title)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _marker(run: NetworkRun) -> str:
    """Return the marker of a curve: points if there are few, because a single one makes no line."""
    return "o" if len(run.epochs) <= 12 else ""


def _logged_names(run: NetworkRun, split: str) -> set[str]:
    """Return whose accuracy a run's metrics contain on a split: `exit0`, …, `ensemble`.

    If a method trains one network that predicts as several members, exit 0's column is the accuracy of all
    of them, and is left out.
    """
    names = {"ensemble", *(f"exit{number}" for number in range(run.exits))}
    logged = {name for name in names if f"{split}/{name}" in run.epochs[0]}
    return logged if logged == names else logged & {"ensemble"}


def _column(run: NetworkRun, name: str, factor: float = 1) -> list[float]:
    return [factor * row[name] for row in run.epochs]


def _unit(macs: int) -> tuple[float, str]:
    return (1e9, "billions") if macs >= 1e9 else (1e6, "millions")


def _percent(point: Point) -> float:
    assert point.accuracy is not None
    return 100 * point.accuracy
