"""Which figures there is something to draw of, with their titles and what they mean."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from netfission.network import FissionNetwork
from netfission.profiling.macs import list_calls
from netfission.report import figures
from netfission.report.diagram import draw_network, short
from netfission.report.run_data import Run
from netfission.report.style import drawn


@dataclass(frozen=True)
class Wanted:
    """A figure that can be drawn.

    Attributes:
        name: of its file.
        title: what it shows.
        meaning: how to read it, in a sentence or two.
        draw: gives the text of an SVG that can be opened alone.
    """

    name: str
    title: str
    meaning: str
    draw: Callable[[], str]


def plots_of(run: Run) -> Iterator[Wanted]:
    """The figures of one run."""
    yield from _of_cost(run)
    yield from _of_training(run)
    yield from _of_reliability(run)
    if run.corruptions is not None:
        measured = run.corruptions
        yield Wanted(
            "corruptions",
            "Under corruption",
            f"Accuracy on {measured.n:,} test images as they are (0) and at five strengths: a line for each "
            f"of {len(measured.corruptions)} corruptions, and their mean.",
            partial(drawn, partial(figures.corruption, measured)),
        )
    if isinstance(run.network, FissionNetwork):
        yield Wanted("network", "The network as its paths", _network(run), partial(draw_network, run))


def plots_beside(runs: Sequence[Run]) -> Iterator[Wanted]:
    """The figures of several runs at once."""
    evaluated = [run for run in runs if run.evaluation is not None]
    if evaluated:
        yield Wanted(
            "accuracy-cost",
            "Accuracy against cost",
            "Letters are the runs’ ensembles, numbers their exits alone, each with the multiply-accumulates "
            f"(MACs) it needs to run; bars are ± one standard error.{_ASIDE}{_hollow(evaluated)}",
            partial(drawn, partial(figures.accuracy_against_cost, evaluated)),
        )
    trained = [run for run in runs if run.epochs]
    others = [run.letter for run in runs if not run.epochs]
    left_out = f" Without metrics.csv: {', '.join(others)}." if others else ""
    if trained:
        yield Wanted(
            "learning",
            "Learning curves",
            f"Accuracy of each run’s ensemble on {_watched(trained)} images after every epoch.{left_out}",
            partial(drawn, partial(figures.learning_curves_beside, trained)),
        )


def _of_cost(run: Run) -> Iterator[Wanted]:
    if run.evaluation is not None:
        exits = ", numbers its exits alone" if run.costs.exits else ""
        yield Wanted(
            "accuracy-cost",
            "Accuracy against cost",
            f"{run.letter or 'E'} is the ensemble{exits}, each with the multiply-accumulates (MACs) it needs "
            f"to run; bars are ± one standard error on {run.evaluation.n:,} test images."
            f"{_ASIDE}{_hollow([run])}",
            partial(drawn, partial(figures.accuracy_against_cost, [run])),
        )
    if run.cascade is not None:
        order = ", ".join(map(str, run.cascade.order))
        yield Wanted(
            "cascade",
            "Stopping early",
            f"Exits run in the order {order}, and an image stops once the {run.cascade.rule} suffices. "
            f"Thresholds from {run.cascade.validation_images:,} validation images, accuracy on "
            f"{run.cascade.test_images:,} test images. Ring: the cascade as chosen; E: all exits; numbers: "
            f"exits alone.{_ASIDE}",
            partial(drawn, partial(figures.cascade, run.cascade)),
        )


def _of_training(run: Run) -> Iterator[Wanted]:
    if not run.epochs:
        return
    split = _watched([run])
    faint = " Dashed: training images, as augmented, during the epoch." if split == "validation" else ""
    n = "" if run.calibration is None else f" (n = {run.calibration.n:,})"
    yield Wanted(
        "learning",
        "Learning curves",
        f"Accuracy on {split} images after every epoch{n}.{faint}",
        partial(drawn, partial(figures.learning_curves, run)),
    )
    yield Wanted(
        "likelihood",
        "Likelihood",
        "Lower is better. Where validation turns up while training goes on down, the network overfits.",
        partial(drawn, partial(figures.likelihood_curves, run)),
    )


def _of_reliability(run: Run) -> Iterator[Wanted]:
    report = run.reliability
    if report is None:
        return
    yield Wanted(
        "reliability",
        "Reliability before scaling",
        "Bars that end on the dashed line are honest: of the images it is 80 % sure of, it gets 80 % right. "
        f"Pale bars stand on fewer than {figures.FEW} of the {report.n:,} test images.",
        partial(drawn, partial(figures.reliability, report.raw)),
    )
    if report.scaled is not None:
        guess = " As none of those was wrong, it is a guess." if report.flawless else ""
        yield Wanted(
            "reliability-scaled",
            "Reliability after scaling",
            f"The same with logits divided by {report.temperature:.3f}, the temperature that fits the "
            f"{report.validation_images:,} validation images best.{guess}",
            partial(drawn, partial(figures.reliability, report.scaled)),
        )
    dots = any(each.coverage > 0 for each in report.abstentions)
    named = " Dots: thresholds chosen on validation images for the risk that they name." if dots else ""
    yield Wanted(
        "risk-coverage",
        "Risk–coverage",
        f"The error among the answers where only the surest of the {report.n:,} test images are answered; "
        f"area under the curve {report.risk_coverage.area:.4f}.{named}",
        partial(drawn, partial(figures.risk_coverage, report)),
    )
    missed = [each for each in report.worst if each.accuracy < 1]
    if missed:
        low, high = min(each.n for each in missed), max(each.n for each in missed)
        n = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        yield Wanted(
            "worst-classes",
            "Worst classes",
            "Bars: the share of each class’s test images that is recognised. Names and numbers: what the "
            f"others are most often taken for, and how many of them. {n} test images a class.",
            partial(drawn, partial(figures.worst_classes, missed)),
        )


def _network(run: Run) -> str:
    shared = "; grey ones are shared by several exits" if run.exits > 1 else ""
    largest = max(size.parameters_stored for part in run.costs.parts for size in part.paths if size)
    uncounted = f" MACs leave out {list_calls(run.costs.uncounted)}." if run.costs.uncounted else ""
    return (
        "Each column is an exit’s path, from top to bottom. The area of a box is its parameters, of the "
        f"largest {short(largest)}{shared}. MACs: multiply-accumulates for one image.{uncounted}"
    )


_ASIDE = " Badges that would cover one another are moved to the right, tied to their places."


def _hollow(runs: Sequence[Run]) -> str:
    sizes = [run.costs.size for run in runs]
    sparse = any(size.macs_effective != size.macs_dense for size in sizes)
    return " Hollow: MACs that meet a weight that is not removed." if sparse else ""


def _watched(runs: Sequence[Run]) -> str:
    held_out = ["val/ensemble" in run.epochs[0] for run in runs]
    return "validation" if all(held_out) else "validation or training" if any(held_out) else "training"
