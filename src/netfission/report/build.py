"""Build the report: draw figures, collect what the page shows, and write page and figures together."""

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tqdm import tqdm

from netfission.classifier import Classifier
from netfission.evaluation.corruption import MIN_SIDE
from netfission.network import FissionNetwork
from netfission.report.page import (
    FigureFiles,
    MissingPart,
    Plot,
    load_images,
    missing_cascade,
    missing_shift,
    page_environment,
    side_by_side,
    split_settings,
    unbroken,
)
from netfission.report.plots import ACCURACY, run_plots
from netfission.report.run_data import Run, load_runs
from netfission.report.targets import target_page
from netfission.report.votes import Votes, collect_votes
from netfission.runs.folder import RunFolder
from netfission.tasks.registry import task_kind
from netfission.utils.errors import invalid
from netfission.utils.files import check_target, write_together
from netfission.utils.outputs import check_out_folder


@dataclass(frozen=True)
class Section:
    """The section of one run.

    Attributes:
        run: the run.
        plots: figures by name.
        missing: parts that are left out, by name.
        votes: of the exits; None if the images cannot be read.
        changed_settings: settings that differ from their defaults, and the most important ones.
        default_settings: all other settings that the run's method uses.
    """

    run: Run
    plots: dict[str, Plot]
    missing: dict[str, MissingPart]
    votes: Votes | None
    changed_settings: dict[str, Any]
    default_settings: dict[str, Any]


def write_report(paths: Sequence[Path], out: Path | None = None, data: str | None = None) -> Path:
    """Write a report about one run, or about several runs side by side.

    The page is one file that needs no other file. Its figures are also written as SVG files, to a folder next
    to the page with the name of the page. The page of a fine-tuning shows its single network beside the
    ensemble.

    Args:
        paths: folders of finished runs on the same data.
        out: the page, ending in `.html`; default `report.html` in the run's folder, or in the working
            directory for several runs.
        data: where the data set is now; None if it has not moved.

    Returns:
        The page.

    Raises:
        ValueError: there is no run, a run cannot be read or is on other data, or `out` or `data` is
            not valid.
        OSError: a file cannot be written, or there is no data set at `data`.

    Example:
        >>> write_report([])
        Traceback (most recent call last):
        ValueError: run must be the folder of a run, or several folders, got none
    """
    if not paths:
        raise invalid("run", "the folder of a run, or several folders", found="none")
    page = out or RunFolder(paths[0] if len(paths) == 1 else Path()).report
    if out is not None:
        _check_out(out)
    if len(paths) == 1:
        paths = [run.path for run in RunFolder(paths[0]).shown_together()]
    figures = FigureFiles(page)
    if page != RunFolder(paths[0]).report:  # a run's own folder holds its own figures
        check_out_folder("out", figures.folder, names=r".+\.svg", mark=page)
    tasks = list(dict.fromkeys(RunFolder(path).load_config().data.task for path in paths))
    if len(tasks) > 1:
        raise invalid("run", "folders of runs of one task", found=" and ".join(tasks))
    classifies = task_kind(tasks[0]).targets.exclusive
    text = _class_page(paths, figures, data) if classifies else target_page(paths, figures, data)
    for file in figures.files:
        file.parent.mkdir(parents=True, exist_ok=True)
    write_together({page: unbroken(text)} | figures.files)  # the page first: it tells whose the figures are
    return page


def _class_page(paths: Sequence[Path], figures: FigureFiles, data: str | None) -> str:
    """Return the page about runs of classes of images."""
    runs = load_runs(paths, Run)
    sections = [
        _make_section(run, figures, data) for run in tqdm(runs, unit="run", disable=None, leave=False)
    ]
    template = page_environment().get_template("page.html.j2")
    return template.render(
        title=runs[0].title if len(runs) == 1 else f"{len(runs)} runs on {runs[0].data}",
        runs=runs,
        **side_by_side(runs, figures, ACCURACY),
        sections=sections,
        figures=quote(figures.folder.name),
        version=version("netfission"),
    )


def _check_out(out: Path) -> None:
    folder = out.parent
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    if out.suffix != ".html" or out.is_dir() or not writable:
        expected = "a file ending in .html, in a folder that exists and can be written to"
        raise invalid("out", expected, found=str(out))
    check_target("out", out)


def _make_section(run: Run, figures: FigureFiles, data: str | None) -> Section:
    path = shlex.quote(str(run.folder.path))
    votes = _load_votes(run, data)
    missing = dict(_missing_parts(run, path))
    if isinstance(votes, MissingPart):
        missing["votes"] = votes
    plots = {spec.name: figures.add(spec, run) for spec in run_plots(run)}
    shown_votes = None if isinstance(votes, MissingPart) else votes
    return Section(run, plots, missing, shown_votes, *split_settings(run))


def _load_votes(run: Run, data: str | None) -> Votes | MissingPart:
    """Return how the exits of a run vote, or why this is unknown."""
    if run.exits == 1:
        return MissingPart("With one exit there is no disagreement.")
    images = load_images(run, data)
    if isinstance(images, MissingPart):
        return images
    return collect_votes(Classifier(run.network, run.spec, run.calibration), images)


def _missing_parts(run: Run, path: str) -> Iterator[tuple[str, MissingPart]]:
    """Yield the parts that are left out because a run's folder lacks them, with their names."""
    evaluate = f"netfission evaluate {path}"
    if run.evaluation is None:
        yield "evaluation", MissingPart("The run has not been evaluated on the test split.", evaluate)
    if run.reliability is None:
        yield "reliability", MissingPart("Reliability has not been measured on the test split.", evaluate)
    elif run.reliability.scaled is None:
        reason = "There is no temperature scaling: the run was trained without validation images."
        yield "scaled", MissingPart(reason, f"netfission calibrate {path} --data DATA")
    if not run.epochs:
        reason = "There are no learning curves: metrics.csv, which training writes, is missing."
        yield "epochs", MissingPart(reason)
    if cascade := missing_cascade(run):
        yield "cascade", cascade
    if shift := missing_shift(run.out_of_distribution, evaluate):
        yield "out-of-distribution", shift
    if run.corruptions is None and min(run.spec.shape[1:]) >= MIN_SIDE:
        reason = "Accuracy on corrupted images has not been measured."
        yield "corruptions", MissingPart(reason, f"{evaluate} --corruptions")
    if not isinstance(run.network, FissionNetwork):
        method = run.config.method.method
        yield "network", MissingPart(f"Networks of method={method} are not drawn.")
