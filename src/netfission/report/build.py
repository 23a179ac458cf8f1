"""The page put together: figures drawn and kept as files, tables, and what a run lacks."""

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment
from markupsafe import Markup
from tqdm import tqdm

from netfission.classifier import Classifier
from netfission.config import MethodConfig, RunConfig
from netfission.evaluation.corruption import MIN_SIDE
from netfission.methods.registry import METHODS
from netfission.network import FissionNetwork
from netfission.report.diagram import short
from netfission.report.figures import standard_error
from netfission.report.plots import Wanted, plots_beside, plots_of
from netfission.report.run_data import Run, load_runs
from netfission.report.style import RENDERING, exit_name, inline, jinja, variables
from netfission.report.votes import Votes, collect_votes
from netfission.runs.folder import RunFolder
from netfission.runs.setup import load_run_data
from netfission.utils.files import write_together


@dataclass(frozen=True)
class Plot:
    """A figure of the page.

    Attributes:
        title: what it shows.
        meaning: how to read it, in a sentence or two.
        svg: the figure, as a part of the page.
        file: where it lies as a file of its own, seen from the page.
    """

    title: str
    meaning: str
    svg: Markup
    file: str


@dataclass(frozen=True)
class Lack:
    """Why something is left out.

    Attributes:
        reason: a sentence.
        command: makes it; empty where none does.
    """

    reason: str
    command: str = ""


@dataclass(frozen=True)
class Section:
    """What the page tells of one run.

    Attributes:
        run: the run.
        plots: name → figure, of those that there is something to draw of.
        lacks: what is left out.
        votes: of its exits; None where the images cannot be read.
        chosen: settings that are not the default, and versions.
        left: settings that are, of those that its method reads.
    """

    run: Run
    plots: dict[str, Plot]
    lacks: dict[str, Lack]
    votes: Votes | None
    chosen: dict[str, Any]
    left: dict[str, Any]


def write_report(paths: Sequence[Path], out: Path | None = None, data: str | None = None) -> Path:
    """Write the report of one run, or of several side by side.

    The page is one file that needs nothing beside it. Its figures are kept as SVG files, too, in a folder
    beside it that is called as the page is.

    Args:
        paths: folders of finished runs on the same data.
        out: the page, ending in `.html`; default `report.html` in the run's folder, or of several runs in
            the working directory.
        data: where the runs' data set is now; default where it was.

    Returns:
        The page.

    Raises:
        ValueError: no run, or see `load_runs`; `out` is not such a file; or `data` is not the runs' own.
        OSError: a file cannot be written, or there is nothing where `data` says.
    """
    if not paths:
        raise ValueError("run: takes the folder of a run, or of several")
    page = out or RunFolder(paths[0] if len(paths) == 1 else Path()).report
    if out is not None:
        _check_out(out)
    runs = load_runs(paths)
    kept = _Figures(page)
    compared = [kept.keep(wanted) for wanted in plots_beside(runs)] if len(runs) > 1 else []
    sections = [_section(run, kept, data) for run in tqdm(runs, unit="run", disable=None, leave=False)]
    template = _environment().get_template("page.html.j2")
    text = template.render(
        title=runs[0].title if len(runs) == 1 else f"{len(runs)} runs on {runs[0].data}",
        runs=runs,
        compared=compared,
        differing=_differing(runs),
        sections=sections,
        figures=quote(kept.folder.name),
        version=version("netfission"),
    )
    for file in kept.files:
        file.parent.mkdir(parents=True, exist_ok=True)
    write_together(kept.files | {page: text})
    return page


def _check_out(out: Path) -> None:
    folder = out.parent
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    if out.suffix != ".html" or out.is_dir() or not writable:
        raise ValueError(f"out={out}: takes a file ending in .html, in a folder that can be written to")


class _Figures:
    """Figures beside the page.

    Attributes:
        folder: where they are to be.
        files: their contents by path.
    """

    def __init__(self, page: Path) -> None:
        self.folder = page.with_suffix("")
        self.files: dict[Path, str | bytes] = {}

    def keep(self, wanted: Wanted, run: Run | None = None) -> Plot:
        """Draw one; of a run among several in a folder of its own. Gives it for the page."""
        name = f"{wanted.name}.svg"
        place = Path(run.key, name) if run is not None and run.letter else Path(name)
        svg = wanted.draw()
        self.files[self.folder / place] = svg
        key = f"{run.key if run else 'runs'}-{wanted.name}"
        part = Markup(inline(svg, key, f"{wanted.title}. {wanted.meaning}"))
        return Plot(wanted.title, wanted.meaning, part, quote(f"{self.folder.name}/{place.as_posix()}"))


