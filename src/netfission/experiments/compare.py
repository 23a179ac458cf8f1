"""From a grid to its comparison: do the missing runs, measure the costs, put the results side by side."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from netfission.config import RunConfig, TrainingConfig
from netfission.experiments.contenders import readable
from netfission.experiments.costs import LARGEST_BATCH, ROUNDS, Costs, TimedContender, measure_costs
from netfission.experiments.grid import STARTS, Cell, Grid
from netfission.experiments.records import Record, Records, run_folder
from netfission.experiments.results import Comparison, ensemble_metrics
from netfission.experiments.runner import run_missing
from netfission.methods.registry import find_method
from netfission.runs.folder import environment
from netfission.tasks import Task, task_kind
from netfission.tasks.base import EvaluationResult
from netfission.utils.errors import invalid
from netfission.utils.files import write_json
from netfission.utils.json_files import read_json
from netfission.utils.outputs import check_comparison_folder
from netfission.utils.quick import without_collection
from netfission.utils.seeds import seeded
from netfission.utils.text import count_noun, printable

COSTS_FILE = "costs.json"


def compare(
    grid: Grid,
    out: Path,
    *,
    workers: int = 1,
    ray: str | None = None,
    rounds: int | None = None,
    minutes: float | None = None,
) -> Comparison:
    """Do a grid's missing runs, and compare its contenders.

    Args:
        grid: contenders, seeds and settings.
        out: folder of records, run folders, costs, tables and pictures. A grid that was stopped goes on
            there. If all records and costs are there, the run folders are not needed. Tables and pictures are
            written anew if something has changed or one of them is missing; remove one to draw all again.
        workers: number of processes that share the runs.
        ray: address of a Ray cluster that does the runs instead.
        rounds: number of times that each contender is timed; default as often as before, else 15.
        minutes: stop after a whole epoch if the next one would probably end later than this from now.

    Raises:
        ValueError: a setting is not valid, the folder has files of something else, or a file is damaged.
        RuntimeError: no run of any contender succeeded.
        OSError: the disk is full, or the folder cannot be written.
        OutOfTimeError: the minutes are over, and runs are missing; nothing is compared yet.

    Example:
        >>> import tempfile
        >>> settings = {"data": "digits", "limit_per_class": 1, "model": "wrn-10-1", "epochs": 1,
        ...             "validation": 0.0, "accelerator": "cpu"}
        >>> grid = Grid({"single": {"exits": 1}}, range(1), settings, reference="single")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     comparison = compare(grid, Path(folder), rounds=1)
        >>> comparison.metrics["single"]["top1"].n
        1
    """
    check_comparison_folder("out", out)
    cells = grid.cells()
    records = run_missing(cells, out, workers=workers, ray=ray, minutes=minutes)
    costs = _costs(cells, records, out, rounds)
    with without_collection():
        comparison = summarise(grid, cells, records, costs)
        comparison.write(out)
    return comparison


@dataclass(frozen=True)
class CostsFile:
    """The content of `costs.json`.

    Attributes:
        networks: contender → key of the run whose network was measured.
        costs: what was measured. Contenders may have been measured at different times, each beside the single
            network, with as many rounds and in the same environment.
    """

    networks: dict[str, str]
    costs: Costs

    def of_runs(self, runs: Mapping[str, Sequence[Cell]]) -> "CostsFile":
        """Return what was measured of these contenders, each on one of its runs."""
        keys = {name: [cell.key for cell in cells] for name, cells in runs.items()}
        names = [name for name in keys if self.networks.get(name) in keys[name]]
        contenders = {name: self.costs.contenders[name] for name in names}
        networks = {name: self.networks[name] for name in names}
        return CostsFile(networks, replace(self.costs, contenders=contenders))


def _costs(cells: Sequence[Cell], records: Sequence[Record], out: Path, rounds: int | None) -> Costs:
    """The costs of every contender with a run that succeeded; only those that are not kept are measured."""
    succeeded: dict[str, list[Cell]] = {}
    for cell, record in zip(cells, records, strict=True):
        if record.error is None:
            succeeded.setdefault(cell.contender, []).append(cell)
    if not succeeded:
        first, *others = records
        what = f"all {len(records)} runs failed, such as" if others else "the run failed:"
        raise RuntimeError(f"{what} {first.contender}, seed {first.seed} ({first.error})")
    file = out / COSTS_FILE
    kept = read_json(file, CostsFile, hint="remove the file to measure the costs again")
    earlier = None if kept is None or rounds not in (None, kept.costs.rounds) else kept.of_runs(succeeded)
    if earlier is not None and earlier.networks.keys() == succeeded.keys():
        return earlier.costs
    if earlier is not None and earlier.costs.environment != environment():
        earlier = None  # times of two environments do not belong in one table
    done = {} if earlier is None else earlier.networks
    new = {name: _with_weights(cells, out) for name, cells in succeeded.items() if name not in done}
    number = rounds or (ROUNDS if kept is None else kept.costs.rounds)
    times = f"{count_noun(len(new), 'network')} side by side, {count_noun(number, 'round')}"
    with suppress(OSError):  # standard error is full
        print(f"measuring the costs of {times}", file=sys.stderr, flush=True)
    costs = _measure(new, out, number)
    if earlier is not None:
        costs = replace(costs, contenders={**earlier.costs.contenders, **costs.contenders})
    content = CostsFile({**done, **{name: cell.key for name, cell in new.items()}}, costs)
    write_json(file, json.dumps(asdict(content), indent=1) + "\n")
    return costs


def _with_weights(cells: Sequence[Cell], out: Path) -> Cell:
    """Return the first run whose network still exists; ValueError if no network does."""
    for cell in cells:
        if run_folder(cell, out).weights.is_file():
            return cell
    raise invalid(
        "out",
        f"a folder with a network of {cells[0].contender}, whose costs are to be measured",
        found=f"{out} without one",
        hint=f"remove {Records(out / 'records').file(cells[0])} to train one again, or leave out rounds if "
        f"{COSTS_FILE} is there",
    )


def _measure(cells: Mapping[str, Cell], out: Path, rounds: int) -> Costs:
    contenders = {}
    for name, cell in cells.items():
        network, spec = run_folder(cell, out).load_network(any_task=True)
        parent = spec.single().eval() if cell.config.training.parent_weight else None
        contenders[name] = TimedContender(network, cell.config, parent)
    with seeded(0):
        single, task = spec.single(), spec.find_task()
        images = timed_images(task, spec.shape)
        return measure_costs(contenders, single, images, task, rounds=rounds)


def timed_images(task: Task, shape: Sequence[int]) -> torch.Tensor:
    """Return images that networks are timed on: as many as a task evaluates at once, `LARGEST_BATCH` at most.

    Args:
        task: what the networks learned.
        shape: of an image: channels, height and width.

    Example:
        >>> from netfission.tasks import find_task
        >>> timed_images(find_task("segmentation", ["road", "sky"]), (3, 180, 240)).shape
        torch.Size([6, 3, 180, 240])
    """
    count = task.batch_size(shape, LARGEST_BATCH)
    return torch.randn(max(count, 2), *shape)  # batch norms may need two to train on


def summarise(grid: Grid, cells: Sequence[Cell], records: Sequence[Record], costs: Costs) -> Comparison:
    """Put the results of all contenders over the seeds together.

    Args:
        grid: contenders, seeds and settings.
        cells: the grid's runs.
        records: one per run.
        costs: of the contenders with a run that succeeded.
    """
    task = task_kind(cells[0].config.data.task)
    evaluations: dict[str, dict[int, EvaluationResult]] = {}
    failed: dict[str, dict[int, str]] = {}
    for cell, record in zip(cells, records, strict=True):
        if record.error is None:
            evaluations.setdefault(cell.contender, {})[cell.seed] = record.read_evaluation()
        else:
            failed.setdefault(cell.contender, {})[cell.seed] = record.error
    return Comparison(
        title=_title(grid),
        reference=grid.reference,
        metrics={name: ensemble_metrics(task, by_seed) for name, by_seed in evaluations.items()},
        averages={name: _average(task, by_seed.values()) for name, by_seed in evaluations.items()},
        costs=replace(costs, contenders={name: costs.contenders[name] for name in evaluations}),
        remarks={name: remarks for name in evaluations if (remarks := _remarks(grid, name))},
        failed=failed,
        settings={name: dict(settings) for name, settings in grid.contenders.items()},
        epochs={name: _epochs(grid, name) for name in grid.contenders},
        starts=dict(grid.starts),
        x_axis=grid.x_axis,
        conditions=_conditions(grid),
        notes=_notes(grid),
        task=task.name,
    )


_ALWAYS_SHOWN = ("image_size", "epochs", "batch_size", "optimizer", "learning_rate", "schedule", "sparsity")
_IN_TITLE = ("data", "model", "limit_per_class")


def _conditions(grid: Grid) -> str:
    """The settings that all contenders have unless they have their own, in one line."""
    config = {**RunConfig().to_dict(), **grid.common}
    training = TrainingConfig(optimizer=config["optimizer"], learning_rate=config["learning_rate"])
    shown = config | {
        "learning_rate": training.peak_rate,
        "image_size": config["image_size"] or "the images’ own",
    }
    if shown["weights"] is not None:
        shown["weights"] = Path(shown["weights"]).name
    names = dict.fromkeys((*_ALWAYS_SHOWN, *grid.chosen))
    settings = (f"{readable(name)} {readable(shown[name])}" for name in names if name not in _IN_TITLE)
    return f"common settings: {', '.join(settings)}"


def _notes(grid: Grid) -> list[str]:
    """Which contenders a common setting does not apply to, one line per setting."""
    notes = []
    for name in grid.chosen:
        affected, value = grid.affected(name), grid.common[name]
        if name in STARTS:  # a contender that starts from another says so
            affected = [*affected, *grid.starts]
        spared = [
            other for other, own in grid.contenders.items() if other not in affected and name not in own
        ]
        different = [
            f"{other} with {readable(own[name])}"
            for other, own in grid.contenders.items()
            if own.get(name) not in (None, value)
        ]
        if spared:
            listed = "; ".join([*spared, *different])
            notes.append(f"{readable(name)} {readable(value)} applies to all but: {listed}")
    return notes


def _average(task: type[Task], evaluations: Iterable[EvaluationResult]) -> str:
    """The rule by which a contender's predictions are averaged; a dash if it has one prediction."""
    (average,) = {
        task.averaged(evaluation.average) if len(evaluation.exits) > 1 else "–" for evaluation in evaluations
    }
    return average


