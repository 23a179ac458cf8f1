"""Names that are not UTF-8, and terminals that lack characters."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from netfission.classifier import Classifier
from netfission.cli import main
from netfission.tasks.evaluation import TargetEvaluation

TRAIN = [
    "train",
    "--model",
    "wrn-10-1",
    "--exits",
    "2",
    "--epochs",
    "1",
    "--batch-size",
    "8",
    "--accelerator",
    "cpu",
    "--validation",
    "0.2",
]


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    """The folder of a run on images whose file, class and data set have names that are not UTF-8."""
    folder = tmp_path_factory.mktemp("odd")
    images = os.fsencode(folder) + b"/d\xe4ta"
    for split, count in ((b"train", 20), (b"test", 6)):
        for label, name in enumerate((b"cat", b"ros\xe9")):
            Path(os.fsdecode(images + b"/" + split + b"/" + name)).mkdir(parents=True)
            for index in range(count):
                file = images + b"/%s/%s/\xff%d.png" % (split, name, index)
                Image.new("RGB", (8, 8), (200 * label, index, 99)).save(os.fsdecode(file))
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        patch.chdir(folder)
        assert main([*TRAIN, "--data", os.fsdecode(images), "--out", "run"]) == 0
    text = output.buffer.getvalue().decode("ascii")
    output.detach()
    assert "->" in text
    assert r"d\xe4ta" in text
    return folder / "run"


def test_a_class_is_named_by_text_and_its_run_is_used_as_any_other(odd_run, capsys):
    assert Classifier.from_pretrained(odd_run).spec.classes == ["cat", r"ros\xe9"]
    assert json.loads((odd_run / "config.json").read_text(encoding="utf-8"))["classes"][1] == r"ros\xe9"
    data = os.fsdecode(os.fsencode(odd_run.parent) + b"/d\xe4ta")
    for command in (["evaluate"], ["report"], [*TRAIN, "--data", data, "--resume", "--out"]):
        assert main([*command, str(odd_run)]) == 0, capsys.readouterr().err
    page = (odd_run / "report.html").read_text(encoding="utf-8")
    assert r"of d\xe4ta" in page
    assert r"ros\xe9" in page
    assert "udc" not in page


def test_a_model_card_of_such_names_is_text(odd_run, tmp_path):
    Classifier.from_pretrained(odd_run).save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert r"of d\\xe4ta" in card  # in Markdown, two backslashes stand for one
    assert "udc" not in card.lower()


HOSTILE = ["=1+1", "\x1b[31mred", "<img src=x onerror=alert(1)> | *a* `b` $c$"]


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    """The folder of a run whose classes and data set have names that a program could take for commands."""
    data = tmp_path_factory.mktemp("hostile") / "\x1b]0;data\x07"
    for split, count in (("train", 20), ("test", 6)):
        for label, name in enumerate(HOSTILE):
            (data / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (8, 8), (80 * label, index, 99)).save(data / split / name / f"{index}.png")
    output, run = io.StringIO(), data.parent / "\x1b[1mrun"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        patch.setattr(sys, "stderr", output)
        assert main([*TRAIN, "--data", str(data), "--out", str(run)]) == 0
    assert "\x1b" not in output.getvalue()
    assert r"\x1b]0;data\x07" in output.getvalue()
    assert r"\x1b[1mrun" in output.getvalue()
    return run


def test_names_are_no_commands_on_a_page_and_in_figures(hostile_run, capsys):
    assert main(["report", str(hostile_run)]) == 0
    assert "\x1b" not in "".join(capsys.readouterr())
    page = (hostile_run / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in page
    assert "<img src=x" not in page
    figures = list((hostile_run / "report").glob("*.svg"))
    assert any(
        r"\x1b[31mred" in "".join(ElementTree.parse(figure).getroot().itertext()) for figure in figures
    )


def test_names_are_no_commands_in_tables(hostile_run, capsys):
    images = str(hostile_run.parent / "\x1b]0;data\x07" / "test")
    assert main(["predict", str(hostile_run), images]) == 0
    assert main(["predict", str(hostile_run), images, "--out", str(hostile_run / "\x1b.csv")]) == 0
    assert main(["evaluate", str(hostile_run)]) == 0
    assert "\x1b" not in "".join(capsys.readouterr())
    assert main(["predict", str(hostile_run), images, "--format", "csv", "--probabilities"]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    cells = [cell for row in rows for cell in row]
    assert "p_=1+1" in cells
    assert not any(cell[:1] in ("=", "+", "-", "@") for cell in cells)


def test_names_of_targets_are_no_commands_in_their_figures():
    by_target = {name: {"mae": 0.5} for name in HOSTILE}
    evaluation = TargetEvaluation(4, "logits", [{"mae": 0.5}], {"mae": 0.5}, by_target, {})
    assert all(line.isprintable() for line in evaluation.table().splitlines())


def test_names_are_no_commands_in_a_model_card(hostile_run, tmp_path):
    Classifier.from_pretrained(hostile_run).save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "\x1b" not in card
    assert r"\<img src=x onerror=alert(1)\> \| \*a\* \`b\` \$c\$" in card


@pytest.mark.skipif(sys.platform == "win32", reason="needs locales as POSIX has them")
def test_no_character_ends_a_command_in_the_c_locale(odd_run):
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    images = os.fsencode(odd_run.parent) + b"/d\xe4ta/test"
    command = [sys.executable, "-m", "netfission", "predict", str(odd_run), images]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"/ros\xe9/\xff0.png  " in done.stdout
