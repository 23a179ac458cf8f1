import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ttest_rel

from netfission.cli import main
from netfission.experiments.compare import CostsFile, compare, summarise
from netfission.experiments.contenders import CONTENDERS
from netfission.experiments.grid import Grid
from netfission.experiments.plots import plot_against_cost
from netfission.experiments.records import Records, run_folder
from netfission.experiments.results import Comparison
from netfission.experiments.statistics import SeedValues
from netfission.tasks.classification import Classification
from netfission.utils.checksums import parse_json
from netfission.utils.typed import typed

COLUMNS = Classification.columns
FLAGS = (
    "compare --data digits --limit_per_class 5 --validation 0 --model wrn-10-1 --exits 2 --epochs 1 "
    "--batch_size 25 --accelerator cpu --rounds 2"
)
SMALL_GRID = """
contenders: {single: {exits: 1}}
scales: {small: {}}
settings: {data: digits, limit_per_class: 5, validation: 0.0, model: wrn-10-1, epochs: 1, batch_size: 25}
"""
values = st.lists(st.floats(0, 1), min_size=3, max_size=6)


@given(values)
def test_intervals_are_those_of_a_paired_t_test(first):
    # Uneven distances keep the differences apart: SciPy warns of the precision of equal ones.
    second = [value + seed**2 for seed, value in enumerate(reversed(first))]
    difference = SeedValues(dict(enumerate(first))).minus(SeedValues(dict(enumerate(second))))
    interval = ttest_rel(first, second).confidence_interval(0.95)
    assert difference.mean - difference.margin == pytest.approx(interval.low, abs=1e-9)
    assert difference.mean + difference.margin == pytest.approx(interval.high, abs=1e-9)


def test_differences_pair_the_seeds_that_both_have():
    first, second = SeedValues({0: 0.5, 1: 0.75, 3: 0.9}), SeedValues({1: 0.5, 0: 0.5, 2: 0.1})
    assert first.minus(second).values == {0: 0.0, 1: 0.25}
    assert SeedValues({0: 0.0125}).difference(COLUMNS["top1"]) == "+1.25"
    assert SeedValues({0: 0.5}).cell(COLUMNS["top1"]) == "50.00"
    assert SeedValues({0: 1e20, 1: 1e20}).cell(COLUMNS["nll"]) == "1.00e+20 ± 0.000"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    methods = "[single,deep-ensemble,fission-channels]"
    assert main([*FLAGS.split(), "--methods", methods, "--seeds", "2", "--out", str(out)]) == 0
    return out, json.loads((out / "comparison.json").read_text("utf-8"))


def test_figures_are_those_of_the_runs(compared):
    out, comparison = compared
    runs = [json.loads(file.read_text("utf-8")) for file in (out / "records").glob("*.json")]
    for name in ("single", "deep-ensemble", "fission-channels"):
        accuracies = {
            str(run["seed"]): run["evaluation"]["ensemble"]["top1"]
            for run in runs
            if run["contender"] == name
        }
        assert comparison["metrics"][name]["top1"]["values"] == accuracies
        assert len(accuracies) == 2
    table = (out / "comparison.txt").read_text("utf-8")
    accuracy = mean(comparison["metrics"]["single"]["top1"]["values"].values())
    assert re.search(rf"single +2 +– +{100 * accuracy:.2f} ± ", table)
    assert "minus single, seed by seed [95 %]" in table


def test_the_training_of_the_network_that_a_contender_starts_from_counts(compared):
    comparison = typed(Comparison, compared[1])
    started = replace(comparison, starts={"fission-channels": "single"})

    def training_macs(table: str) -> float:
        head, _, *rows = (line.split(" | ") for line in table.splitlines() if line.startswith("|"))
        (row,) = (row for row in rows if row[0] == "| fission-channels")
        return float(row[head.index("training MACs")].rstrip("×"))

    difference = training_macs(started.markdown()) - training_macs(comparison.markdown())
    assert difference == pytest.approx(1, abs=0.011)  # one training of the single network


