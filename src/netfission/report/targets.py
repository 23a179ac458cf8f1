"""The page about a run of another task than classification: labels, numbers, or a class for each pixel."""

import io
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from netfission.classifier import Predictor
from netfission.data import Split, TensorSplit
from netfission.evaluation.out_of_distribution import OutOfDistribution
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
)
from netfission.report.plots import (
    Quality,
    cascade_plots,
    cost_plots,
    data_plots,
    network_plots,
    training_plots,
)
from netfission.report.run_data import NetworkRun, load_runs
from netfission.runs.folder import RunFolder
from netfission.tasks import Task
from netfission.tasks.evaluation import TargetEvaluation, measure_factor, measure_title
from netfission.tasks.figures import Example, Inspection, Panel, Table
from netfission.tasks.window_evaluation import WindowEvaluation
from netfission.utils.png import png_address

_MAX_IMAGES = 1000  # that the network runs on
_BATCHES = 64  # at most, as maps are large
_BATCH = 100
_MAX_SIDE = 320  # of a picture on the page, in pixels
_SMALL = 64  # a picture of fewer pixels is not smoothed


@dataclass(frozen=True)
class TargetRun(NetworkRun):
    """A finished run of another task than classification.

    Attributes:
        evaluation: on the test split; None if it has not been measured.
        calibration: on the validation split; None without one.
        out_of_distribution: how well uncertainty detects out-of-distribution images, per data set; None if it
            has not been measured, as `windows`.
        windows: measures of maps on photographs in their own sizes.
        task: what the network learned.
    """

    evaluation: TargetEvaluation | None
    calibration: Any
    out_of_distribution: list[OutOfDistribution] | None
    windows: WindowEvaluation | None
    task: Task

    @classmethod
    def load(cls, folder: RunFolder, *, key: str, letter: str, name: str) -> Self:
        """Read a run's folder, see `NetworkRun.load`."""
        parts = cls.parts(folder)
        spec = parts["spec"]
        return cls(
            folder=folder,
            key=key,
            letter=letter,
            name=name,
            evaluation=folder.load_target_evaluation(spec),
            calibration=folder.load_calibration_of(spec),
            out_of_distribution=folder.load_out_of_distribution(),
            windows=folder.load_window_evaluation(),
            task=spec.find_task(),
            **parts,
        )


@dataclass(frozen=True)
class ShownPanel:
    """A picture on the page.

    Attributes:
        title: in a word or two.
        address: PNG in a `data:` address.
        sharp: whether its pixels are shown as squares.
    """

    title: str
    address: str
    sharp: bool


@dataclass(frozen=True)
class ShownExample:
    """A test image on the page, see `netfission.tasks.figures.Example`."""

    title: str
    lines: Sequence[str]
    panels: Sequence[ShownPanel]


@dataclass(frozen=True)
class TargetSection:
    """What the page shows of a run.

    Attributes:
        run: the run.
        names: of the measures of its exits and ensemble.
        target_names: of those of its targets.
        plots: figures by name.
        figures: names of those of the measures.
        inspected: names of those of the test images.
        missing: parts that are left out, by name.
        tables: of the test images.
        examples: test images.
        rule: by which they are chosen, or why there are none.
        legend: title → color.
        wide: whether examples have several pictures.
        changed_settings: settings that differ from their defaults, and the most important ones.
        default_settings: all other settings that the run's method uses.
    """

    run: TargetRun
    names: list[str]
    target_names: list[str]
    plots: dict[str, Plot]
    figures: list[str]
    inspected: list[str]
    missing: dict[str, MissingPart]
    tables: Sequence[Table]
    examples: Sequence[ShownExample]
    rule: str
    legend: dict[str, str]
    wide: bool
    changed_settings: dict[str, Any]
    default_settings: dict[str, Any]


def target_page(paths: Sequence[Path], figures: FigureFiles, data: str | None) -> str:
    """Return the page about runs of another task than classification.

    Args:
        paths: the runs' folders.
        figures: to which the figures are added.
        data: where the data set is now; None if it has not moved.

    Raises:
        ValueError: a run cannot be read, runs are on other data, or `data` is not valid.
        OSError: there is no data set at `data`.
    """
    runs = load_runs(paths, TargetRun)
    task = runs[0].task
    quality = _quality(task)
    sections = [
        _make_section(run, quality, figures, data)
        for run in tqdm(runs, unit="run", disable=None if len(runs) > 1 else True, leave=False)
    ]
    measured = [run.evaluation for run in runs if run.evaluation is not None]
    return (
        page_environment()
        .get_template("targets.html.j2")
        .render(
            title=runs[0].title if len(runs) == 1 else f"{len(runs)} runs on {runs[0].data}",
            runs=runs,
            **side_by_side(runs, figures, quality),
            sections=sections,
            noun=task.targets.noun,
            headline=task.headline,
            names=_names([one.ensemble for one in measured]),
            calibrated_names=_names([one.calibrated or {} for one in measured]),
            figures=quote(figures.folder.name),
            version=version("netfission"),
        )
    )