def _epochs(grid: Grid, contender: str) -> float:
    """The epochs of a contender's training over those of the settings that all contenders have."""
    config = grid.config(contender, grid.seeds[0])
    epochs = find_method(config.method).epochs(config.training.epochs, config.fission.exits)
    common: int = grid.common.get("epochs", TrainingConfig.epochs)
    return epochs / common


def _remarks(grid: Grid, contender: str) -> list[str]:
    """A contender's settings that its name does not show, and how its training departs from other recipes."""
    config = grid.config(contender, grid.seeds[0])
    method = find_method(config.method)
    settings = [
        f"{readable(name)} {readable(value)}"
        for name, value in grid.contenders[contender].items()
        if value is not None and name not in ("method", "exits") and readable(value) not in contender
    ]
    distils = config.training.distillation_weight is not None or method.distillation
    learns_from_labels_alone = config.fission.exits > 1 and not distils
    return [
        *([f"starts from {grid.starts[contender]}"] if contender in grid.starts else []),
        *(setting for setting in settings if setting not in contender),
        *(["trained without distillation, as the method is defined"] if learns_from_labels_alone else []),
        *method.deviations,
        *(f"differs from its authors: {difference}" for difference in method.differences),
    ]


def _title(grid: Grid) -> str:
    config = grid.config(next(iter(grid.contenders)), grid.seeds[0])
    data, training = config.data, config.training
    limit = f", {data.limit_per_class} training images per class" if data.limit_per_class else ""
    name = printable(Path(data.data).name)
    conditions = (
        f"{config.model.model} on {name}{limit}, {count_noun(training.epochs, 'epoch')}, "
        f"{count_noun(len(grid.seeds), 'seed')}; test split"
    )
    return f"{grid.title}\n{conditions}" if grid.title else conditions
