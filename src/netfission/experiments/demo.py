"""`netfission demo`: one network and its three-exit fission on real digits, side by side."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tqdm import tqdm

from netfission.config import DataConfig, FissionConfig, ModelConfig, RunConfig, TrainingConfig
from netfission.data import ImageData
from netfission.evaluation import Evaluation
from netfission.grouping import GROUPINGS
from netfission.inference.deploy import deploy
from netfission.network import FissionNetwork
from netfission.profiling.cost import NetworkCost, Quartiles, cost
from netfission.runs.folder import RunFolder, environment
from netfission.runs.setup import load_run_data
from netfission.runs.train import train
from netfission.utils.errors import check_choice
from netfission.utils.files import write_whole
from netfission.utils.plot_style import (
    FAINT,
    PRIMARY,
    PRIMARY_LIGHT,
    PRIMARY_PALE,
    REFERENCE,
    TITLE_SIZE,
    mark_reference,
    new_figure,
    save_picture,
)
from netfission.utils.text import align_columns

# Ten images a class: with all of them every network is right on 98 % and nothing can be told apart.
DATA = DataConfig("digits", limit_per_class=10, validation=0.0)
MODEL = ModelConfig("wrn-16-2")
TRAINING = TrainingConfig(epochs=40, batch_size=20, schedule="one_cycle", accelerator="cpu")
SINGLE, ENSEMBLE = "single network", "three exits"
IMAGES_TIMED = 64
ROUNDS = 30


@dataclass(frozen=True)
class Row:
    """One line of the table: a network's, or one exit's, figures over the seeds."""

    name: str
    figures: dict[str, list[float]]
    cost: NetworkCost | None = None
    deployed: Quartiles | None = None  # time of inference over the single network's, both deployed


def run_demo(path: Path, seeds: int, grouping: str = "channels") -> None:
    """Train, evaluate and compare; print a table and draw it. What is there already is not run again.

    Args:
        path: folder for the runs, `demo.json`, `demo.txt` and `demo.png`.
        seeds: how many times each network is trained, from seeds 0, 1, ….
        grouping: how the ensemble's stages are dealt out, see `netfission.algorithm.fission`.

    Raises:
        ValueError: `seeds` is below 1, the grouping is unknown, or the folder holds something else.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: takes a whole number from 1")
    check_choice("grouping", grouping, GROUPINGS)
    settings = {SINGLE: FissionConfig(exits=1), ENSEMBLE: FissionConfig(exits=3, grouping=grouping)}
    folders = {
        (name, seed): RunFolder(path / f"{_folder(name, grouping)}-seed{seed}")
        for seed in range(seeds)
        for name in settings
    }
    evaluations: dict[str, list[Evaluation]] = {name: [] for name in settings}
    with tqdm(folders.items(), unit="run") as bar:
        for (name, seed), folder in bar:
            bar.set_description(f"{name}, seed {seed}")
            config = RunConfig(DATA, MODEL, replace(settings[name], seed=seed), TRAINING)
            evaluation = train(config, folder.path, resume=folder.config.is_file(), progress=False)
            assert evaluation is not None
            evaluations[name].append(evaluation)
    data = load_run_data(DATA, seed=0)
    networks = {name: folders[name, 0].load_fission()[0] for name in settings}
    rows = _rows(evaluations, networks, data)
    text = _table(rows, data, seeds, grouping)
    write_whole(path / "demo.txt", text + "\n")
    write_whole(path / "demo.json", json.dumps(_record(rows, seeds, grouping), indent=2) + "\n")
    _draw(rows, seeds, grouping, path / "demo.png")
    print(f"\n{text}\n\nwrote {path / 'demo.png'}, {path / 'demo.json'} and a folder for each run in {path}")


def _folder(name: str, grouping: str) -> str:
    return name.replace(" ", "-") + (f"-{grouping}" if name == ENSEMBLE else "")


