"""Build the report: draw figures, collect what the page shows, and write page and figures together."""

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment
from markupsafe import Markup
from tqdm import tqdm

from netfission.classifier import Classifier
from netfission.config import STOPS_EARLY, MethodConfig, RunConfig
from netfission.ensemble import describe_average
from netfission.evaluation.calibration import count_images
from netfission.evaluation.corruption import MIN_SIDE
from netfission.methods.registry import METHODS
from netfission.network import FissionNetwork
from netfission.report.diagram import short
from netfission.report.figures import standard_error
from netfission.report.plots import PlotSpec, comparison_plots, run_plots
from netfission.report.run_data import Run, data_differences, load_runs
from netfission.report.style import (
    RENDERING,
    css_variables,
    exit_colour_name,
    inline_svg,
    template_environment,
)
from netfission.report.votes import Votes, collect_votes
from netfission.runs.folder import RunFolder
from netfission.runs.setup import check_run_data, check_unchanged, load_run_data
from netfission.utils.errors import check_choice, invalid
from netfission.utils.files import write_together
from netfission.utils.text import decimal, percent, printable, unsaturated


@dataclass(frozen=True)
class Plot:
    """A figure of the page.

    Attributes:
        title: of the figure.
        meaning: how to read it, in one or two sentences.
        svg: the figure as a part of the page.
        file: address of the figure's own file, relative to the page.
    """

    title: str
    meaning: str
    svg: Markup
    file: str


@dataclass(frozen=True)
class MissingPart:
    """A part of the page that is left out.

    Attributes:
        reason: why, in one sentence.
        command: the command that adds it; empty if no command does.
    """

    reason: str
    command: str = ""


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
    runs = load_runs(paths)
    figures = _FigureFiles(page)
    compared = [figures.add(spec) for spec in comparison_plots(runs)] if len(runs) > 1 else []
    sections = [
        _make_section(run, figures, data) for run in tqdm(runs, unit="run", disable=None, leave=False)
    ]
    template = _environment().get_template("page.html.j2")
    text = template.render(
        title=runs[0].title if len(runs) == 1 else f"{len(runs)} runs on {runs[0].data}",
        runs=runs,
        compared=compared,
        differing=_differing_settings(runs),
        data_differences=data_differences(runs),
        sections=sections,
        figures=quote(figures.folder.name),
        version=version("netfission"),
    )
    for file in figures.files:
        file.parent.mkdir(parents=True, exist_ok=True)
    write_together(figures.files | {page: text})
    return page


def _check_out(out: Path) -> None:
    folder = out.parent
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    if out.suffix != ".html" or out.is_dir() or not writable:
        expected = "a file ending in .html, in a folder that exists and can be written to"
        raise invalid("out", expected, found=str(out))


class _FigureFiles:
    """The figures' own files next to the page.

    Attributes:
        folder: of the files.
        files: contents by path.
    """

    def __init__(self, page: Path) -> None:
        self.folder = page.with_suffix("")
        self.files: dict[Path, str | bytes] = {}

    def add(self, spec: PlotSpec, run: Run | None = None) -> Plot:
        """Draw a figure and return it for the page; each of several runs has its own subfolder."""
        name = f"{spec.name}.svg"
        path = Path(run.key, name) if run is not None and run.letter else Path(name)
        svg = spec.draw()
        self.files[self.folder / path] = svg
        key = f"{run.key if run else 'runs'}-{spec.name}"
        part = Markup(inline_svg(svg, key, f"{spec.title}. {spec.meaning}"))
        return Plot(spec.title, spec.meaning, part, quote(f"{self.folder.name}/{path.as_posix()}"))


def _make_section(run: Run, figures: _FigureFiles, data: str | None) -> Section:
    path = shlex.quote(str(run.folder.path))
    votes = _load_votes(run, data)
    missing = dict(_missing_parts(run, path))
    if isinstance(votes, MissingPart):
        missing["votes"] = votes
    plots = {spec.name: figures.add(spec, run) for spec in run_plots(run)}
    shown_votes = None if isinstance(votes, MissingPart) else votes
    return Section(run, plots, missing, shown_votes, *_split_settings(run))


def _load_votes(run: Run, data: str | None) -> Votes | MissingPart:
    """Return how the exits of a run vote, or why this is unknown."""
    if run.exits == 1:
        return MissingPart("With one exit there is no disagreement.")
    config = run.config
    if data is not None:
        config = RunConfig.from_dict(config.to_dict() | {"data": data})
    try:
        images = load_run_data(config.data, config.fission.seed)
        if images.classes != run.spec.classes:
            raise invalid("data", "of the run's classes", found=f"{data or run.data} with other classes")
        if data is not None:
            check_run_data(run.config, run.spec, data)
        check_unchanged(images, run.folder.load_data_summary())
    except (ValueError, OSError) as error:
        if data is not None:
            raise
        return MissingPart(
            f"The data set {run.data} cannot be read here, so its images are left out ({_one_line(error)}). "
            "Pass the folder where it is now:",
            f"netfission report {shlex.quote(str(run.folder.path))} --data FOLDER",
        )
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
    if run.cascade is None and run.config.method.method in STOPS_EARLY and run.exits > 1:
        if run.config.data.validation:
            yield "cascade", MissingPart("Early exit has not been measured.", f"{evaluate} --cascade")
        else:
            reason = "Early exit needs thresholds from validation images, and the run has none."
            yield "cascade", MissingPart(reason)
    if run.out_of_distribution is None:
        reason = "Uncertainty on out-of-distribution images has not been measured."
        yield "out-of-distribution", MissingPart(reason, f"{evaluate} --ood DATA")
    if run.corruptions is None and min(run.spec.shape[1:]) >= MIN_SIDE:
        reason = "Accuracy on corrupted images has not been measured."
        yield "corruptions", MissingPart(reason, f"{evaluate} --corruptions")
    if not isinstance(run.network, FissionNetwork):
        method = run.config.method.method
        yield "network", MissingPart(f"Networks of method={method} are not drawn.")


def _split_settings(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that were chosen, and those left at their defaults."""
    defaults = RunConfig().to_dict()
    used = METHODS[check_choice("method", run.config.method.method, METHODS)].settings
    unused = {field.name for field in fields(MethodConfig)} - {"method", *used}
    settings = {name: value for name, value in run.config.to_dict().items() if name not in unused}
    always = {"data": run.data, "model": run.spec.model, "exits": run.exits, "seed": run.config.fission.seed}
    changed = always | {
        name: value for name, value in settings.items() if value != defaults[name] and name not in always
    }
    return changed, {name: value for name, value in settings.items() if name not in changed}


def _differing_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all runs, with the value of each run."""
    all_settings = [run.config.to_dict() | {"data": run.data} for run in runs]
    values = {name: [settings[name] for settings in all_settings] for name in all_settings[0]}
    return {
        name: of_runs for name, of_runs in values.items() if any(value != of_runs[0] for value in of_runs)
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@cache  # with its templates, which take as long to compile as a figure to draw
def _environment() -> Environment:
    environment = template_environment()
    environment.filters |= {
        "percent": percent,
        "unsaturated": unsaturated,
        "decimal": decimal,
        "short": short,
        "number": "{:,}".format,
        "images": count_images,
        "error": standard_error,
        "exit": exit_colour_name,
        "average": describe_average,
        "basename": lambda path: printable(Path(path).name),
        "setting": _setting,
    }
    css = files("netfission.report").joinpath("templates/page.css").read_text(encoding="utf-8")
    environment.globals["style"] = Markup("\n".join((css_variables(), RENDERING, css)))
    return environment


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)
