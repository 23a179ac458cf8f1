"""The figures that can be drawn of a run or of several, with titles and explanations."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from netfission.evaluation.calibration import count_images
from netfission.inference.cascade import describe_stops
from netfission.network import FissionNetwork
from netfission.profiling.macs import list_calls
from netfission.report import figures
from netfission.report.diagram import draw_network, short
from netfission.report.run_data import NetworkRun, Run
from netfission.report.style import render_svg
from netfission.tasks.figures import FEW, FigureData


@dataclass(frozen=True)
class PlotSpec:
    """A figure that can be drawn.

    Attributes:
        name: of its file.
        title: of the figure.
        meaning: how to read it, in one or two sentences.
        draw: returns the text of a standalone SVG.
    """

    name: str
    title: str
    meaning: str
    draw: Callable[[], str]


@dataclass(frozen=True)
class Quality:
    """What figures show of how good networks are.

    Attributes:
        measure: its name in an evaluation, drawn against cost.
        title: of its axis.
        factor: by which it is multiplied there.
        score: of the learning curves, as the title of their axis, with its unit behind a comma.
        score_factor: by which it is multiplied there.
        is_share: whether the measure is a share of the test images, which has a standard error.
        subject: of the figure against cost, in a word.
        lower_is_better: whether smaller values of the measure and of the score are better ones.
    """

    measure: str
    title: str
    factor: float
    score: str
    score_factor: float
    is_share: bool = False
    subject: str = "Quality"
    lower_is_better: bool = False

    @property
    def score_name(self) -> str:
        """The score at the start of a sentence, without its unit."""
        name = self.score.partition(",")[0]
        return f"{name[0].upper()}{name[1:]}"

    @property
    def direction(self) -> str:
        """A sentence for readers who may not know the measure; empty if more is better, as most expect."""
        return " Lower is better." if self.lower_is_better else ""


ACCURACY = Quality("top1", "accuracy, %", 100, "accuracy, %", 100, is_share=True, subject="Accuracy")


def run_plots(run: Run) -> Iterator[PlotSpec]:
    """Yield the figures of one run."""
    yield from cost_plots([run], ACCURACY)
    yield from cascade_plots(run)
    yield from training_plots(run, ACCURACY)
    yield from _reliability_plots(run)
    if run.corruptions is not None:
        yield _spec(
            "corruptions",
            "Corrupted images",
            f"Accuracy without corruption (0) and on {run.corruptions.n:,} images at five strengths "
            f"({run.corruptions.library}): one line per corruption ({len(run.corruptions.corruptions)}), and "
            "their mean.",
            partial(figures.corruption, run.corruptions),
        )
    yield from network_plots(run)


def network_plots(run: NetworkRun) -> Iterator[PlotSpec]:
    """Yield the drawing of a run's network, if it has paths."""
    if isinstance(run.network, FissionNetwork):
        yield PlotSpec("network", "Paths of the network", _network_meaning(run), partial(draw_network, run))


def cost_plots(runs: Sequence[NetworkRun], quality: Quality) -> Iterator[PlotSpec]:
    """Yield the figure of a measure against the cost, of the runs that have been evaluated.

    Args:
        runs: of one task.
        quality: the measure.
    """
    shown = [run for run in runs if run.evaluation and quality.measure in run.evaluation.ensemble]
    if not shown:
        return
    several = len(runs) > 1
    wholes = "Letters: the runs" if several else f"{runs[0].badge}: the {runs[0].whole}"
    exits = " numbers: single exits;" if any(run.exits > 1 and run.costs.exits for run in shown) else ""
    assert shown[0].evaluation is not None
    images = "" if several else f" on {shown[0].evaluation.n:,} test images"
    bars = f" Bars: ± one standard error{images}." if quality.is_share else ""
    yield _spec(
        f"{quality.subject.lower()}-cost",
        f"{quality.subject} against cost",
        f"{wholes};{exits} each at the multiply-accumulates (MACs) that it needs"
        f"{'' if bars else images and f',{images}'}.{quality.direction}{bars}{_MOVED}{_hollow(shown)}",
        partial(
            figures.measure_against_cost,
            shown,
            quality.measure,
            quality.title,
            quality.factor,
            errors=quality.is_share,
        ),
    )


def data_plots(data: Sequence[FigureData]) -> Iterator[PlotSpec]:
    """Yield figures that a task describes."""
    for one in data:
        yield _spec(one.name, one.title, one.meaning, partial(figures.draw, one))


def comparison_plots(runs: Sequence[NetworkRun], quality: Quality) -> Iterator[PlotSpec]:
    """Yield the figures that show several runs at once.

    Args:
        runs: of one task.
        quality: what is shown of them.
    """
    yield from cost_plots(runs, quality)
    trained = [run for run in runs if run.epochs]
    others = [run.letter for run in runs if not run.epochs]
    left_out = f" Without metrics.csv: {', '.join(others)}." if others else ""
    if trained:
        yield _spec(
            "learning",
            "Learning curves",
            f"{quality.score_name} of each run, of all its exits or members, on {_watched_split(trained)} "
            f"images after every epoch.{quality.direction}{left_out}",
            partial(figures.learning_curves_beside, trained, quality.score, quality.score_factor),
        )


def _spec(name: str, title: str, meaning: str, draw: Callable[[], Figure]) -> PlotSpec:
    return PlotSpec(name, title, meaning, partial(render_svg, draw))