def _time(cost: NetworkCost) -> Quartiles:
    """Of inference, over the single network's."""
    ratio = cost.inference[0].ratio
    assert ratio is not None
    return ratio


def _rows(
    evaluations: dict[str, list[Evaluation]], networks: dict[str, FissionNetwork], data: ImageData
) -> list[Row]:
    """The single network, the ensemble and its exits; the first two with what they cost, side by side."""
    images = torch.randn(IMAGES_TIMED, *data.shape, generator=torch.Generator().manual_seed(0))
    as_they_are = cost(
        networks[ENSEMBLE], images, networks[SINGLE], batch_sizes=[IMAGES_TIMED], rounds=ROUNDS
    )
    deployed = cost(
        deploy(networks[ENSEMBLE], images),
        images,
        deploy(networks[SINGLE], images),
        batch_sizes=[IMAGES_TIMED],
        rounds=ROUNDS,
    )
    assert as_they_are.reference is not None
    figures = {name: _figures([e.ensemble for e in of_seeds]) for name, of_seeds in evaluations.items()}
    exits = [
        Row(f"  its exit {number}", _figures([e.exits[number] for e in evaluations[ENSEMBLE]]))
        for number in range(networks[ENSEMBLE].exits)
    ]
    return [
        Row(SINGLE, figures[SINGLE], as_they_are.reference),
        Row(ENSEMBLE, figures[ENSEMBLE], as_they_are.network, _time(deployed.network)),
        *exits,
    ]


def _figures(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [run[name] for run in runs] for name in ("top1", "nll", "ece")}


def _table(rows: list[Row], data: ImageData, seeds: int, grouping: str) -> str:
    columns = ["", "accuracy %", "NLL", "ECE %", "parameters", "non-zero", "MACs", "effective"]
    columns += ["training", "time", "deployed"]
    lines = [columns]
    for row in rows:
        cells = [
            row.name,
            _spread(row, "top1", 100, 2),
            _spread(row, "nll", 1, 3),
            _spread(row, "ece", 100, 2),
        ]
        if row.cost is not None:
            size = row.cost.size
            cells += [f"{size.parameters_stored:,}", f"{size.parameters_nonzero:,}"]
            cells += [f"{size.macs_dense / 1e6:.1f} M", f"{size.macs_effective / 1e6:.1f} M"]
            deployed = row.deployed.median if row.deployed else 1
            cells += [f"{ratio:.2f}×" for ratio in (_step(row.cost).median, _time(row.cost).median, deployed)]
        lines.append(cells)
    fissioned, deployed_time = rows[1].cost, rows[1].deployed
    assert fissioned is not None
    assert deployed_time is not None
    return "\n".join(
        [
            f"{MODEL.model} on scikit-learn's digits, {ENSEMBLE} by {grouping}: {len(data.train)} training "
            f"images, {len(data.test)} test",
            f"images, {TRAINING.epochs} epochs; mean ± standard deviation over n = {seeds} seeds",
            "",
            align_columns(lines),
            "",
            f"{ENSEMBLE} minus single network, seed by seed: {_difference(rows, 'top1', 100, 2)} points of "
            f"accuracy, {_difference(rows, 'nll', 1, 3)} NLL.",
            f"training, time, deployed: a training step on {IMAGES_TIMED} images, inference of as many, and "
            "the same once both are deployed, over the",
            f"single network's: medians of {ROUNDS} rounds side by side (quartiles "
            f"{_range(_step(fissioned))}, {_range(_time(fissioned))} and {_range(deployed_time)}).",
            *_REMARKS.get(grouping, ()),
        ]
    )


_REMARKS = {
    "weights": (
        "With element-wise groups the ensemble costs as many effective MACs as the single network, but more "
        "time: dense",
        "kernels multiply the zeros of removed weights as well.",
    )
}


def _range(quartiles: Quartiles) -> str:
    return f"{quartiles.lower:.2f}–{quartiles.upper:.2f}"


