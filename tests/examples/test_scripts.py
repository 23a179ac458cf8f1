import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example with arguments, in an empty folder; what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_loop_of_your_own(run, tmp_path):
    printed = run("own_loop.py", "--epochs", "2")
    accuracy = float(printed.split("ensemble: ")[1].split(" %")[0])
    assert accuracy > 40  # chance is 10
    assert (tmp_path / "digits-classifier" / "model.safetensors").is_file()


def test_an_image_folder(run, tmp_path):
    assert "exits vote" in run("image_folder.py", "--epochs", "1")
    assert (tmp_path / "runs" / "image-folder" / "evaluation.json").is_file()


def test_a_network_that_classifies_pixels(run, tmp_path):
    printed = run("pixels.py", "--epochs", "2")
    assert float(printed.split("pixel_accuracy ")[1].split(",")[0]) > 0.6  # all background: 0.55
    for name in ("classes", "entropy", "mutual-information"):
        assert (tmp_path / "pixels" / f"{name}.png").is_file()