def cascade_plots(run: NetworkRun) -> Iterator[PlotSpec]:
    """Yield the figure of early exit, if it has been measured."""
    cascade = run.cascade
    if cascade is not None:
        order = ", ".join(map(str, cascade.order))
        dotted = "" if cascade.least_accuracy is None else " Dotted: the accepted loss against all exits."
        if dotted and cascade.drawn_bound is None:
            dotted = " The accepted loss against all exits is far below."
        single = any(point.kind == "single" and point.accuracy is not None for point in cascade.points)
        whole = f"E: all exits; {'S: the single network, trained by itself; ' if single else ''}"
        stops = describe_stops(cascade.rule, cascade.choice.thresholds, cascade.unit)
        first = f"With those of the chosen cascade, {stops}. " if stops.startswith("every") else ""
        tiles = "" if cascade.tile is None else f" of {cascade.tile}×{cascade.tile} pixels"
        yield _spec(
            "cascade",
            "Early exit",
            f"Exits run in the order {order}; {'an' if cascade.tile is None else 'a'} {cascade.unit}{tiles} "
            f"stops once its {cascade.rule} is above a "
            f"threshold. {first}Thresholds were chosen on {cascade.validation_images:,} validation images; "
            f"{cascade.measure} is measured on {cascade.test_images:,} test images. Ring: the chosen "
            f"cascade; {whole}numbers: single exits.{dotted}{_MOVED}",
            partial(figures.cascade, cascade),
        )


def training_plots(run: NetworkRun, quality: Quality) -> Iterator[PlotSpec]:
    """Yield the figures of a training.

    Args:
        run: of any task.
        quality: whose score is shown of each exit after every epoch.
    """
    if not run.epochs:
        return
    split = _watched_split([run])
    style = "Hollow" if len(run.epochs) == 1 else "Dashed"
    dashed = f" {style}: augmented training images, during the epoch." if split == "validation" else ""
    images = run.validation_images if split == "validation" else None
    n = "" if images is None else f" (n = {images:,})"
    yield _spec(
        "learning",
        "Learning curves",
        f"{quality.score_name} on {split} images after every epoch{n}.{quality.direction}{dashed}",
        partial(figures.learning_curves, run, quality.score, quality.score_factor),
    )
    yield _spec(
        "likelihood",
        "Negative log-likelihood",
        "Lower is better. If validation rises while training falls, the network overfits.",
        partial(figures.likelihood_curves, run),
    )


def _reliability_plots(run: Run) -> Iterator[PlotSpec]:
    report = run.reliability
    if report is None:
        return
    yield _spec(
        "reliability",
        "Reliability before scaling",
        "Bars that end on the dashed line are calibrated: of the predictions with a confidence of 80 %, 80 % "
        f"are correct. Pale bars contain fewer than {FEW} of the {report.n:,} test images.",
        partial(figures.reliability, report.raw),
    )
    if report.scaled is not None:
        guess = f", {report.guess}" if report.guess else ""
        yield _spec(
            "reliability-scaled",
            "Reliability after scaling",
            f"The same with logits divided by {report.temperature:.3f}, the temperature that fits the "
            f"{count_images(report.validation_images, report.fitted_on)} best{guess}.",
            partial(figures.reliability, report.scaled),
        )
    has_dots = any(abstention.coverage > 0 for abstention in report.abstentions)
    dots = f" Dots: thresholds chosen on {report.fitted_on}, with their target risk." if has_dots else ""
    yield _spec(
        "risk-coverage",
        "Risk–coverage",
        f"Share of wrong answers if only the most confident of the {report.n:,} test images are answered; "
        f"area under the curve {report.risk_coverage.area:.4f}.{dots}",
        partial(figures.risk_coverage, report),
    )
    missed = [one_class for one_class in report.worst if one_class.accuracy < 1]
    if missed:
        yield _spec(
            "worst-classes",
            "Worst classes",
            "Bars: share of each class’s test images, whose number is in brackets, that is classified "
            "correctly. Names and numbers: the most frequent wrong predictions, and how often.",
            partial(figures.worst_classes, missed),
        )


def _network_meaning(run: NetworkRun) -> str:
    shared = "; grey boxes are shared by several exits" if run.exits > 1 else ""
    largest = max(size.parameters_stored for part in run.costs.parts for size in part.paths if size)
    uncounted = f" Not counted: {list_calls(run.costs.uncounted)}." if run.costs.uncounted else ""
    return (
        "Each column is the path of an exit, from top to bottom. The area of a box is its number of "
        f"parameters; the largest has {short(largest)}{shared}. MACs: multiply-accumulates per image."
        f"{uncounted}"
    )


_MOVED = " Badges that would overlap are moved to the right, with a line to their position."


def _hollow(runs: Sequence[NetworkRun]) -> str:
    sizes = [run.costs.size for run in runs]
    sparse = any(size.macs_effective != size.macs_dense for size in sizes)
    return " Hollow: effective MACs, without removed weights." if sparse else ""


def _watched_split(runs: Sequence[NetworkRun]) -> str:
    """Return the split on which the learning curves of runs are measured."""
    held_out = ["val/ensemble" in run.epochs[0] for run in runs]
    return "validation" if all(held_out) else "validation or training" if any(held_out) else "training"
