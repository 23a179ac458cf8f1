"""The plots of a report, each from what lies in a run's folder."""

from collections.abc import Iterable, Sequence
from math import hypot, sqrt

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from netfission.evaluation.cascade import CascadeEvaluation, Point
from netfission.evaluation.corruption import STRENGTHS, Corruptions
from netfission.evaluation.reliability import CalibrationCurve, ReliabilityReport, WorstClass
from netfission.report.run_data import Run
from netfission.report.style import apart, colour, exit_colour

_SIZE = (4.4, 3.1)  # inches: two beside one another on a desk, one on a phone, with the same size of letters
FEW = 10  # examples of a bin, below which its accuracy says little
_DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)))
_LABEL = 0.062  # of the height of a plot: a line of text
_SPAN = (270, 170)  # points across and up a plot, about
_BADGE = 14  # points across a badge


def accuracy_against_cost(runs: Sequence[Run]) -> Figure:
    """Exits alone and ensembles by their dense multiply-accumulates, and effective ones where they differ."""
    figure, axes = _plot()
    sizes = [each.costs.size.macs_dense for each in runs]
    scale, unit = _unit(max(sizes))
    badges = []
    for run in runs:
        evaluation = run.evaluation
        assert evaluation is not None
        ways = [
            (own.alone, figures["top1"], exit_colour(number), str(number))
            for number, (own, figures) in enumerate(zip(run.costs.exits, evaluation.exits, strict=False))
        ]
        ways.append((run.costs.size, evaluation.ensemble["top1"], colour("ink"), run.letter or "E"))
        places = [(size.macs_dense / scale, 100 * accuracy) for size, accuracy, *_ in ways]
        if len(runs) > 1:
            for own_exit in places[:-1]:
                axes.plot(
                    *zip(own_exit, places[-1], strict=True), color=colour("muted"), linewidth=0.7, zorder=1
                )
        for (size, accuracy, own, name), (place, height) in zip(ways, places, strict=True):
            error = 100 * standard_error(accuracy, evaluation.n)
            axes.errorbar(place, height, yerr=error, color=own, elinewidth=1, zorder=2)
            if size.macs_effective != size.macs_dense:
                effective = size.macs_effective / scale
                axes.plot([effective, place], [height] * 2, color=own, linewidth=0.8, zorder=2)
                axes.plot(effective, height, "o", markersize=6, color=own, fillstyle="none", zorder=3)
            badges.append((place, height, name, own))
    singles: dict[int, list[str]] = {}
    for run in runs:
        singles.setdefault(run.single.size.macs_dense, []).append(run.letter)
    for macs, letters in singles.items():
        own = f" of {', '.join(letters)}" if len(singles) > 1 else "’s MACs"
        _single(axes, macs / scale, f"single network{own}")
    axes.margins(x=0.12, y=0.15)
    axes.set_xlim(left=0)
    _badges(axes, badges)
    axes.set(xlabel=f"MACs an image, {unit}", ylabel="test accuracy, %")
    return figure


def learning_curves(run: Run) -> Figure:
    """Accuracy of each exit and of the ensemble, epoch by epoch."""
    figure, axes = _plot()
    held_out = "val/ensemble" in run.epochs[0]
    split = "val" if held_out else "train"
    kind = "exit" if run.costs.exits else "member"
    exits = [(f"exit{number}", f"{kind} {number}", exit_colour(number)) for number in range(run.exits)]
    lines = [*exits, ("ensemble", "ensemble", colour("ink"))]
    lines = [line for line in lines if line[0] in _told(run, split)]
    in_training = _told(run, "train")
    epochs = _column(run, "epoch")
    ends = []
    for name, title, own in lines:
        strong = 2.0 if name == "ensemble" else 1.3
        if held_out and name in in_training:
            faint = _column(run, f"train/{name}", 100)
            axes.plot(epochs, faint, color=own, linewidth=0.9, linestyle=(0, (2, 2)), alpha=0.6)
        values = _column(run, f"{split}/{name}", 100)
        axes.plot(epochs, values, color=own, linewidth=strong, marker=_marker(run), markersize=3)
        ends.append((values[-1], title, own))
    _label_ends(axes, epochs[-1], ends)
    _epoch_axis(axes, "accuracy, %")
    return figure


def likelihood_curves(run: Run) -> Figure:
    """Negative log-likelihood of the ensemble, epoch by epoch."""
    figure, axes = _plot()
    epochs = _column(run, "epoch")
    ends = []
    for name, title, own, line in (
        ("train/nll", "training", colour("muted"), (0, (2, 2))),
        ("val/nll", "validation", colour("ink"), "-"),
    ):
        if name in run.epochs[0]:
            values = _column(run, name)
            axes.plot(epochs, values, color=own, linestyle=line, marker=_marker(run), markersize=3)
            ends.append((values[-1], title, own))
    _label_ends(axes, epochs[-1], ends)
    _epoch_axis(axes, "NLL of the ensemble, nats")
    return figure


