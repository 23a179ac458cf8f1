import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from netfission.data.targets import read_labels, read_numbers

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


def test_tables_of_labels_and_of_a_share(run, tmp_path):
    for split, rows in (("train", [0, 0, 1, 3]), ("test", [1, 2, 2, 3])):
        for kind, pixels in (
            ("images", np.zeros((2, 2, 3), np.uint8)),
            ("masks", np.uint8([rows[:2], rows[2:]])),
        ):
            file = tmp_path / "scenes" / split / kind / "a.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    run("write_target_tables.py", "scenes", "tables", "--classes", "sky", "road", "car", "--share", "road")
    labels, shares = read_labels(tmp_path / "tables/labels.csv"), read_numbers(tmp_path / "tables/road.csv")
    assert labels.names == ["sky", "road", "car"]
    assert {row.split: row.label for row in labels.rows} == {"train": "1 1 0", "test": "0 1 1"}
    assert {row.split: row.label for row in shares.rows} == {"train": "0.25", "test": "0.25"}
    (tmp_path / "scenes/test/masks/a.png").unlink()
    with pytest.raises(SystemExit, match="has no mask"):
        run("write_target_tables.py", "scenes", "tables", "--classes", "sky", "road")


def test_a_network_that_classifies_pixels(run, tmp_path):
    printed = run("pixels.py", "--epochs", "2")
    assert float(printed.split("pixel_accuracy ")[1].split(",")[0]) > 0.6  # all background: 0.55
    for name in ("classes", "entropy", "mutual-information"):
        assert (tmp_path / "pixels" / f"{name}.png").is_file()


def test_a_network_that_classifies_the_pixels_of_few_photographs(run, tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 1)):
        for number in range(count):
            mask = random.integers(0, 2, (16, 16), np.uint8)
            for kind, pixels in (("images", 200 * mask), ("masks", mask)):
                file = tmp_path / "few" / split / kind / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
    assert "pixel_accuracy" in run("pixels.py", "few", "--epochs", "1")
