"""`make matrix` tells what failed where."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import matrix

TESTS = """
import os, pytest
def test_passes(): assert os.environ.get("TZ") == "Pacific/Chatham"
def test_fails(): assert not os.environ.get("TZ")
@pytest.mark.skip
def test_skipped(): pass
"""


@pytest.fixture
def tests(tmp_path):
    path = tmp_path / "test_few.py"
    path.write_text(TESTS)
    return str(path)


def test_a_row_has_its_surroundings_and_names_what_fails(tests, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(
        matrix, "_output", lambda *command: {"git": "abc"}.get(command[0], '{"python": "3", "torch": "2"}')
    )
    arguments = ["--rows", "time-zone", "--processes", "0", "--out", str(tmp_path / "matrix.json"), tests]
    assert matrix.main(arguments) == 1
    row = json.loads((tmp_path / "matrix.json").read_text("utf-8"))["time-zone"]
    assert (row["passed"], row["skipped"], row["commit"]) == (1, 1, "abc")
    (failed,) = row["failed"]
    assert failed.endswith("::test_fails")
    assert "time-zone       3        2       1        1       1" in capsys.readouterr().out

    def never(*arguments, **options):
        raise AssertionError("a row that is done is run again")

    monkeypatch.setattr(subprocess, "run", never)
    assert matrix.main(arguments) == 1


def test_a_python_that_is_missing_is_named(tests, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setitem(matrix.ROWS, "python-3.12", matrix.Row(python="3.99"))
    with pytest.raises(
        ValueError, match=r"^rows must be those whose Python is on the path, got no python3\.99"
    ):
        matrix._run("python-3.12", matrix.ROWS["python-3.12"], [tests], keep=False)