def _quality(task: Task) -> Quality:
    """Return what figures show of how good networks of a task are."""
    headline = task.headline
    return Quality(
        headline,
        measure_title(headline),
        measure_factor(headline),
        task.progress_title,
        task.progress_factor,
        lower_is_better=not task.columns[headline].higher_is_better,
    )


def _names(rows: Iterable[dict[str, float]]) -> list[str]:
    """Return the measures of rows of a table, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _make_section(run: TargetRun, quality: Quality, figures: FigureFiles, data: str | None) -> TargetSection:
    inspection = _inspect(run, data)
    missing = dict(_missing_parts(run))
    if isinstance(inspection, MissingPart):
        missing["images"] = inspection
        inspection = Inspection()
    task, measured = run.task, run.evaluation
    described = [] if measured is None else task.figures(measured)
    specs = [
        *cost_plots([run], quality),
        *cascade_plots(run),
        *data_plots([*described, *inspection.figures]),
        *training_plots(run, quality),
        *network_plots(run),
    ]
    of_exits = [] if measured is None else [measured.ensemble, *measured.exits, measured.calibrated or {}]
    return TargetSection(
        run,
        _names(of_exits),
        [] if measured is None else _names(measured.by_target.values()),
        {spec.name: figures.add(spec, run) for spec in specs},
        [figure.name for figure in described],
        [figure.name for figure in inspection.figures],
        missing,
        inspection.tables,
        [_shown(example) for example in inspection.examples],
        inspection.rule if inspection.examples else inspection.without,
        dict(inspection.legend),
        any(len(example.panels) > 1 for example in inspection.examples),
        *split_settings(run),
    )


def _missing_parts(run: TargetRun) -> Iterator[tuple[str, MissingPart]]:
    """Yield the parts that are left out because a run's folder lacks them, with their names."""
    evaluate = f"netfission evaluate {shlex.quote(str(run.folder.path))}"
    if run.evaluation is None:
        yield "evaluation", MissingPart("The run has not been evaluated on the test split.", evaluate)
    if shift := missing_shift(run.out_of_distribution, evaluate):
        yield "out-of-distribution", shift
    if cascade := missing_cascade(run):
        yield "cascade", cascade
    if run.calibration is None:
        reason = "There is no calibration: the run was trained without validation images."
        yield "calibration", MissingPart(reason)
    if not run.epochs:
        reason = "There are no learning curves: metrics.csv, which training writes, is missing."
        yield "epochs", MissingPart(reason)
    if not isinstance(run.network, FissionNetwork):
        method = run.config.method.method
        yield "network", MissingPart(f"Networks of method={method} are not drawn.")


def _inspect(run: TargetRun, data: str | None) -> Inspection | MissingPart:
    """Return what test images show of the network, or why they cannot be read."""
    images = load_images(run, data)
    if isinstance(images, MissingPart):
        return images
    predictor = Predictor(run.network, run.spec, run.calibration)
    shown = SplitImages(predictor, images.test)
    return run.task.inspect(shown, average=run.spec.average, calibration=run.calibration)


class SplitImages:
    """Test images, evenly spaced over the split, and the network; see `netfission.tasks.figures`."""

    def __init__(self, predictor: Predictor, split: Split) -> None:
        self._predictor = predictor
        self._split = split
        self._batch = predictor.task.batch_size(predictor.spec.shape, _BATCH)
        count = min(len(split), _MAX_IMAGES, _BATCHES * self._batch)
        self._rows = torch.arange(count) * len(split) // count

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield outputs and targets of all images."""
        for rows in tqdm(self._rows.split(self._batch), desc="images", disable=None, leave=False):
            pixels, targets = self._read(rows)
            yield self._predictor.logits(pixels), targets

    def row(self, number: int) -> int:
        """Return the row of an image in the split."""
        return int(self._rows[number])

    def one(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return pixels, outputs and targets of an image."""
        pixels, targets = self._read(self._rows[[number]])
        return pixels, self._predictor.logits(pixels), targets

    def _read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self._split, TensorSplit):
            labels = self._split.labels[rows]
            return self._split.images[rows], labels.long() if labels.dtype == torch.uint8 else labels
        pairs = [self._split[int(row)] for row in rows]
        return torch.stack([pixels for pixels, _ in pairs]), torch.stack(
            [torch.as_tensor(target) for _, target in pairs]
        )


def _shown(example: Example) -> ShownExample:
    return ShownExample(example.title, example.lines, [_shown_panel(panel) for panel in example.panels])


def _shown_panel(panel: Panel) -> ShownPanel:
    """Return a picture as the `data:` address of a small PNG."""
    image = panel.image
    sharp = not panel.smooth or max(image.size) < _SMALL
    factor = _MAX_SIDE / max(image.size)
    if factor < 1:
        size = (max(1, round(factor * image.width)), max(1, round(factor * image.height)))
        image = image.resize(size, Image.Resampling.LANCZOS if panel.smooth else Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return ShownPanel(panel.title, png_address(file.getvalue()), sharp)
