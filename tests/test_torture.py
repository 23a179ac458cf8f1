"""`make torture` tells whole results from others."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import torture

# Writes a file in two steps: at once under its name, or whole under another name first.
WRITERS = {
    "half": "file = open(path, 'x'); file.write('a'); file.flush(); time.sleep({wait}); file.write('b')",
    "whole": "time.sleep({wait}); open(path + '.new', 'w').write('ab'); os.rename(path + '.new', path)",
}


@pytest.mark.parametrize(("writer", "identical"), [("half", False), ("whole", True)])
def test_a_command_that_leaves_something_else_when_killed_is_found(writer, identical, monkeypatch, tmp_path):
    waits = iter([9, 0, 0, 0])

    def start(flags, log):
        code = "import os, sys, time; path = sys.argv[1] + '/out'; " + WRITERS[writer]
        code = code.replace("{wait}", str(next(waits)))
        with log.open("a") as errors:
            call = [sys.executable, "-S", "-c", code, *flags]
            process = subprocess.Popen(call, start_new_session=True, stderr=errors)
        while writer == "half" and process.poll() is None and not Path(flags[0], "out").exists():
            time.sleep(0.01)  # killed sooner, it would leave nothing
        return process

    monkeypatch.setattr(torture, "start", start)
    monkeypatch.setattr(torture.random.Random, "choice", lambda _, options: options[0])
    command = torture.Command(lambda folder: [str(folder)], lambda folder: torture.results_in(folder, "out"))
    monkeypatch.setitem(torture.COMMANDS, "write", command)
    expected = {"out": torture.digest(b"ab")}
    trial = torture.kill_trial("write", 0, (expected, 0.5), tmp_path)
    assert [kill["status"] for kill in trial["kills"]] == [-signal.SIGKILL]
    assert trial["identical"] is identical


def test_damaged_files_of_a_finished_run_are_refused_or_harmless(finished_run, tmp_path):
    source = Path(shutil.copytree(finished_run, tmp_path / "run"))
    Image.linear_gradient("L").resize((8, 8)).save(tmp_path / "image.png")
    expected = torture.whole(torture.read_finished, source)
    assert {"predictions", "model.safetensors", "evaluation.json"} <= expected.keys()
    for seed in range(4):
        assert torture.damage_trial("finished", seed, source, expected)["outcome"] in torture.GOOD
    other = expected | {"predictions": "of other weights"}  # as if nothing had noticed the damage
    undamaged = torture.read_finished(source)
    assert torture.outcome(*undamaged, other) == "taken silently"
    assert torture.outcome(*undamaged, expected) == "without effect"


def test_outcomes():
    line = "netfission: x must be whole, got half\n"
    assert torture.outcome(2, line, {}, {}) == "refused"
    assert torture.outcome(2, "netfission: x must be of warnings, got none\n", {}, {}) == "refused"
    for said in (line + line, line + "Traceback\n", ""):
        assert torture.outcome(2, said, {}, {}) == "refused badly"
    warning = "netfission: warning: goes on from the one before\n"
    assert torture.outcome(0, warning, {"a": "1"}, {"a": "1"}) == "fell back"


def test_finished_trials_are_not_repeated(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out.json"
    kills = [{"command": "train", "seed": 0, "identical": True, "kills": []}]
    damage = [{"run": "finished", "seed": 0, "outcome": "taken silently"}]
    out.write_text(json.dumps({"kills": kills, "damage": damage}))
    monkeypatch.setattr(torture, "make_runs", lambda place: {"finished": place})
    assert torture.main(["--kills", "1", "--damage", "1", "--out", str(out)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["kills: 1 of 1 ended in the same bits", "damage: 1 of 1 taken silently"]
