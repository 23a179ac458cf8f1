"""`--minutes` ends a training after a whole epoch, and the same command goes on."""

import itertools

import pytest

from netfission.cli import main
from netfission.experiments import one_run, time_limit
from netfission.experiments.records import run_folder
from netfission.experiments.runner import run_missing
from netfission.experiments.time_limit import OutOfTimeError, TimeLimit


@pytest.fixture
def limited(monkeypatch):
    """Let every look at the clock be 10 s after the one before, and the limit be of this many seconds."""

    class Clock:
        ticks = itertools.count(0, 10)

        def time(self) -> float:
            return float(next(self.ticks))

    def limit_to(seconds: float) -> None:
        clock = Clock()
        for module in (time_limit, one_run):
            monkeypatch.setattr(module, "time", clock)
        limit = TimeLimit(seconds, start=0.0)
        monkeypatch.setattr("netfission.experiments.runner.TimeLimit", lambda _: limit)

    return limit_to


def epochs_in(folder) -> int:
    return len(folder.metrics.read_text("utf-8").splitlines()) - 1


def test_a_training_ends_after_a_whole_epoch_and_goes_on_to_the_same_result(grid_of, tmp_path, limited):
    cells = grid_of("single", epochs=4).cells()
    (whole,) = run_missing(cells, tmp_path / "whole")
    # Looks before the run (0), before epoch 1 (10, 20) and before epoch 2 (30, and 40 with 20 for an epoch).
    limited(55)
    message = r"^0 of 1 run done; the same command goes on after the last whole epoch$"
    with pytest.raises(OutOfTimeError, match=message):
        run_missing(cells, tmp_path / "parts", minutes=1)
    folder = run_folder(cells[0], tmp_path / "parts")
    assert epochs_in(folder) == 1 and folder.checkpoint.is_file()
    limited(1000)
    (parts,) = run_missing(cells, tmp_path / "parts", minutes=1)
    assert parts.evaluation == whole.evaluation and epochs_in(folder) == 4


def test_no_run_begins_when_the_time_is_over(grid_of, tmp_path, limited):
    cells = grid_of("single", seeds=2).cells()
    limited(25)  # looks before run 1 (0) and its only epoch (10, 20), and before run 2 (30)
    with pytest.raises(OutOfTimeError, match=r"^1 of 2 runs done; "):
        run_missing(cells, tmp_path, minutes=1)
    assert not run_folder(cells[1], tmp_path).path.exists()
    assert len(run_missing(cells, tmp_path)) == 2


def test_less_time_than_an_epoch_takes_is_refused_and_the_epoch_kept(grid_of, tmp_path, limited):
    cells = grid_of("single", epochs=2).cells()
    limited(25)
    with pytest.raises(ValueError, match=r"^minutes must be at least 0\.4, which an epoch takes, got 0\.25$"):
        run_missing(cells, tmp_path, minutes=0.25)
    assert epochs_in(run_folder(cells[0], tmp_path)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minutes": 0.0}, r"^minutes must be a positive number, got 0\.0$"),
        ({"minutes": 2.0, "ray": "auto"}, r"^minutes must be left out with ray, got 2\.0$"),
    ],
)
def test_bad_limits(grid_of, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run_missing(grid_of("single").cells(), tmp_path, **settings)


def test_the_command_says_how_many_runs_are_done(tmp_path, capsys):
    flags = "--data digits --limit_per_class 5 --validation 0 --model wrn-10-1 --epochs 1 --accelerator cpu"
    command = ["compare", *flags.split(), "--methods", "[single]", "--seeds", "1"]
    assert main([*command, "--out", str(tmp_path / "\x1b[1mout"), "--minutes", "1e-9"]) == 75
    printed = capsys.readouterr()
    assert printed.out == f"1 run, writing to {tmp_path}/\\x1b[1mout\n"
    assert printed.err.endswith(
        "netfission: 0 of 1 run done; the same command goes on after the last whole epoch\n"
    )