def learning_curves_beside(runs: Sequence[Run]) -> Figure:
    """Accuracy of the ensembles of several runs."""
    figure, axes = _plot()
    ends = []
    for place, run in enumerate(runs):
        split = "val" if "val/ensemble" in run.epochs[0] else "train"
        epochs, values = _column(run, "epoch"), _column(run, f"{split}/ensemble", 100)
        line = _DASHES[place % len(_DASHES)]
        axes.plot(
            epochs,
            values,
            color=colour("ink"),
            linestyle=line,
            marker=_marker(run),
            markersize=3,
            linewidth=1.4,
        )
        ends.append((values[-1], run.letter, colour("ink")))
    _label_ends(axes, max(run.epochs[-1]["epoch"] for run in runs), ends)
    _epoch_axis(axes, "accuracy of the ensemble, %")
    return figure


def reliability(measured: CalibrationCurve) -> Figure:
    """Accuracy by confidence, and how many images are how confident."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    bins = measured.bins
    width = 100 / len(bins)
    lefts = [width * place for place in range(len(bins))]
    for left, each in zip(lefts, bins, strict=True):
        if each.count:
            faint = 0.25 if each.count < FEW else 0.75
            upper.bar(
                left, 100 * each.accuracy, width * 0.9, align="edge", color=colour("accent"), alpha=faint
            )
    upper.plot([0, 100], [0, 100], color=colour("muted"), linewidth=1, linestyle=(0, (3, 3)))
    shown = [each for each in bins if each.count]
    means = [100 * each.confidence for each in shown], [100 * each.accuracy for each in shown]
    upper.plot(*means, "o", markersize=3.5, color=colour("ink"), clip_on=False)
    upper.set(ylabel="accuracy, %", ylim=(0, 103), xlim=(0, 100), yticks=range(0, 101, 25))
    upper.text(
        0.03,
        0.95,
        f"ECE {100 * measured.metrics['ece']:.2f} %",
        transform=upper.transAxes,
        va="top",
        fontsize=10,
    )
    total = sum(each.count for each in bins)
    shares = [100 * each.count / total for each in bins]
    lower.bar(lefts, shares, width * 0.9, align="edge", color=colour("muted"))
    lower.set(ylabel="images, %", xlabel="confidence: the largest probability, %")
    lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    figure.align_ylabels()
    return figure


def risk_coverage(report: ReliabilityReport) -> Figure:
    """Error among the surest images, for ever more of them, with the thresholds from validation."""
    figure, axes = _plot()
    curve = report.risk_coverage
    coverage = [100 * each for each in curve.coverage]
    risk = [100 * each for each in curve.risk]
    axes.plot(coverage, risk, color=colour("accent"))
    kept = [each for each in report.abstentions if each.coverage > 0]
    labelled = set[float]()
    for each in kept:
        place = (100 * each.coverage, 100 * each.error)
        axes.plot(*place, "o", markersize=5, color=colour("ink"), clip_on=False)
        if all(abs(each.coverage - other) > 0.05 for other in labelled):
            beside = (-5, 5) if each.coverage > 0.1 else (0, 7)  # not over the axis
            side = "right" if each.coverage > 0.1 else "center"
            axes.annotate(
                f"{100 * each.risk:g} %", place, beside, textcoords="offset points", ha=side, fontsize=8
            )
            labelled.add(each.coverage)
    axes.set(xlabel="coverage: images answered, %", ylabel="error among the answers, %", xlim=(0, 102))
    axes.set_ylim(bottom=0)
    return figure


def cascade(evaluation: CascadeEvaluation) -> Figure:
    """Accuracy of a cascade against its mean multiply-accumulates."""
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
        place, height = point.macs, _percent(point)
        if point.kind == "exit":
            number = int(point.name.removeprefix("exit "))
            badges.append((place, height, str(number), exit_colour(number)))
        elif point.kind == "ensemble":
            badges.append((place, height, "E", colour("ink")))
        elif point.kind == "single":
            badges.append((place, height, "S", colour("muted")))
        elif point.kind == "chosen":
            axes.plot(
                place,
                height,
                "o",
                markersize=_BADGE + 3,
                markeredgewidth=1.6,
                color=colour("accent"),
                fillstyle="none",
                clip_on=False,
                zorder=6,
            )
    _single(axes, 1, "single network’s MACs")
    axes.margins(x=0.08, y=0.15)
    _badges(axes, badges)
    axes.set(xlabel="mean MACs ÷ single network’s", ylabel="test accuracy, %")
    return figure


def worst_classes(worst: Sequence[WorstClass]) -> Figure:
    """What the images of the most often missed classes are taken for."""
    figure = Figure(figsize=(_SIZE[0], 0.6 + 0.27 * len(worst)), layout="constrained")
    axes = figure.subplots()
    for row, each in enumerate(worst):
        share = 100 * each.accuracy
        axes.barh(row, 100, 0.62, color=colour("rule"), alpha=0.45)
        axes.barh(row, share, 0.62, color=colour("accent"))
        others = ", ".join(f"{clipped(name, 14)} ×{times}" for name, times in each.confused_with.items())
        inside = share < 55
        axes.text(
            share + 1.5 if inside else 1.5,
            row,
            others,
            va="center",
            fontsize=7.5,
            color=colour("ink" if inside else "paper"),
        )
    axes.set_yticks(range(len(worst)), [clipped(each.name, 18) for each in worst])
    axes.tick_params(axis="y", labelcolor=colour("ink"))
    axes.set_ylim(len(worst) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(0, 100), xlabel="recognised, % of the class’s images")
    return figure


def corruption(measured: Corruptions) -> Figure:
    """Accuracy under each corruption and their mean, by strength."""
    figure, axes = _plot()
    places = [0, *STRENGTHS]
    clean = 100 * measured.clean.ensemble["top1"]
    for own in measured.corruptions.values():
        values = [100 * each.ensemble["top1"] for each in own]
        axes.plot(places, [clean, *values], color=colour("muted"), linewidth=0.8, alpha=0.5)
    means = [100 * measured.mean("top1", strength) for strength in STRENGTHS]
    axes.plot(places, [clean, *means], color=colour("accent"), linewidth=2.2, marker="o", markersize=4)
    _label_ends(axes, STRENGTHS[-1], [(means[-1], "mean", colour("accent"))])
    axes.set(xlabel="strength of the corruption", ylabel="accuracy, %", xticks=places)
    axes.set_ylim(bottom=0)
    return figure


def standard_error(share: float, n: int) -> float:
    """Of a share of n examples."""
    return sqrt(share * (1 - share) / n)


def clipped(text: str, length: int) -> str:
    """A name that may be long."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _plot() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.subplots()


