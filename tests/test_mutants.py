"""`make mutants` changes copies alone, and knows a test that fails from one that passes."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import mutants

SOURCE = b'''"""No change in a docstring: 1 < 2."""
def f(x: int | None, y=True):  # \xc3\xa9
    if x < 1 and not y:
        raise ValueError(f"{x + 1}")
    x.list[0] = max(x, y)
    return [a for a in g(x, -1) if a] or None
'''


def test_changes_of_each_kind():
    found = mutants.mutants_of("f.py", SOURCE)
    changed = {(mutant.operator, mutant.before, mutant.after) for mutant in found}
    assert changed == {
        ("constant", "True", "(False)"),
        ("condition", "x < 1 and not y", "(not (x < 1 and (not y)))"),
        ("boolean", "x < 1 and not y", "(x < 1 or not y)"),
        ("comparison", "x < 1", "(x <= 1)"),
        ("constant", "1", "(2)"),
        ("constant", "1", "(0)"),
        ("unary", "not y", "(y)"),
        ("statement", 'raise ValueError(f"{x + 1}")', "pass"),
        ("statement", "x.list[0] = max(x, y)", "pass"),
        ("constant", "0", "(1)"),
        ("constant", "0", "(-1)"),
        ("opposite", "max(x, y)", "(min(x, y))"),
        ("return", "return [a for a in g(x, -1) if a] or None", "return None"),
        ("boolean", "[a for a in g(x, -1) if a] or None", "([a for a in g(x, -1) if a] and None)"),
        ("arguments", "g(x, -1)", "(g(-1, x))"),
        ("unary", "-1", "(1)"),
        ("condition", "a", "(not a)"),
    }
    for mutant in found:
        compile(mutant.apply(SOURCE), "f.py", "exec")
        assert mutant.line == SOURCE[: mutant.start].count(b"\n") + 1
    assert len({mutant.key for mutant in found}) == len(found)


def test_a_larger_sample_adds_to_a_smaller_one_and_depends_on_no_lines_elsewhere():
    found = mutants.mutants_of("f.py", SOURCE)
    few, more = mutants.sample(found, 5, 0), mutants.sample(found, 9, 0)
    assert more[:5] == few != mutants.sample(found, 5, 1)
    moved = mutants.mutants_of("f.py", b"import os\n\nZERO = 'o'\n" + SOURCE)
    assert [mutant.key for mutant in mutants.sample(moved, 9, 0)] == [mutant.key for mutant in more]


def test_tests_of_a_line():
    (mutant,) = [
        found for found in mutants.mutants_of("a/b.py", b"\n\nx = (\n  1 < y)\n") if "<" in found.after
    ]
    reached = {
        "tests/c/test_long.py::t": {"seconds": 3, "lines": {"a/b.py": [2, 3]}},
        "tests/c/test_other.py::t": {"seconds": 1, "lines": {"a/b.py": [2, 9]}},
        "tests/c/test_short.py::t": {"seconds": 1, "lines": {"a/b.py": [3]}},
        "tests/a/test_near.py::t": {"seconds": 4, "lines": {"a/b.py": [3]}},
        "tests/c/test_b.py::t": {"seconds": 5, "lines": {"a/b.py": [3]}},
        "tests/c/test_other.py::second": {"seconds": 1, "lines": {"a/b.py": [3]}},
        "tests/c/test_other.py::first": {"seconds": 0.5, "lines": {"a/b.py": [3]}},
        "tests/c/test_elsewhere.py::t": {"seconds": 1, "lines": {"a/c.py": [3]}},
    }
    names = [name.partition("/test_")[2] for name, _ in mutants.tests_of(mutant, reached)]
    assert names == [
        "b.py::t",
        "near.py::t",
        "other.py::first",
        "short.py::t",
        "long.py::t",
        "other.py::second",
    ]
    on_import, *_ = mutants.mutants_of("a/b.py", b"x = 1\n")
    assert len(mutants.tests_of(on_import, reached)) == 7
    assert mutants.tests_of(mutant, {}) == []


TESTS = """
from netfission.thing import square
def test_of_two(): assert square(2) == 4
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package of one function whose test lets a mutant live, as 2² = 2 · 2."""
    package = tmp_path / "src" / "netfission"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "thing.py").write_text("def square(x):\n    return x**2\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_thing.py").write_text(TESTS)
    (tmp_path / "pytest.ini").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "KEPT", tmp_path / ".mutants" / "reached.json")
    monkeypatch.setattr(mutants, "HEAVY", ())
    test = {"seconds": 0.01, "lines": {"thing.py": [2]}}
    files = {"tests/test_thing.py": {"state": mutants._digest(TESTS.encode()), "tests": {}}}
    files["tests/test_thing.py"]["tests"]["tests/test_thing.py::test_of_two"] = test
    mutants.KEPT.parent.mkdir()
    mutants.KEPT.write_text(json.dumps({"state": mutants.code_state(), "files": files}))
    return package / "thing.py"


def test_mutants_are_tried_on_a_copy_and_a_survivor_is_open_until_it_has_a_reason(
    project, tmp_path, capsys, monkeypatch
):
    source, out = project.read_text("utf-8"), tmp_path / "out.json"
    arguments = ["--sources", "thing.py", "--tests", "tests", "--out", str(out)]
    assert mutants.main(arguments) == 1
    assert project.read_text("utf-8") == source
    content = json.loads(out.read_text("utf-8"))
    outcomes = {record["after"]: record["outcome"] for record in content["mutants"]}
    dead = dict.fromkeys(["(3)", "(1)", "return None"], "killed")
    assert outcomes == {"(x * 2)": "survived", **dead}
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "3 of 4 killed, 0 others change nothing that matters",
        "survived: thing.py:2 x**2 → (x * 2)",
    ]
    (survivor,) = [record for record in content["mutants"] if record["outcome"] == "survived"]
    survivor["reason"] = "two is the only number"
    out.write_text(json.dumps(content))
    monkeypatch.setattr(mutants, "try_mutant", None)  # none is tried again
    assert mutants.main(arguments) == 0


def test_tests_that_cannot_run_are_no_death_of_a_mutant(project, tmp_path, capsys):
    kept = mutants.KEPT.read_text("utf-8")
    mutants.KEPT.write_text(kept.replace("::test_of_two", "::test_of_three"))
    out = tmp_path / "out.json"
    assert (
        mutants.main(["--sources", "thing.py", "--tests", "tests", "--sample", "1", "--out", str(out)]) == 1
    )
    assert json.loads(out.read_text("utf-8"))["mutants"][0]["outcome"] == "error"


def test_work_in_a_process_of_its_own_is_bounded(tmp_path):
    log = tmp_path / "log"
    assert mutants.in_process(lambda: [1, "a"], 60, log) == ("done", [1, "a"])
    assert mutants.in_process(lambda: time.sleep(60), 0.1, log) == ("timeout", None)
    assert mutants.in_process(lambda: 1 // 0, 60, log) == ("error", None)
    assert "ZeroDivisionError" in log.read_text("utf-8")
    assert mutants.in_process(lambda: os.kill(os.getpid(), signal.SIGKILL), 60, log) == ("crash", None)
