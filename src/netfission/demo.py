"""`netfission demo`: one network and its three-exit fission on real digits, side by side."""

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from netfission.cost import Cost, cost
from netfission.data import ImageData
from netfission.evaluation import Evaluation
from netfission.files import write_whole
from netfission.fission import FissionConfig
from netfission.training.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from netfission.training.folder import RunFolder, environment
from netfission.training.run import load, train

# Ten images a class: with all of them every network is right on 98 % and nothing can be told apart.
DATA = DataConfig("digits", limit_per_class=10, validation=0.0)
MODEL = ModelConfig("wrn-16-2")
TRAINING = TrainingConfig(epochs=40, batch_size=20, schedule="one_cycle", accelerator="cpu")
METHODS = {"single network": 1, "three exits": 3}
IMAGES_TIMED = 64


@dataclass(frozen=True)
class Row:
    """One line of the table: a network's, or one exit's, figures over the seeds."""

    name: str
    figures: dict[str, list[float]]
    cost: Cost | None = None


def run_demo(path: Path, seeds: int) -> None:
    """Train, evaluate and compare; print a table and draw it. What is there already is not run again.

    Args:
        path: folder for the runs, `demo.json`, `demo.txt` and `demo.png`.
        seeds: how many times each network is trained, from seeds 0, 1, ….

    Raises:
        ValueError: `seeds` is below 1, or the folder holds something else.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: takes a whole number from 1")
    runs = [(name, exits, seed) for seed in range(seeds) for name, exits in METHODS.items()]
    evaluations: dict[str, list[Evaluation]] = {name: [] for name in METHODS}
    with tqdm(runs, unit="run") as bar:
        for name, exits, seed in bar:
            bar.set_description(f"{name}, seed {seed}")
            config = RunConfig(DATA, MODEL, FissionConfig(exits=exits, seed=seed), TRAINING)
            folder = RunFolder(path / f"{name.replace(' ', '-')}-seed{seed}")
            evaluation = train(config, folder.path, resume=folder.config.is_file(), progress=False)
            assert evaluation is not None
            evaluations[name].append(evaluation)
    data = load(DATA, seed=0)
    rows = _rows(evaluations, _costs(path, data))
    text = _table(rows, data, seeds)
    write_whole(path / "demo.txt", text + "\n")
    write_whole(path / "demo.json", json.dumps(_record(rows, seeds), indent=2) + "\n")
    _draw(rows, seeds, path / "demo.png")
    print(f"\n{text}\n\nwrote {path / 'demo.png'}, {path / 'demo.json'} and a folder for each run in {path}")


def _costs(path: Path, data: ImageData) -> dict[str, Cost]:
    """The fissioned network's cost beside the single's, in this process."""
    networks = {}
    for name in METHODS:
        networks[name], _ = RunFolder(path / f"{name.replace(' ', '-')}-seed0").load_network()
    single, fissioned = networks.values()
    images = torch.randn(IMAGES_TIMED, *data.shape, generator=torch.Generator().manual_seed(0))
    costs = cost(fissioned, images, reference=single, rounds=30)
    return dict(zip(METHODS, (costs["reference"], costs["network"]), strict=True))


def _rows(evaluations: dict[str, list[Evaluation]], costs: dict[str, Cost]) -> list[Row]:
    single, fissioned = evaluations
    rows = [Row(single, _figures([e.ensemble for e in evaluations[single]]), costs[single])]
    for exit_number in range(METHODS[fissioned]):
        own = [e.exits[exit_number] for e in evaluations[fissioned]]
        rows.append(Row(f"  its exit {exit_number}", _figures(own)))
    together = Row(fissioned, _figures([e.ensemble for e in evaluations[fissioned]]), costs[fissioned])
    return [rows[0], together, *rows[1:]]


def _figures(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [run[name] for run in runs] for name in ("top1", "nll", "ece")}


def _table(rows: list[Row], data: ImageData, seeds: int) -> str:
    columns = ("", "accuracy %", "NLL", "ECE %", "parameters", "non-zero", "MACs", "effective", "time")
    lines = [[*columns]]
    for row in rows:
        cells = [
            row.name,
            _spread(row, "top1", 100, 2),
            _spread(row, "nll", 1, 3),
            _spread(row, "ece", 100, 2),
        ]
        if row.cost is not None:
            c = row.cost
            assert c.ratio is not None
            cells += [f"{c.parameters_stored:,}", f"{c.parameters_nonzero:,}"]
            cells += [f"{c.macs_dense / 1e6:.1f} M", f"{c.macs_effective / 1e6:.1f} M", f"{c.ratio:.2f}×"]
        lines.append(cells + [""] * (len(columns) - len(cells)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    exits, fissioned = rows[1].name, rows[1].cost
    assert fissioned is not None
    assert fissioned.ratio is not None
    assert fissioned.ratio_range is not None
    low, high = fissioned.ratio_range
    return "\n".join(
        [
            f"{MODEL.model} on scikit-learn's digits: {len(data.train)} training images, {len(data.test)} "
            f"test images, {TRAINING.epochs} epochs; mean ± standard deviation over n = {seeds} seeds",
            "",
            *text,
            "",
            f"{exits} minus single network, seed by seed: {_difference(rows, 'top1', 100, 2)} points of "
            f"accuracy, {_difference(rows, 'nll', 1, 3)} NLL.",
            f"time: inference of {IMAGES_TIMED} images over the single network's, median of 30 rounds side "
            f"by side (range {low:.2f}–{high:.2f}).",
            f"With element-wise groups the {exits} cost as many effective MACs as the single network but "
            f"{fissioned.ratio:.2f}× its",
            "time: dense kernels multiply the zeros of removed weights as well.",
        ]
    )


def _difference(rows: list[Row], name: str, scale: float, digits: int) -> str:
    """The second row's figure minus the first's: mean ± standard deviation over the seeds."""
    pairs = zip(rows[1].figures[name], rows[0].figures[name], strict=True)
    return _mean_and_spread([scale * (ours - single) for ours, single in pairs], f"+.{digits}f", digits)


def _spread(row: Row, name: str, scale: float, digits: int) -> str:
    return _mean_and_spread([scale * value for value in row.figures[name]], f".{digits}f", digits)


def _mean_and_spread(values: list[float], form: str, digits: int) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"


def _record(rows: list[Row], seeds: int) -> dict[str, Any]:
    return {
        "data": asdict(DATA),
        "model": asdict(MODEL),
        "training": asdict(TRAINING),
        "seeds": seeds,
        "images_timed": IMAGES_TIMED,
        "rows": [asdict(row) for row in rows],
        "environment": environment(),
    }


def _draw(rows: list[Row], seeds: int, path: Path) -> None:
    """Each method's runs as dots with their mean, and its cost over the single network's."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    *quality, price = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.25])
    colours = ["#444444", "#0b6e99", *["#5f9fbb"] * (len(rows) - 2)]
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
            axes.plot([0, 1], pair, color="#bbbbbb", linewidth=0.8, zorder=0)
        for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
            values = [scale * value for value in row.figures[name]]
            axes.plot([place] * len(values), values, "o", color=colour, alpha=0.45, markersize=5)
            axes.hlines(mean(values), place - 0.3, place + 0.3, color=colour, linewidth=3)
        labels = [row.name.replace("  its ", "").replace(" ", "\n") for row in rows]
        axes.set_xticks(range(len(rows)), labels, fontsize=8)
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.set_title(title, fontsize=10)
    single, together = rows[0].cost, rows[1].cost
    assert single is not None
    assert together is not None
    assert together.ratio is not None
    assert together.ratio_range is not None
    ratios = {
        "time": together.ratio,
        "MACs": together.macs_dense / single.macs_dense,
        "effective\nMACs": together.macs_effective / single.macs_effective,
        "parameters": together.parameters_stored / single.parameters_stored,
        "non-zero\nparameters": together.parameters_nonzero / single.parameters_nonzero,
    }
    bars = price.barh(list(ratios), list(ratios.values()), color=["#0b6e99", *["#9cc4d6"] * 4])
    price.bar_label(bars, [f"{ratio:.2f}×" for ratio in ratios.values()], padding=3, fontsize=9)
    price.axvline(1, color="#444444", linestyle="--", linewidth=1)
    price.invert_yaxis()
    price.set_xlim(0, 1.25 * max(ratios.values()))
    price.set_title("three exits' cost ÷ single's", fontsize=10)
    for axes in (*quality, price):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{MODEL.model} on digits, ten training images a class: each dot is one run, bars are means, "
        f"lines join the runs of one seed (n = {seeds}); axes do not start at 0",
        fontsize=10,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_whole(path, buffer.getvalue())
