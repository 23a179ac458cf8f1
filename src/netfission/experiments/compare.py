"""From a grid to its comparison: do the missing runs, measure the costs, put them side by side."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from netfission.evaluation import Evaluation
from netfission.experiments.contenders import readable
from netfission.experiments.costs import BATCH_SIZES, ROUNDS, Contestant, Costs, measure_costs
from netfission.experiments.grid import Cell, Grid
from netfission.experiments.records import Record, Records
from netfission.experiments.results import Comparison, seed_values
from netfission.experiments.runner import run_folder, run_missing
from netfission.methods.registry import find_method
from netfission.utils.files import write_whole
from netfission.utils.text import count_noun
from netfission.utils.typed import typed


def compare(
    grid: Grid, out: Path, *, workers: int = 1, ray: str | None = None, rounds: int | None = None
) -> Comparison:
    """Do a grid's missing runs and compare its contenders; everything is kept in the folder `out`.

    Args:
        grid: contenders, seeds and settings.
        out: holds records, run folders, costs, table and pictures; a grid that was stopped goes on there.
            Where records and costs are whole, the run folders may be missing: table and pictures are drawn
            again.
        workers: processes that share the runs.
        ray: instead, address of a Ray cluster that does them.
        rounds: how often each contender is timed; default as often as it was before, else 15 times.

    Raises:
        ValueError: a setting is not what it takes, a file is damaged, or no run of any contender succeeded.
        OSError: the disk is full, or the folder cannot be written.
    """
    cells = grid.cells()
    records = run_missing(cells, out, workers=workers, ray=ray)
    comparison = summarise(grid, cells, records, _costs(cells, records, out, rounds))
    comparison.write(out)
    return comparison


def _costs(cells: Sequence[Cell], records: Sequence[Record], out: Path, rounds: int | None) -> Costs:
    """Of every contender with a run that succeeded: as measured before, if that was on such runs."""
    done: dict[str, list[Cell]] = {}
    for cell, record in zip(cells, records, strict=True):
        if record.error is None:
            done.setdefault(cell.contender, []).append(cell)
    if not done:
        reasons = "; ".join(dict.fromkeys(str(record.error) for record in records))
        raise ValueError(f"methods: no run of any of them succeeded ({reasons})")
    file = out / "costs.json"
    kept = _kept(file)
    if kept is not None:
        networks, costs = kept
        if _of_runs(networks, done) and rounds in (None, costs.rounds):
            return costs
        rounds = rounds or costs.rounds
    chosen = {name: _with_weights(own, out) for name, own in done.items()}
    costs = _measured(chosen, out, rounds or ROUNDS)
    networks = {name: cell.key for name, cell in chosen.items()}
    write_whole(file, json.dumps({"networks": networks, "costs": asdict(costs)}, indent=1) + "\n")
    return costs


def _kept(file: Path) -> tuple[dict[str, str], Costs] | None:
    """Contender → key of the run that was measured, and what came of it; None where there is no file."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return typed(dict[str, str], content["networks"]), typed(Costs, content["costs"])
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: holds no costs ({reason}); remove it to measure them again") from error


def _of_runs(networks: Mapping[str, str], done: Mapping[str, Sequence[Cell]]) -> bool:
    """Whether each contender, and no other, was measured on a run of its own."""
    return networks.keys() == done.keys() and all(
        networks[name] in [cell.key for cell in own] for name, own in done.items()
    )


def _with_weights(cells: Sequence[Cell], out: Path) -> Cell:
    """The first run whose network is still there.

    Raises:
        ValueError: there is none.
    """
    for cell in cells:
        if run_folder(cell, out).weights.is_file():
            return cell
    raise ValueError(
        f"{cells[0].contender}: its costs are to be measured, and none of its networks is left in {out}; "
        f"remove {Records(out / 'records').file(cells[0])} to train that one again, or leave --rounds out "
        "where costs.json has them"
    )


def _measured(chosen: Mapping[str, Cell], out: Path, rounds: int) -> Costs:
    contestants = {}
    for name, cell in chosen.items():
        network, spec = run_folder(cell, out).load_network()
        contestants[name] = Contestant(network, cell.config)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        single = spec.single()
        images = torch.randn(max(BATCH_SIZES), *spec.shape)
        return measure_costs(contestants, single, images, rounds=rounds)


def summarise(grid: Grid, cells: Sequence[Cell], records: Sequence[Record], costs: Costs) -> Comparison:
    """The figures of all contenders over the seeds."""
    evaluations: dict[str, dict[int, Evaluation]] = {}
    failed: dict[str, dict[int, str]] = {}
    for cell, record in zip(cells, records, strict=True):
        if record.error is None:
            evaluations.setdefault(cell.contender, {})[cell.seed] = record.read_evaluation()
        else:
            failed.setdefault(cell.contender, {})[cell.seed] = record.error
    remarks = {name: own for name in evaluations if (own := _remarks(grid, name))}
    return Comparison(
        _title(grid),
        grid.reference,
        seed_values(evaluations),
        costs,
        remarks,
        failed,
        {name: dict(own) for name, own in grid.contenders.items()},
        grid.along,
    )


def _remarks(grid: Grid, contender: str) -> list[str]:
    """What is a contender's own: settings that its name does not tell, and where its method departs."""
    config = grid.config(contender, grid.seeds[0])
    method, own = find_method(config.method), grid.contenders[contender]
    said = [
        f"{readable(name)} {readable(value)}"
        for name, value in own.items()
        if value is not None and name not in ("method", "exits") and readable(value) not in contender
    ]
    several, weight = config.fission.exits > 1, config.training.distillation_weight
    alone = several and weight is None and not method.distillation
    return [
        *(words for words in said if words not in contender),
        *(["learns from the labels alone, as it is defined"] if alone else []),
        *method.deviations,
    ]


def _title(grid: Grid) -> str:
    config = grid.config(next(iter(grid.contenders)), grid.seeds[0])
    data, training = config.data, config.training
    share = f", {data.limit_per_class} training images a class" if data.limit_per_class else ""
    conditions = (
        f"{config.model.model} on {Path(data.data).name}{share}, {count_noun(training.epochs, 'epoch')}, "
        f"{count_noun(len(grid.seeds), 'seed')}; test split"
    )
    return f"{grid.title}\n{conditions}" if grid.title else conditions