def test_costs_are_over_the_single_networks(compared):
    _, comparison = compared
    single, costs = comparison["costs"]["single"], comparison["costs"]["contenders"]
    size = single["size"]
    assert costs["single"]["size"] == size
    assert costs["deep-ensemble"]["size"]["macs_dense"] == 2 * size["macs_dense"]
    assert costs["deep-ensemble"]["training_macs"] == pytest.approx(2 * single["training_macs"])
    # Forward once and backward twice, but for the images' gradient.
    assert 2 < single["training_macs"] / size["macs_dense"] < 3
    assert single["training"] == {"lower": 1.0, "median": 1.0, "upper": 1.0}
    assert costs["deep-ensemble"]["inference"].keys() == {"1", "128"}
    assert set(costs["fission-channels"]["deployed"]) == {"1", "128"}


@pytest.mark.usefixtures("undrawn", "few_timed")
def test_costs_of_two_environments_are_not_mixed(grid_of, tmp_path):
    grid = grid_of("single")
    compare(grid, tmp_path, rounds=1)
    file = tmp_path / "costs.json"
    content = parse_json(file.read_text("utf-8"))
    content["costs"]["environment"]["threads"] = 99
    file.write_text(json.dumps(content))
    compare(grid, tmp_path)
    assert json.loads(file.read_text("utf-8")) == content  # nothing is missing
    more = Grid({**grid.contenders, "another": {"exits": 1, "epochs": 2}}, [0], grid.common, "single")
    compare(more, tmp_path)
    costs = json.loads(file.read_text("utf-8"))["costs"]
    assert costs["environment"]["threads"] != 99
    assert costs["contenders"]["single"] != content["costs"]["contenders"]["single"]


@pytest.mark.usefixtures("undrawn", "few_timed")
def test_costs_are_measured_on_a_run_whose_network_is_there(grid_of, tmp_path):
    grid = grid_of("single", seeds=2)
    compare(grid, tmp_path, rounds=1)
    file, cells = tmp_path / "costs.json", grid.cells()
    assert json.loads(file.read_text("utf-8"))["networks"] == {"single": cells[0].key}
    file.unlink()
    shutil.rmtree(run_folder(cells[0], tmp_path).path)
    compare(grid, tmp_path, rounds=1)
    measured = file.read_bytes()
    assert json.loads(measured)["networks"] == {"single": cells[1].key}
    compare(grid, tmp_path)
    assert file.read_bytes() == measured  # as before
    compare(grid, tmp_path, rounds=2)
    assert json.loads(file.read_text("utf-8"))["costs"]["rounds"] == 2
    before = json.loads(file.read_text("utf-8"))
    more = Grid({"another": {"exits": 1, "epochs": 2}, **grid.contenders}, [0, 1], grid.common, "another")
    shutil.rmtree(run_folder(cells[1], tmp_path).path)  # not needed, as its costs are known
    comparison = compare(more, tmp_path)
    assert list(comparison.costs.contenders) == ["another", "single"]  # in the order of the grid
    after = json.loads(file.read_text("utf-8"))
    assert after["costs"]["rounds"] == 2  # as often as before
    assert after["networks"].keys() == {"another", "single"}
    assert after["costs"]["contenders"]["single"] == before["costs"]["contenders"]["single"]
    compare(grid, tmp_path)
    assert json.loads(file.read_text("utf-8")) == after  # a contender that is left out is not forgotten
    file.unlink()
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(
        ValueError, match=f"out must be a folder with a network of single, .*; remove .*{cells[0].key}"
    ):
        compare(grid, tmp_path)


