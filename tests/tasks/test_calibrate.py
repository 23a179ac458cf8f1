"""`netfission calibrate` for labels, numbers and pixels: which images, and what is promised for others."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from netfission.classifier import Predictor
from netfission.cli import main
from netfission.data.files import path_order
from netfission.data.matched import load_matched_targets
from netfission.data.targets import LABELS
from netfission.evaluation.conformal import score_quantile
from netfission.runs.calibrate_targets import calibrate_targets
from netfission.runs.evaluate import evaluate
from netfission.runs.folder import RunFolder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Tables of 40 other images, in another order of columns: labels.csv and numbers.csv."""
    folder = tmp_path_factory.mktemp("elsewhere")
    rng = np.random.default_rng(9)
    labels, numbers = [["path", "green", "new", "red"]], [["path", "other", "blue"]]
    for number in range(40):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)).save(folder / f"{number}.png")
        labels.append([f"{number}.png", number % 2, 1 - number % 2, number // 2 % 2])
        numbers.append([f"{number}.png", number, float(rng.random())])
    for name, rows in (("labels.csv", labels), ("numbers.csv", numbers)):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder


@pytest.fixture
def copy_of(run_of, tmp_path):
    """Task → the folder of a copy of its run."""
    return lambda task: RunFolder(shutil.copytree(run_of(task), tmp_path / task))


def rows_of(table, keep):
    """A table of some rows of another, with full paths."""
    with table.open(newline="") as file:
        header, *rows = csv.reader(file)
    return [header, *([str(table.parent / path), *cells] for path, *cells in rows if keep(cells))]


def write(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def files(folder):
    return folder.calibration.read_bytes(), folder.evaluation.read_bytes()


@pytest.mark.parametrize("task", ["multilabel", "regression", "segmentation"])
def test_the_own_images_give_the_calibration_of_the_training(copy_of, capsys, task):
    folder = copy_of(task)
    before = files(folder)
    folder.calibration.unlink()
    assert main(["calibrate", str(folder.path)]) == 0
    told = capsys.readouterr().out
    assert files(folder) == before
    assert told.startswith("calibrated: ") and "20 validation images\n" in told
    assert "before:" not in told and "wrote calibration.json and evaluation.json" in told


def test_intervals_cover_images_like_those_elsewhere(copy_of, elsewhere, capsys):
    folder, table = copy_of("regression"), elsewhere / "numbers.csv"
    raw = json.loads(folder.evaluation.read_text("utf-8"))["ensemble"]
    assert main(["calibrate", str(folder.path), "--data", str(table)]) == 0
    told = capsys.readouterr().out
    assert "by 40 images of numbers.csv" in told and "before:     standard deviations times" in told
    calibration = folder.load_calibration_of(folder.load_spec(any_task=True))
    assert (calibration.n, calibration.fitted_on, calibration.overlap) == (40, "images of numbers.csv", "")
    predictor = Predictor.from_pretrained(folder.path)
    pixels = torch.stack([predictor.pixels(Image.open(elsewhere / f"{row}.png")) for row in range(40)])
    plain = Predictor(predictor.network, predictor.spec).predict(pixels)
    truth = torch.tensor([[float(row[2])] for row in rows_of(table, lambda cells: True)[1:]])
    errors = ((truth - plain.mean).abs() / plain.std).sort(dim=0).values[:, 0]
    assert calibration.errors[0] == pytest.approx(errors.tolist(), rel=1e-4)
    answer = predictor.predict(pixels, coverage=0.9)
    half = score_quantile(calibration.errors[0], 0.9) * plain.std  # the 37th of 40
    torch.testing.assert_close(answer.intervals[:, 0, 1] - answer.mean[:, 0], half[:, 0])
    inside = (truth[:, 0] >= answer.intervals[:, 0, 0]) & (truth[:, 0] <= answer.intervals[:, 0, 1])
    assert int(inside.sum()) in (36, 37)  # one of them is the end of its interval
    evaluation = json.loads(folder.evaluation.read_text("utf-8"))
    assert evaluation["ensemble"] == pytest.approx(raw) and evaluation["calibrated"]["width"] > 0


def test_files_at_the_calibration_before_are_named(copy_of, elsewhere, capsys):
    folder = copy_of("regression")
    folder.evaluations.mkdir(exist_ok=True)
    for file in (
        folder.evaluations / "other.json",
        folder.window_evaluation,
        folder.out_of_distribution,
        folder.gain,
    ):
        file.write_text("{}")
    named = "still at the calibration before: evaluations, evaluation-windows.json; evaluate again to renew"
    for data, changes in (([], False), (["--data", str(elsewhere / "numbers.csv")], True)):
        assert main(["calibrate", str(folder.path), *data]) == 0
        told = capsys.readouterr().out
        assert (named in told) == changes and f"with the calibration before: {folder.gain}; " in told


def test_targets_are_matched_by_name(elsewhere):
    images = load_matched_targets(str(elsewhere / "labels.csv"), ["red", "green"], (3, 4, 4), LABELS)
    (split,) = images.splits
    order = sorted(range(40), key=lambda row: path_order(f"{row}.png"))
    assert split.labels.tolist() == [[row // 2 % 2, row % 2] for row in order]
    assert split[0][0].shape == (3, 4, 4) and images.kind == "images of labels.csv"


def test_what_the_network_was_trained_on_promises_nothing(copy_of, tables, tmp_path):
    folder = copy_of("regression")
    table = write(tmp_path / "seen.csv", rows_of(tables / "numbers.csv", lambda cells: cells[1] == "train"))
    with pytest.warns(UserWarning, match=r"40 of 40 images of seen.csv .* as images that the network"):
        result = calibrate_targets(folder, folder.load_config(), table, split="all")
    assert result.calibration.errors == [] and "coverage" not in result.evaluation.calibrated
    with pytest.raises(ValueError, match=r"coverage must be left out for this network, .*; 40 of 40"):
        result.calibration.widths(0.5)


def test_nothing_is_measured_on_test_images_that_it_is_calibrated_on(copy_of, tables, tmp_path):
    folder = copy_of("regression")
    table = write(tmp_path / "mine.csv", rows_of(tables / "numbers.csv", lambda cells: cells[1] == "test"))
    result = calibrate_targets(folder, folder.load_config(), table)
    assert result.unmeasured.startswith("it is calibrated on test images of its own; 20 of 20 images")
    assert result.evaluation.calibrated is None and result.calibration.overlap == result.unmeasured
    kept = files(folder)
    with pytest.warns(UserWarning, match="no calibrated figures: it is calibrated on test images of its own"):
        evaluate(folder, folder.load_config())
    assert files(folder) == kept


def test_what_cannot_be_calibrated_on_is_refused_in_one_line(run_of, elsewhere, capsys):
    labels, numbers = (str(elsewhere / name) for name in ("labels.csv", "numbers.csv"))
    for task, arguments, message in (
        ("regression", ["--data", labels], "labels.csv without blue"),
        ("regression", ["--data", numbers, "--split", "test"], "split must be one of all"),
        ("segmentation", ["--data", str(elsewhere)], "must be a folder with SPLIT/images and SPLIT/masks"),
    ):
        assert main(["calibrate", str(run_of(task)), *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
