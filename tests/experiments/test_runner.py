import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from netfission.cli import main
from netfission.evaluation import evaluate_logits
from netfission.experiments.records import Records, run_folder
from netfission.experiments.runner import run_missing
from netfission.models import create_model, read_weights
from netfission.utils.checksums import parse_json

FLAGS = (
    "--data digits --limit_per_class 5 --validation 0 --model wrn-10-1 --exits 2 --batch_size 25 "
    "--accelerator cpu --rounds 1"
)


def test_only_what_is_missing_runs(grid_of, tmp_path, monkeypatch):
    first = run_missing(grid_of("single").cells(), tmp_path)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "records").iterdir()}
    both = run_missing(grid_of("single", "treenet").cells(), tmp_path)
    assert both[0] == first[0]
    assert all('"checksum"' in file.read_text("utf-8") for file in tmp_path.rglob("*.json"))
    assert all(file.stat().st_mtime_ns == time_ for file, time_ in kept.items())
    single, treenet = both
    assert single.read_evaluation().n == treenet.read_evaluation().n == 359
    assert len(treenet.read_evaluation().exits) == 2
    assert single.seconds > 0
    assert single.settings["exits"] == 1
    assert single.environment["versions"]["torch"]
    read, find = [], Records.find
    monkeypatch.setattr(Records, "find", lambda records, cell: read.append(cell) or find(records, cell))
    cells = grid_of("single", "treenet").cells()
    assert run_missing(cells, tmp_path) == both
    assert read == cells  # of a thousand runs, too, each record is read once


def test_a_record_of_another_run_or_without_numbers_is_refused(grid_of, tmp_path):
    cells, records = grid_of("single", "treenet").cells(), Records(tmp_path)
    for cell in cells:
        records.write(cell, environment={}, seconds=1.0, error="a stop")
    first, second = map(records.file, cells)
    content = parse_json(first.read_text("utf-8"))
    second.write_bytes(first.read_bytes())
    found = (
        f"must be the record of run {cells[1].key}, got that of {cells[0].key}; remove the file, and the run"
    )
    with pytest.raises(ValueError, match=found):
        records.find(cells[1])
    content["evaluation"] = {"ensemble": {"nll": [0.5, math.nan]}}
    first.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"must be a record of numbers, got NaN among them; remove the file"):
        records.find(cells[0])


def test_a_run_that_fails_is_recorded_stops_no_other_and_is_tried_again(grid_of, tmp_path):
    grid = grid_of("fission-weights", "single")
    failing = replace(grid, contenders={**grid.contenders, "fission-weights": {"exits": 9}})
    divided, single = run_missing(failing.cells(), tmp_path)
    assert divided.error is not None  # which is known only when the model is there
    assert divided.error.startswith("exits must be at most 3, one per stage (block1, block2, bn), got 9; ")
    assert divided.evaluation is None
    assert single.error is None
    record = Records(tmp_path / "records").file(failing.cells()[0])
    before = record.stat().st_mtime_ns
    run_missing(failing.cells(), tmp_path)
    assert record.stat().st_mtime_ns > before


def test_a_folder_that_a_kill_left_without_settings_is_begun_anew(grid_of, tmp_path):
    (cell,) = grid_of("single").cells()
    folder = run_folder(cell, tmp_path).path
    folder.mkdir(parents=True)
    (folder / ".config.yaml.1-0123abcd.tmp").touch()
    assert run_missing([cell], tmp_path)[0].error is None


def test_trained_weights_that_do_not_suit_a_contender_are_refused_before_another_is_trained(
    grid_of, tmp_path
):
    torch.save(create_model("wrn-10-1", 10, in_channels=1).state_dict(), tmp_path / "digits.pt")
    torch.save(create_model("wrn-10-1", 7, in_channels=1).state_dict(), tmp_path / "seven.pt")
    torch.save(create_model("wrn-10-2", 10, in_channels=1).state_dict(), tmp_path / "wide.pt")

    def refuse(message: str, *methods: str, file: str, **changes: object) -> None:
        out = tmp_path / "out"
        cells = grid_of("single", *methods, weights=str(tmp_path / file), **changes).cells()
        with pytest.raises(ValueError, match=message):
            run_missing(cells, out)
        assert not out.exists()

    equal = "^contender deep-ensemble: one_by_one must be True for members that start equal, got False; "
    refuse(equal, "deep-ensemble", file="digits.pt")
    refuse(r"^contender single: .*wide\.pt must be weights of wrn-10-1, .* 32 unequal", file="wide.pt")
    refuse("^contender single: weights must be of a network trained", file="seven.pt", parent_weight=1.0)


