"""What the pages of all reports share: figures beside the page, settings, templates, and the run's images."""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment
from markupsafe import Markup

from netfission.config import STOPS_EARLY, MethodConfig, RunConfig
from netfission.data import ImageData
from netfission.ensemble import describe_average
from netfission.evaluation.calibration import count_images
from netfission.evaluation.metrics import accuracy_error
from netfission.evaluation.out_of_distribution import OutOfDistribution
from netfission.methods.registry import METHODS
from netfission.report.diagram import short
from netfission.report.plots import PlotSpec, Quality, comparison_plots
from netfission.report.run_data import NetworkRun, data_differences
from netfission.report.style import (
    RENDERING,
    css_variables,
    exit_colour_name,
    inline_svg,
    template_environment,
)
from netfission.runs.setup import check_run_data, check_unchanged, load_run_data
from netfission.tasks.evaluation import measure_number, measure_title
from netfission.utils.errors import check_choice, invalid
from netfission.utils.text import decimal, minus, percent, printable, unsaturated

_FEATURE_DETECTORS = {"mahalanobis": "Mahalanobis", "knn": "KNN", "vim": "ViM", "react": "ReAct"}


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


class FigureFiles:
    """The figures' own files next to the page.

    Attributes:
        folder: of the files.
        files: contents by path.
    """

    def __init__(self, page: Path) -> None:
        self.folder = page.with_suffix("")
        self.files: dict[Path, str | bytes] = {}

    def add(self, spec: PlotSpec, run: NetworkRun | None = None) -> Plot:
        """Draw a figure and return it for the page; each of several runs has its own subfolder."""
        name = f"{spec.name}.svg"
        path = Path(run.key, name) if run is not None and run.letter else Path(name)
        svg = spec.draw()
        self.files[self.folder / path] = svg
        key = f"{run.key if run else 'runs'}-{spec.name}"
        part = Markup(inline_svg(svg, key, f"{spec.title}. {spec.meaning}"))
        return Plot(spec.title, spec.meaning, part, quote(f"{self.folder.name}/{path.as_posix()}"))


def load_images(run: NetworkRun, data: str | None) -> ImageData | MissingPart:
    """Return the data set of a run, or why it cannot be read.

    Args:
        run: the run.
        data: where the data set is now; None if it has not moved.

    Raises:
        ValueError: `data` is not the run's data set.
        OSError: there is no data set at `data`.
    """
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
    return images


def missing_cascade(run: NetworkRun) -> MissingPart | None:
    """Return why a page shows no early exit; None if it does, or the run's network cannot stop early."""
    if run.cascade is not None or run.config.method.method not in STOPS_EARLY or run.exits == 1:
        return None
    if not run.config.data.validation:
        return MissingPart("Early exit needs thresholds from validation images, and the run has none.")
    command = f"netfission evaluate {shlex.quote(str(run.folder.path))} --cascade"
    return MissingPart("Early exit has not been measured.", command)


def missing_shift(measured: Sequence[OutOfDistribution] | None, evaluate: str) -> MissingPart | None:
    """Return why a page shows no out-of-distribution images, and the command that adds them to `evaluate`."""
    if measured is not None:
        return None
    reason = "Uncertainty on out-of-distribution images has not been measured."
    return MissingPart(reason, f"{evaluate} --ood DATA")


def side_by_side(runs: Sequence[NetworkRun], figures: FigureFiles, quality: Quality) -> dict[str, Any]:
    """Return what a page shows of several runs together, by the names in its template.

    Args:
        runs: of one task.
        figures: to which the figures are added, if there are several runs.
        quality: what the figures show.
    """
    plots = comparison_plots(runs, quality) if len(runs) > 1 else ()
    return {
        "compared": [figures.add(spec) for spec in plots],
        "differing": _differing_settings(runs),
        "data_differences": data_differences(runs),
    }


def _differing_settings(runs: Sequence[NetworkRun]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all runs, with the value of each run."""
    all_settings = [run.config.to_dict() | {"data": run.data} for run in runs]
    values = {name: [settings[name] for settings in all_settings] for name in all_settings[0]}
    return {
        name: of_runs for name, of_runs in values.items() if any(value != of_runs[0] for value in of_runs)
    }


def split_settings(run: NetworkRun) -> tuple[dict[str, Any], dict[str, Any]]:
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


def _read_features(scores: Iterable[str]) -> str:
    """Return which of the scores read features, with the verb."""
    found = [title for name, title in _FEATURE_DETECTORS.items() if name in scores]
    return f"{' and '.join(filter(None, (', '.join(found[:-1]), found[-1])))} read{'s' * (len(found) == 1)}"


def unbroken(page: str) -> str:
    """Return a page whose lines break neither between a number and `%` nor around `±`.

    Example:
        >>> unbroken("31 ± 6 %") == "31\\u00a0±\\u00a06\\u00a0%"
        True
    """
    return re.sub(r"(?<=\d) (?=%|± )|(?<=±) (?=\d)", "\u00a0", page)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@cache  # with its templates, which take as long to compile as a figure to draw
def page_environment() -> Environment:
    """Return the environment of the templates of pages."""
    environment = template_environment()
    environment.filters |= {
        "percent": percent,
        "unsaturated": unsaturated,
        "decimal": lambda number, digits: minus(decimal(number, digits)),
        "short": short,
        "number": "{:,}".format,
        "images": count_images,
        "error": accuracy_error,
        "exit": exit_colour_name,
        "average": describe_average,
        "basename": lambda path: printable(Path(path).name),
        "setting": _setting,
        "read_features": _read_features,
        "measure": lambda name, value: minus(measure_number(name, value)),
        "measure_title": measure_title,
    }
    css = files("netfission.report").joinpath("templates/page.css").read_text(encoding="utf-8")
    environment.globals["style"] = Markup("\n".join((css_variables(), RENDERING, css)))
    return environment


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)
