"""Photographs of any size, window by window: the maps, the measures, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from netfission.classifier import Predictor
from netfission.cli import main
from netfission.data.mask_folders import VOID
from netfission.ensemble import ensemble_log_probabilities
from netfission.evaluation.pixels import PixelScores
from netfission.prediction.images import Failure
from netfission.prediction.targets import predict_windows
from netfission.runs.folder import RunFolder
from netfission.runs.windows import evaluate_windows


@pytest.fixture(scope="module")
def predictor(run_of):
    return Predictor.from_pretrained(run_of("segmentation"))


def photograph(tables, size):
    with Image.open(tables / "61.png") as image:
        return image.resize(size[::-1])


def test_one_window_writes_the_same_files(run_of, tables, tmp_path):
    command = ["predict", str(run_of("segmentation")), str(tables / "61.png"), "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert main([*command, str(tmp_path / "windows"), "--window", "8x8"]) == 0
    files = {
        folder: {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}
        for folder in ("whole", "windows")
    }
    assert files["whole"] == files["windows"] and len(files["whole"]) == 3


def test_maps_are_those_of_the_mean_of_logits(predictor, tables):
    """Of a photograph of two windows side by side, whose weights are equal in the middle by symmetry."""
    pixels = predictor.own_pixels(photograph(tables, (8, 15)))
    calls = []
    found = predictor.predict_windows(
        pixels, predictor.windows(overlap=0), progress=lambda done, total: calls.append((done, total))
    )
    halves = predictor.logits(torch.stack([pixels[:, :, :8], pixels[:, :, 7:]]))
    middle = (halves[0, ..., 7] + halves[1, ..., 0]) / 2
    logits = torch.cat([halves[0, ..., :7], middle[..., None], halves[1, ..., 1:]], dim=-1)[None]
    whole = predictor.interpret(logits)
    assert calls == [(2, 2)]
    assert np.array_equal(np.array(found.class_map), np.array(whole.class_map(0)))
    assert np.array_equal(np.array(found.uncertainty_map), np.array(whole.uncertainty_map(0)))
    assert found.class_map.getpalette() == whole.class_map(0).getpalette()
    (record,) = whole.records()
    assert found.record["shares"] == pytest.approx(record["shares"])
    assert found.record["entropy"] == pytest.approx(record["entropy"], rel=1e-5)


def test_strips_make_a_whole_photograph(predictor, tables):
    """Rows of windows are joined without a gap, and means are over all of their pixels."""
    pixels = predictor.own_pixels(photograph(tables, (21, 10)))
    windows = predictor.windows((8, 8), 0.5)
    found = predictor.predict_windows(pixels, windows, batch_size=1)
    logits = torch.cat(list(predictor.strips(pixels, windows)), dim=-2)
    whole = predictor.interpret(logits)
    assert found.class_map.size == (10, 21)
    assert np.array_equal(np.array(found.class_map), np.array(whole.class_map(0)))
    assert np.array_equal(np.array(found.uncertainty_map), np.array(whole.uncertainty_map(0)))
    for name, value in whole.records()[0].items():
        assert found.record[name] == pytest.approx(value, rel=1e-5), name


def test_a_photograph_that_cannot_be_read_does_not_end_the_others(predictor, tables, tmp_path):
    images = [tmp_path / "none.png", Failure(tmp_path / "empty", "no image"), tables / "61.png"]
    missing, empty, found = predict_windows(predictor, images, predictor.windows())
    assert missing.error == "no such file or directory" and empty.error == "no image"
    assert sum(found.record["shares"].values()) == pytest.approx(1) and found.maps == {}


def test_measures_of_one_window_are_those_of_the_run(run_of, tmp_path, capsys):
    folder = RunFolder(shutil.copytree(run_of("segmentation"), tmp_path / "run"))
    before = folder.evaluation.read_bytes()
    assert main(["evaluate", str(folder.path), "--window", "8x8"]) == 0
    shown = capsys.readouterr().out
    assert "20 windows of 8×8, overlap 0.25\nscaled to 8×8: mIoU" in shown
    found, known = (
        folder.load_window_evaluation(),
        folder.load_target_evaluation(folder.load_spec(any_task=True)),
    )
    assert folder.evaluation.read_bytes() == before and found.evaluation.n == known.n == 20
    assert found.evaluation.ensemble == pytest.approx(known.ensemble)
    assert found.evaluation.calibrated == pytest.approx(known.calibrated)
    assert found.scaled == pytest.approx(known.calibrated, rel=1e-3)
    assert (found.window, found.windows, found.shape) == ([8, 8], 20, [8, 8])
    assert json.loads(folder.window_evaluation.read_text("utf-8"))["weights"] == folder.weights_sha256()


def test_photographs_are_measured_in_their_own_size(run_of, settings_for, predictor, tables, tmp_path):
    """The run's photographs and masks are enlarged, and one is larger than the others."""
    run = RunFolder(shutil.copytree(run_of("segmentation"), tmp_path / "run"))
    data = Path(shutil.copytree(tables / "masks", tmp_path / "masks"))
    for file in data.glob("*/*/*.png"):
        factor = 4 if (file.parts[-3], file.stem) == ("test", "61") else 2
        with Image.open(file) as image:
            image.resize((8 * factor, 8 * factor), Image.Resampling.NEAREST).save(file)
    config = settings_for("segmentation", data=str(data), image_size=8)
    found = evaluate_windows(run, config, (8, 8), 0)
    assert (found.windows, found.evaluation.n) == (19 * 4 + 16, 20)
    scores = PixelScores(3, VOID)
    windows, (_, photographs) = predictor.windows(overlap=0), predictor.task.load_unscaled(config.data, 0)
    for number in range(20):
        pixels, mask = photographs[number]
        logits = torch.cat(list(predictor.strips(pixels, windows)), dim=-2)
        scores.add(ensemble_log_probabilities(logits, predictor.spec.average), mask[None])
    assert found.evaluation.ensemble == pytest.approx(scores.result())
    scaled = run.load_target_evaluation(run.load_spec(any_task=True)).calibrated
    assert found.scaled["mean_iou"] == pytest.approx(scaled["mean_iou"], abs=0.1)  # up to interpolation


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("segmentation", "--window 8", "--window must be a height and a width in pixels, such as 180x240"),
        ("segmentation", "--window 0x8", "--window must be a height and a width in pixels"),
        ("segmentation", "--window 8x8 --overlap 1", "--overlap must be a share in [0, 1), got 1.0"),
        ("segmentation", "--overlap 0.5", "--overlap must be left out unless --window is given, got 0.5"),
        ("multilabel", "--window 8x8", "--window must be left out for a run of task=multilabel, got '8x8'"),
    ],
)
def test_bad_requests_end_in_one_line(run_of, tables, capsys, command, task, flags, message):
    images = [str(tables / "61.png")] if command == "predict" else []
    assert main([command, str(run_of(task)), *images, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_windows_are_of_the_own_test_split(run_of, tables, capsys):
    other = str(tables / "masks" / "test")
    assert main(["evaluate", str(run_of("segmentation")), "--window", "8x8", "--data", other]) == 2
    assert "--window must be left out if --data is another data set" in capsys.readouterr().err


class Choosy(nn.Module):
    """Takes heights of 8 alone, and gives maps of half the width."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        if images.shape[2] != 8:
            raise RuntimeError("heights must be 8\nor so")
        return images[:, None, :, :, ::2]


def test_windows_that_the_network_does_not_take_are_refused(run_of):
    predictor = Predictor.from_pretrained(run_of("segmentation"))
    predictor.network = Choosy()
    model = re.escape(predictor.spec.model)
    expected = rf"^window must be a size that {model} accepts, got 4×8 \(heights must be 8\)$"
    with pytest.raises(ValueError, match=expected):
        predictor.windows((4, 8))
    with pytest.raises(ValueError, match=r"got 8×8 \(its maps are 8×4\)$"):
        predictor.windows((8, 8))


def test_python_refuses_what_has_no_maps_and_other_pixels(run_of, predictor):
    labels = Predictor.from_pretrained(run_of("multilabel"))
    with pytest.raises(ValueError, match=r"^window must be left out for a run of task=multilabel, got None$"):
        labels.windows()
    with pytest.raises(ValueError, match=r"^pixels must be uint8 of shape \(3, height, width\)"):
        predictor.predict_windows(torch.zeros(3, 8, 8), predictor.windows())


def test_the_file_is_checked_as_all_others(run_of, tmp_path):
    folder = RunFolder(shutil.copytree(run_of("segmentation"), tmp_path / "run"))
    assert folder.load_window_evaluation() is None
    folder.window_evaluation.write_text(json.dumps({"window": 3}))
    with pytest.raises(ValueError, match=r"evaluation-windows\.json"):
        folder.load_window_evaluation()