def test_a_deep_ensemble_is_compared_with_the_network_that_its_members_start_from(grid_of, tmp_path):
    torch.save(create_model("wrn-10-1", 10, in_channels=1).state_dict(), tmp_path / "digits.pt")
    grid = grid_of("single", "deep-ensemble", weights=str(tmp_path / "digits.pt"), one_by_one=True)
    assert [record.error for record in run_missing(grid.cells(), tmp_path)] == [None, None]


def test_a_run_starts_from_the_network_that_another_run_trained(grid_of, tmp_path):
    grid = grid_of("single")
    contenders = {**grid.contenders, "further": {"exits": 1, "learning_rate": 1e-12}}
    grid = replace(grid, contenders=contenders, starts={"further": "single"})
    _, cell = grid.cells()
    (further,) = run_missing([cell], tmp_path)  # and before it the run that it starts from
    single, again = run_missing(grid.cells(), tmp_path)
    assert further.error is None and again == further
    trained, moved = (
        list(run_folder(each, tmp_path).load_network()[0].parameters()) for each in (cell.start, cell)
    )
    assert all(map(torch.allclose, trained, moved))
    assert single.weights is further.weights is None
    for folder in (tmp_path / "runs").iterdir():  # as after copying the records alone
        (folder / "model.safetensors").unlink()
    assert run_missing(grid.cells(), tmp_path) == [single, further]
    longer = replace(grid, contenders={**contenders, "single": {"exits": 1, "epochs": 2}})
    assert longer.cell("further", 0).key != cell.key


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"exits": 9}, "^contender further: exits must be at most 3, one per stage"),
        (
            {"exits": 1, "linear_exits": [4]},
            "^contender further: linear_exits must be stages, each a number fr",
        ),
        (
            {"exits": 2, "method": "deep-ensemble"},
            "^contender further: one_by_one must be True for members th",
        ),
    ],
)
def test_what_cannot_start_from_another_is_refused_before_that_is_trained(
    grid_of, tmp_path, further, message
):
    grid = grid_of("single")
    grid = replace(grid, contenders={**grid.contenders, "further": further}, starts={"further": "single"})
    with pytest.raises(ValueError, match=message):
        run_missing(grid.cells(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_is_refused_before_another_is_trained(grid_of, tmp_path):
    grid = grid_of("single")
    grid = replace(grid, contenders={**grid.contenders, "other": {"exits": 1, "model": "wrn-10-1x"}})
    with pytest.raises(ValueError, match=r"^contender other: model must be .*, got 'wrn-10-1x'"):
        run_missing(grid.cells(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_start_that_fails_is_tried_once_and_named_by_those_that_depend_on_it(
    grid_of, tmp_path, monkeypatch
):
    grid = grid_of("single")
    contenders = {"single": {"exits": 1}, **{name: {"exits": 1, "epochs": 2} for name in ("a", "b")}}
    grid = replace(grid, contenders=contenders, starts={"a": "single", "b": "single"})
    tried = []

    def fail(config, *_, **__):
        tried.append(config.training.epochs)
        raise RuntimeError("too hot")

    monkeypatch.setattr("netfission.experiments.one_run.train", fail)
    records = run_missing(grid.cells(), tmp_path)
    assert [record.error for record in records] == ["too hot", *["single failed: too hot"] * 2]
    assert tried == [1]


def test_records_of_other_weights_under_the_name_are_refused(grid_of, tmp_path):
    file, out = tmp_path / "net.pt", tmp_path / "out"
    cells = grid_of("single", weights=str(file)).cells()
    with pytest.raises(ValueError, match=r"net\.pt must be a file of weights .*, got no such file"):
        run_missing(cells, out)
    assert not out.exists()  # it is said before any run
    torch.save(create_model("wrn-10-1", 10, in_channels=1).state_dict(), file)
    (record,) = run_missing(cells, out)
    assert record.error is None
    assert record.weights == read_weights(file).sha256
    assert run_missing(cells, out) == [record]
    torch.save({name: tensor + 1 for name, tensor in torch.load(file).items()}, file)
    with pytest.raises(ValueError, match=r"^weights must be the file of .*\.json, got .*net\.pt with other"):
        run_missing(cells, out)
    file.unlink()
    assert run_missing(cells, out) == [record]  # which needs it no more


def test_a_damaged_record_is_named_and_kept(grid_of, tmp_path):
    cells = grid_of("single").cells()
    run_missing(cells, tmp_path)
    file = Records(tmp_path / "records").file(cells[0])
    half = file.read_text("utf-8")[: len(file.read_text("utf-8")) // 2]
    file.write_text(half)
    with pytest.raises(
        ValueError,
        match=f"{cells[0].key}.json must be a valid JSON file, got damaged content .*; remove the file",
    ) as error:
        run_missing(cells, tmp_path)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert file.read_text("utf-8") == half


def test_two_at_work_on_one_grid_do_not_do_the_same_run(grid_of, tmp_path, monkeypatch):
    done = []

    evaluation = json.loads(
        evaluate_logits(torch.zeros(4, 1, 3), torch.zeros(4).long(), average="logits").to_json()
    )

    def slow(cell, out, records, say, limit):
        done.append(cell.key)
        time.sleep(0.2)
        return records.write(cell, environment={}, seconds=0.0, error=None, evaluation=evaluation)

    monkeypatch.setattr("netfission.experiments.one_run.run_cell", slow)
    cells = grid_of("single", "treenet", seeds=2).cells()
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda _: run_missing(cells, tmp_path), range(3)))
    assert sorted(done) == sorted(cell.key for cell in cells)
    assert results[0] == results[1] == results[2]


def test_workers_share_the_runs_and_get_the_same_figures(grid_of, tmp_path, capsys):
    cells = grid_of("single", "treenet").cells()
    alone = run_missing(cells, tmp_path / "alone")
    found = [line for line in capsys.readouterr().err.splitlines() if "found" in line]
    shared = run_missing(cells, tmp_path / "shared", workers=2)
    assert len(found) == 1
    assert re.search(r"found 409 images of 10 classes .* above the limit per class$", found[0])
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert errors.count("found 409 images") == 1
    for one, other in zip(alone, shared, strict=True):
        assert one.contender == other.contender
        assert one.read_evaluation().ensemble["nll"] == pytest.approx(
            other.read_evaluation().ensemble["nll"], rel=1e-3
        )
    with pytest.raises(ValueError, match="workers must be a positive integer, got 0"):
        run_missing(cells, tmp_path, workers=0)


@pytest.mark.usefixtures("undrawn", "few_timed")
def test_killed_at_any_moment_the_same_command_does_what_is_missing_once(tmp_path):
    command = ["compare", *FLAGS.split(), "--methods", "[single]", "--seeds", "3", "--epochs", "2"]
    records = tmp_path / "cmp" / "records"
    process = subprocess.Popen(
        [sys.executable, "-m", "netfission", *command, "--out", str(tmp_path / "cmp")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.poll() is None and not list(records.glob("*.json")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL  # it had not ended
    kept = {file: file.read_bytes() for file in records.glob("*.json")}
    assert 1 <= len(kept) < 3
    assert main([*command, "--out", str(tmp_path / "cmp")]) == 0
    assert all(file.read_bytes() == content for file, content in kept.items())
    seen = [json.loads(file.read_text("utf-8")) for file in records.glob("*.json")]
    assert sorted((record["contender"], record["seed"]) for record in seen) == [
        ("single", 0), ("single", 1), ("single", 2),
    ]  # fmt: skip
    assert all(record["error"] is None for record in seen)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes in /proc")
def test_workers_do_not_outlive_a_killed_command(tmp_path):
    command = ["compare", *FLAGS.split(), "--methods", "[single,treenet]", "--seeds", "9", "--epochs", "99"]
    process = subprocess.Popen(
        [sys.executable, "-m", "netfission", *command, "--workers", "2", "--out", str(tmp_path / "cmp")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        while len(list(tmp_path.glob("cmp/runs/*/config.yaml"))) < 2:  # both have begun one
            assert process.poll() is None
            time.sleep(0.05)
        workers = [stat.parent for stat in Path("/proc").glob("[0-9]*/stat") if _parent(stat) == process.pid]
    finally:
        process.kill()
        process.wait()
    assert len(workers) >= 2
    deadline = time.monotonic() + 30
    while any(worker.exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(worker.exists() for worker in workers)


def _parent(stat: Path) -> int | None:
    """The parent of a process; None if the process has ended since."""
    try:
        return int(stat.read_text("utf-8").rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None
