import io
import json
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from matplotlib.figure import Figure

from netfission.cli import main
from netfission.experiments import demo
from netfission.experiments.grid import Grid


def run_short_demo(out: Path, *flags: str) -> str:
    """What the command prints with one epoch of a small network and two seeds, timed on one or two images.

    Its picture is empty.
    """

    def short_grid(*arguments) -> Grid:
        grid = demo_grid(*arguments)
        return replace(grid, common={**grid.common, "epochs": 1, "model": "wrn-10-1"})

    demo_grid, printed = demo.demo_grid, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(demo, "demo_grid", short_grid)
        patch.setattr("netfission.experiments.compare.LARGEST_BATCH", 2)
        patch.setattr("netfission.experiments.plots.plot_against_cost", lambda *_: Figure((1, 1)))
        assert main(["demo", "--seeds", "2", "--out", str(out), *flags]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, run_short_demo(out)


def records(out: Path, contender: str) -> list[dict]:
    found = [json.loads(file.read_text("utf-8")) for file in (out / "records").iterdir()]
    return sorted((run for run in found if run["contender"] == contender), key=lambda run: run["seed"])


def test_the_tables_repeat_what_the_runs_measured(short_demo):
    out, printed = short_demo
    assert (out / "comparison.txt").read_text("utf-8").strip() in printed
    for contender in ("single network", "three exits"):
        accuracies = [run["evaluation"]["ensemble"]["top1"] for run in records(out, contender)]
        assert len(accuracies) == 2
        assert f"{100 * mean(accuracies):.2f} ±" in printed
    exits = [run["evaluation"]["exits"] for run in records(out, "three exits")]
    lines = [line for line in printed.splitlines() if line.startswith("exit ")][-3:]
    for number, line in enumerate(lines):
        assert line.startswith(f"exit {number}")
        assert f"{100 * mean(of_run[number]['top1'] for of_run in exits):.2f} ±" in line
        assert f"{mean(of_run[number]['nll'] for of_run in exits):.3f} ±" in line


def test_its_runs_have_the_settings_of_the_grid_and_equal_cost(short_demo):
    out, printed = short_demo
    (first, _) = records(out, "three exits")
    assert first["settings"] == {
        "accelerator": "cpu", "batch_size": 20, "epochs": 1, "grouping": "channels", "limit_per_class": 10,
        "model": "wrn-10-1", "schedule": "one_cycle", "validation": 0.0,
    }  # fmt: skip
    assert printed.endswith(f"netfission report {out / 'runs' / first['key']}\n")
    costs = json.loads((out / "costs.json").read_text("utf-8"))["costs"]
    macs = costs["contenders"]["three exits"]["size"]["macs_dense"]
    assert macs != costs["single"]["size"]["macs_dense"]
    assert macs == pytest.approx(costs["single"]["size"]["macs_dense"], rel=0.05)


def test_another_grouping_trains_the_three_exits_alone(short_demo, tmp_path):
    done, printed = short_demo
    out = shutil.copytree(done, tmp_path / "demo")
    before = {file: file.stat().st_mtime_ns for file in (out / "records").iterdir()}
    assert "three exits: grouping weights" in run_short_demo(out, "--grouping", "weights")
    after = {file: file.stat().st_mtime_ns for file in (out / "records").iterdir()}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2
    again = run_short_demo(out)
    assert printed.split("over the single network")[0] == again.split("over the single network")[0]
    assert len(list((out / "records").iterdir())) == len(after)
