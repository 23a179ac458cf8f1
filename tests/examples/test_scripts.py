import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-W", "error::FutureWarning", str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_loop_of_your_own(tmp_path):
    printed = run("own_loop.py", tmp_path, "--epochs", "3")
    accuracy = float(printed.split("ensemble: ")[1].split(" %")[0])
    assert accuracy > 40  # chance is 10
    assert (tmp_path / "digits-classifier" / "model.safetensors").is_file()


def test_an_image_folder(tmp_path):
    printed = run("image_folder.py", tmp_path, "--epochs", "2")
    assert "exits say" in printed
    assert (tmp_path / "runs" / "image-folder" / "evaluation.json").is_file()


@pytest.mark.parametrize("script", ["own_loop.py", "image_folder.py"])
def test_help_says_what_it_does(script, tmp_path):
    assert "minute" in run(script, tmp_path, "--help")