def _section(run: Run, kept: _Figures, data: str | None) -> Section:
    path = shlex.quote(str(run.folder.path))
    votes = _votes(run, data)
    lacks = dict(_lacks(run, path))
    if isinstance(votes, Lack):
        lacks["votes"] = votes
    plots = {wanted.name: kept.keep(wanted, run) for wanted in plots_of(run)}
    return Section(run, plots, lacks, None if isinstance(votes, Lack) else votes, *_settings(run))


def _votes(run: Run, data: str | None) -> Votes | Lack:
    """How the exits of a run vote; or why that cannot be told."""
    if run.exits == 1:
        return Lack("With one exit there is nothing to disagree.")
    config = run.config
    if data is not None:
        config = RunConfig.from_dict(config.to_dict() | {"data": data})
    try:
        images = load_run_data(config.data, config.fission.seed)
        if images.classes != run.spec.classes:
            raise ValueError(f"data={data or run.data}: its classes are not those of {run.folder.path}")
    except (ValueError, OSError) as error:
        if data is not None:
            raise
        return Lack(
            f"The data set {run.data} cannot be read here, so its images are left out ({_one_line(error)}). "
            "Name the place where it is now:",
            f"netfission report {shlex.quote(str(run.folder.path))} --data PLACE",
        )
    return collect_votes(Classifier(run.network, run.spec, run.calibration), images)


def _lacks(run: Run, path: str) -> Iterator[tuple[str, Lack]]:
    """What a run's folder lacks, by name."""
    evaluate = f"netfission evaluate {path}"
    if run.evaluation is None:
        yield "evaluation", Lack("No figures on the test split yet.", evaluate)
    if run.reliability is None:
        yield "trust", Lack("No calibration on the test split yet.", evaluate)
    elif run.reliability.scaled is None:
        yield "scaled", Lack("Trained without validation images, so there is no temperature to scale by.")
    if not run.epochs:
        yield "epochs", Lack("No learning curves: metrics.csv, which training writes, is missing.")
    if run.cascade is None and isinstance(run.network, FissionNetwork) and run.exits > 1:
        if run.config.data.validation:
            yield (
                "cascade",
                Lack("How much stopping early saves has not been measured yet.", f"{evaluate} --cascade"),
            )
        else:
            yield "cascade", Lack("Stopping early takes thresholds from validation images; the run has none.")
    if run.out_of_distribution is None:
        yield (
            "outside",
            Lack(
                "Its uncertainty on out-of-distribution images has not been measured yet.",
                f"{evaluate} --ood DATA",
            ),
        )
    if run.corruptions is None and min(run.spec.shape[1:]) >= MIN_SIDE:
        yield "corruptions", Lack("Corrupted images have not been tried yet.", f"{evaluate} --corruptions")
    if not isinstance(run.network, FissionNetwork):
        method = run.config.method.method
        yield (
            "network",
            Lack(f"Only networks of method=fission are drawn as their paths; this one is {method}."),
        )


def _settings(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was chosen, and what was left at its default."""
    default = RunConfig().to_dict()
    read = METHODS[run.config.method.method].settings
    others = {field.name for field in fields(MethodConfig)} - {"method", *read}
    own = {name: value for name, value in run.config.to_dict().items() if name not in others}
    always = {"data": run.data, "model": run.spec.model, "exits": run.exits, "seed": run.config.fission.seed}
    chosen = always | {
        name: value for name, value in own.items() if value != default[name] and name not in always
    }
    return chosen, {name: value for name, value in own.items() if name not in chosen}


def _differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs."""
    all_of_them = [run.config.to_dict() | {"data": run.data} for run in runs]
    values = {name: [each[name] for each in all_of_them] for name in all_of_them[0]}
    return {name: own for name, own in values.items() if any(value != own[0] for value in own)}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _environment() -> Environment:
    environment = jinja()
    environment.filters |= {
        "percent": lambda share, digits=2: f"{100 * share:.{digits}f}",
        "short": short,
        "number": "{:,}".format,
        "error": standard_error,
        "exit": exit_name,
        "basename": lambda path: Path(path).name,
        "setting": _setting,
    }
    css = files("netfission.report").joinpath("templates/page.css").read_text(encoding="utf-8")
    environment.globals["style"] = Markup("\n".join((variables(), RENDERING, css)))
    return environment


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)
