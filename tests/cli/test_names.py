"""Names that are not UTF-8, and terminals that lack characters."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from netfission.classifier import Classifier
from netfission.cli import main

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
    assert r"of d\xe4ta" in card
    assert "udc" not in card.lower()


@pytest.mark.skipif(sys.platform == "win32", reason="needs locales as POSIX has them")
def test_no_character_ends_a_command_in_the_c_locale(odd_run):
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    images = os.fsencode(odd_run.parent) + b"/d\xe4ta/test"
    command = [sys.executable, "-m", "netfission", "predict", str(odd_run), images]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"/ros\xe9/\xff0.png  " in done.stdout