def _step(cost: NetworkCost) -> Quartiles:
    """Of a training step, over the single network's."""
    assert cost.training is not None
    assert cost.training.ratio is not None
    return cost.training.ratio


def _difference(rows: list[Row], name: str, scale: float, digits: int) -> str:
    """The second row's figure minus the first's: mean ± standard deviation over the seeds."""
    pairs = zip(rows[1].figures[name], rows[0].figures[name], strict=True)
    return _mean_and_spread([scale * (ours - single) for ours, single in pairs], f"+.{digits}f", digits)


def _spread(row: Row, name: str, scale: float, digits: int) -> str:
    return _mean_and_spread([scale * value for value in row.figures[name]], f".{digits}f", digits)


def _mean_and_spread(values: list[float], form: str, digits: int) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"


def _record(rows: list[Row], seeds: int, grouping: str) -> dict[str, Any]:
    return {
        "grouping": grouping,
        "data": asdict(DATA),
        "model": asdict(MODEL),
        "training": asdict(TRAINING),
        "seeds": seeds,
        "images_timed": IMAGES_TIMED,
        "rows": [asdict(row) for row in rows],
        "environment": environment(),
    }


def _draw(rows: list[Row], seeds: int, grouping: str, path: Path) -> None:
    """Each method's runs as dots with their mean, and its cost over the single network's."""
    figure, axes_rows = new_figure((11, 4.6), columns=4, width_ratios=[1, 1, 1, 1.25])
    *quality, price = axes_rows[0]
    colours = [REFERENCE, PRIMARY, *[PRIMARY_LIGHT] * (len(rows) - 2)]
    titles = {
        "top1": "accuracy, % (higher is better)",
        "nll": "NLL (lower is better)",
        "ece": "ECE, % (lower is better)",
    }
    runs = range(seeds)
    for axes, (name, title) in zip(quality, titles.items(), strict=True):
        scale = 1 if name == "nll" else 100
        for run in runs:  # the two networks of a seed
            pair = [scale * row.figures[name][run] for row in rows[:2]]
            axes.plot([0, 1], pair, color=FAINT, linewidth=0.8, zorder=0)
        for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
            values = [scale * value for value in row.figures[name]]
            axes.plot([place] * len(values), values, "o", color=colour, alpha=0.45, markersize=5)
            axes.hlines(mean(values), place - 0.3, place + 0.3, color=colour, linewidth=3)
        labels = [row.name.replace("  its ", "").replace(" ", "\n") for row in rows]
        axes.set_xticks(range(len(rows)), labels, fontsize=8)
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.set_title(title, fontsize=TITLE_SIZE)
    single, together = rows[0].cost, rows[1].cost
    assert single is not None
    assert together is not None
    ours, its = together.size, single.size
    assert rows[1].deployed is not None
    ratios = {
        "time,\ndeployed": rows[1].deployed.median,
        "time": _time(together).median,
        "training\nstep": _step(together).median,
        "MACs": ours.macs_dense / its.macs_dense,
        "effective\nMACs": ours.macs_effective / its.macs_effective,
        "parameters": ours.parameters_stored / its.parameters_stored,
        "non-zero\nparameters": ours.parameters_nonzero / its.parameters_nonzero,
    }
    bars = price.barh(list(ratios), list(ratios.values()), color=[PRIMARY] * 3 + [PRIMARY_PALE] * 4)
    price.bar_label(bars, [f"{ratio:.2f}×" for ratio in ratios.values()], padding=3, fontsize=9)
    mark_reference(price, x=1)
    price.invert_yaxis()
    price.set_xlim(0, 1.25 * max(ratios.values()))
    price.set_title("three exits' cost ÷ single's", fontsize=TITLE_SIZE)
    figure.suptitle(
        f"{MODEL.model} on digits, ten training images a class, three exits by {grouping}: each dot is one "
        f"run, bars are means,\nlines join the runs of one seed (n = {seeds}); axes do not start at 0",
        fontsize=TITLE_SIZE,
    )
    save_picture(figure, path, ["png"])