def _badges(axes: Axes, badges: Iterable[tuple[float, float, str, str]]) -> None:
    """Points with their names in them: (x, %, name, colour) each; what would hide another stands aside.

    The axis ends just above 100 %.
    """
    badges = list(badges)
    for x, y, _, own in badges:
        axes.plot(x, y, "o", markersize=3, color=own)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    high = min(high, 100 + 0.03 * (100 - low))
    axes.set(xlim=(left, right), ylim=(low, high))
    taken: list[tuple[float, float]] = []
    for x, y, name, own in badges:
        across, up = _SPAN[0] * (x - left) / (right - left), _SPAN[1] * (y - low) / (high - low)
        aside = 0.0
        while any(hypot(across + aside - other, up - above) < _BADGE - 0.1 for other, above in taken):
            aside += _BADGE
        taken.append((across + aside, up))
        if aside:
            line = {"arrowstyle": "-", "color": own, "linewidth": 0.8}
            axes.annotate("", (x, y), (aside, 0), textcoords="offset points", arrowprops=line, zorder=4)
        axes.annotate(
            name,
            (x, y),
            (aside, 0),
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            color=colour("paper"),
            fontsize=8,
            weight="bold",
            zorder=5,
            annotation_clip=False,
            bbox={"boxstyle": "circle,pad=0.28", "facecolor": own, "edgecolor": colour("paper")},
        )


def _single(axes: Axes, x: float, text: str) -> None:
    """A line where the single network's cost lies, and its name above the plot."""
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
    """Names of lines at their right ends: (value, name, colour) each."""
    ends = list(ends)
    low, high = axes.get_ylim()
    places = apart([value for value, _, _ in ends], _LABEL * (high - low))
    for place, (_, name, own) in zip(places, ends, strict=True):
        axes.annotate(
            name,
            (x, place),
            (7, 0),
            textcoords="offset points",
            va="center",
            color=own,
            annotation_clip=False,
        )


def _epoch_axis(axes: Axes, title: str) -> None:
    axes.set(xlabel="epoch", ylabel=title)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _marker(run: Run) -> str:
    """Points of their own where there are few, as one alone makes no line."""
    return "o" if len(run.epochs) <= 12 else ""


def _told(run: Run, split: str) -> set[str]:
    """Whose accuracy a run's table tells on a split: `exit0`, …, `ensemble`.

    Where a method trains as one what predicts as several, exit 0's column is that of them all, and left out.
    """
    names = {"ensemble", *(f"exit{number}" for number in range(run.exits))}
    told = {name for name in names if f"{split}/{name}" in run.epochs[0]}
    return told if told == names else told & {"ensemble"}


def _column(run: Run, name: str, factor: float = 1) -> list[float]:
    return [factor * row[name] for row in run.epochs]


def _unit(macs: int) -> tuple[float, str]:
    return (1e9, "billions") if macs >= 1e9 else (1e6, "millions")


def _percent(point: Point) -> float:
    assert point.accuracy is not None
    return 100 * point.accuracy