@pytest.mark.usefixtures("undrawn", "few_timed")
def test_a_run_that_fails_is_named_and_the_others_are_compared(tmp_path, capsys):
    methods = ["--methods", "[single,fission-weights]", "--seeds", "1"]
    assert main([*FLAGS.split(), *methods, "--exits", "9", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    expected = "exits must be at most 3, one per stage (block1, block2, bn), got 9; "
    assert f"netfission: 1 run failed (fission-weights, seed 0: {expected}" in printed.err
    assert printed.err.endswith("); see the table, and run the command again\n")
    assert f"fission-weights, seed 0: failed ({expected}" in printed.out
    assert re.search(r"single +1 +– +\d", printed.out)


@pytest.mark.usefixtures("undrawn", "few_timed")
def test_remarks_name_what_is_a_contenders_own(grid_of, tmp_path):
    grid = grid_of("single", "treenet", "batch-ensemble")
    remarks = compare(grid, tmp_path, rounds=1).remarks
    assert remarks["treenet"] == [
        "trained without distillation, as the method is defined",
        "differs from its authors: branches leave after whole stages, by default the first (authors: after "
        "the first layers)",
    ]
    first, second, *differences = remarks["batch-ensemble"]
    assert differences[-1] == "differs from its authors: one member per exit (authors: 4)"
    assert (first, second[:12]) == ("trained without distillation, as the method is defined", "fast weights")
    assert "single" not in remarks


@pytest.mark.usefixtures("undrawn", "few_timed")
def test_the_table_says_which_settings_all_share_and_whom_one_does_not_apply_to(grid_of, tmp_path):
    grid = grid_of("single", "fission-weights", "mimo", "neurotrails", sparsity=0.5)
    cell, *_ = grid.cells()
    comparison = compare(replace(grid, contenders={"single": grid.contenders["single"]}), tmp_path, rounds=1)
    assert comparison.conditions == (
        "common settings: image size the images’ own, epochs 1, batch size 25, optimizer sgd, "
        "learning rate 0.1, schedule paper, sparsity 0.5, validation 0.0, exits 2, accelerator cpu"
    )
    assert comparison.notes == []
    notes = ["sparsity 0.5 applies to all but: mimo; neurotrails with 0.8"]
    records = [Records(tmp_path / "records").find(cell)]
    whole = summarise(grid, [cell], records, comparison.costs)
    assert whole.notes == notes
    for shown in (whole.table(), whole.markdown()):
        assert f"\n{whole.conditions}\n\n" in shown
        assert f"\n\n{notes[0]}" in shown
    assert whole.record()["notes"] == notes
    assert "–: it does not support such a network" in whole.table()


@pytest.mark.usefixtures("undrawn", "few_timed")
def test_records_of_other_data_of_the_same_name_are_refused(grid_of, tmp_path):
    for place, shade in (("a", 50), ("b", 200)):
        for split, label, number in itertools.product(("train", "test"), ("dark", "light"), range(6)):
            folder = tmp_path / place / "images" / split / label
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{place * (number + 1)}.png"
            Image.new("L", (8, 8), shade + 5 * number + 20 * (label == "light")).save(folder / name)
    grids = [grid_of("single", data=str(tmp_path / place / "images")) for place in ("a", "b")]
    out = tmp_path / "out"
    compare(grids[0], out, rounds=1)
    with pytest.raises(
        ValueError, match=r"data must be the data of .*\.json, got other data of the same name \(.*images\)"
    ):
        compare(grids[1], out)
    (tmp_path / "moved").mkdir()
    (tmp_path / "a" / "images").rename(tmp_path / "moved" / "images")
    compare(grid_of("single", data=str(tmp_path / "moved" / "images")), out)  # the same data, found again


def test_pictures_are_drawn(compared):
    out, _ = compared
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "<!-- 3  fission-channels -->" in (out / "comparison.svg").read_text("utf-8")


def test_what_is_up_to_date_stays_as_it_is(grid_of, tmp_path):
    grid, out = grid_of("single"), tmp_path / "out"
    compare(grid, out, rounds=1)
    files = [out / f"comparison.{kind}" for kind in ("txt", "md", "json", "png", "svg")]
    before = {file: (file.read_bytes(), file.stat().st_ino) for file in files}

    def rewritten() -> list[str]:
        compare(grid, out)
        assert all(file.read_bytes() == content for file, (content, _) in before.items())
        new = [file.suffix for file, (_, number) in before.items() if file.stat().st_ino != number]
        before.update({file: (file.read_bytes(), file.stat().st_ino) for file in files})
        return new

    assert rewritten() == []
    (out / "comparison.md").write_text("mine")
    assert rewritten() == [".txt", ".md", ".json", ".png", ".svg"]
    (out / "comparison.svg").unlink()
    assert rewritten() == [".txt", ".md", ".json", ".png", ".svg"]


def test_a_folder_of_something_else_is_refused(grid_of, tmp_path):
    (tmp_path / "cat.jpg").touch()
    with pytest.raises(ValueError, match=r"^out must be where a folder is new, .* with cat\.jpg$"):
        compare(grid_of("single"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cat.jpg"]


@pytest.mark.usefixtures("few_timed")
def test_a_comparison_that_is_stopped_amid_its_files_is_drawn_again(grid_of, tmp_path, monkeypatch):
    compare(grid_of("single"), tmp_path, rounds=1)
    two, picture, replace_file = grid_of("single", "treenet"), tmp_path / "comparison.svg", os.replace
    before = picture.read_bytes()

    def stop_before_the_second_picture(old: Path, new: Path) -> None:
        if Path(new) == picture:
            raise KeyboardInterrupt
        replace_file(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_before_the_second_picture)
        with pytest.raises(KeyboardInterrupt):
            compare(two, tmp_path)
    assert picture.read_bytes() == before
    compare(two, tmp_path)
    assert b"<!-- 2  treenet -->" in picture.read_bytes()


def test_a_finished_grid_imports_neither_lightning_nor_matplotlib(tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(SMALL_GRID)
    command = ["reproduce", str(grid), "--seeds", "1", "--rounds", "1", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    code = (
        "import sys; from netfission.cli import main; status = main(sys.argv[1:]);"
        "print(status, {'lightning', 'matplotlib', 'scipy.stats'} & set(sys.modules))"
    )
    again = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert again.stdout.splitlines()[-1] == "0 set()"


@pytest.mark.parametrize(
    ("seeds", "start"),
    [(1, "the run failed: single, seed 0 ("), (2, "all 2 runs failed, such as single, seed 0 (")],
)
def test_the_first_of_runs_that_all_fail_is_named(seeds, start, tmp_path, capsys):
    flags = ["--methods", "[single]", "--model", "wrn-10-1x", "--seeds", str(seeds)]
    assert main([*FLAGS.split(), *flags, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"netfission: {start}model must be ")
    assert error.endswith(")")


def test_equal_costs_lie_close_together_with_their_numbers(compared):
    out, _ = compared
    costs = typed(CostsFile, parse_json((out / "costs.json").read_text("utf-8"))).costs
    contenders = {name: costs.contenders[name] for name in ("single", "fission-channels")}
    metrics = {name: {"top1": SeedValues({0: 0.5})} for name in contenders}
    settings = {name: CONTENDERS[name] for name in contenders}
    columns = {"top1": COLUMNS["top1"]}
    picture = plot_against_cost("", columns, metrics, replace(costs, contenders=contenders), settings)
    left, right = picture.axes[0].get_xlim()
    assert left <= 0.5 and right >= 1.5
    numbers = [[text.get_text() for text in axes.texts if text.get_text()] for axes in picture.axes]
    assert [sorted(shown) for shown in numbers] == [["1", "2"], ["1", "2"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--methods [single,deep-ensembel]",
            "got 'deep-ensembel'; did you mean deep-ensemble",
        ),
        ("--methods [single] --seeds 0", "--seeds must be a positive integer, got 0"),
        ("--methods []", "--methods must be one method or more, got []"),
        ("--methods [single] --reference treenet", "--reference must be one of single, got 'treenet'"),
        ("--methods [single] --workers 0", "--workers must be a positive integer, got 0"),
        ("--methods [single] --rounds 0", "--rounds must be a positive integer, got 0"),
    ],
)
def test_a_bad_request_ends_in_one_line_and_status_2(flags, message, tmp_path, capsys):
    assert main([*FLAGS.split(), *flags.split(), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("netfission: ")
    assert message in error
