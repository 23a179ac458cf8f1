"""Reports of labels, numbers and maps of pixels: what is shown, and from which images."""

import base64
import io
import json
import re
import shutil
from dataclasses import asdict, replace
from html import unescape
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from netfission.cli import main
from netfission.data.mask_folders import VOID
from netfission.ensemble import ensemble_log_probabilities
from netfission.evaluation.cascade import CascadeEvaluation, Point
from netfission.evaluation.out_of_distribution import Detection, OutOfDistribution
from netfission.evaluation.pixels import PixelScores
from netfission.inference.thresholds import CascadeChoice
from netfission.report import write_report
from netfission.report.figures import draw
from netfission.report.style import render_svg
from netfission.tasks.evaluation import TargetEvaluation
from netfission.tasks.figures import (
    Bars,
    ConfidenceBins,
    Coverage,
    Inspection,
    Reliability,
    Scatter,
    lowest,
)
from netfission.tasks.multilabel import LabelCalibration, Multilabel
from netfission.tasks.regression import NumberCalibration, Regression
from netfission.tasks.segmentation import PixelCalibration, Segmentation
from netfission.tasks.window_evaluation import WindowEvaluation
from netfission.utils.checksums import parse_json, stamp_json

FIGURES = {
    "multilabel": {"average-precision", "reliability", "reliability-scaled"},
    "regression": {"predicted-1", "coverage"},
    "segmentation": {"iou", "reliability", "reliability-scaled"},
}
OF_ALL = {"quality-cost", "learning", "likelihood", "network"}


class Images:
    """Outputs and targets, in batches of two, as if a network ran on images."""

    def __init__(self, outputs, targets):
        self.outputs, self.targets = outputs, targets

    def batches(self):
        yield from zip(self.outputs.split(2), self.targets.split(2), strict=True)

    def row(self, number):
        return 10 * number

    def one(self, number):
        pixels = torch.full((1, 3, 4, 6), number, dtype=torch.uint8)
        return pixels, self.outputs[[number]], self.targets[[number]]


@pytest.fixture
def blank_figures(monkeypatch):
    """Figures without content: drawing takes most of the time."""
    blank = render_svg(lambda: Figure((1, 1)))
    monkeypatch.setattr("netfission.report.plots.render_svg", lambda draw: blank)


@pytest.fixture
def copy_of(run_of, tmp_path):
    """Task → a copy of its run."""
    return lambda task: shutil.copytree(run_of(task), tmp_path / f"{task} <1>")


def text_of(page):
    without = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", without)).split())


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("task", FIGURES)
def test_a_page_has_all_measures_and_needs_nothing_beside_it(copy_of, capsys, task):
    run = copy_of(task)
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)|<script|<link rel=\"stylesheet", page)
    links = set(re.findall(r'(?:href|src)="([^"]*)"', re.sub(r"<svg\b.*?</svg>", "", page, flags=re.DOTALL)))
    figures = {unquote(link) for link in links if not link.startswith(("#", "data:"))}
    assert figures == {f"report/{name}.svg" for name in FIGURES[task] | OF_ALL}
    assert {path.name for path in (run / "report").iterdir()} == {name[7:] for name in figures}
    anchors = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(anchors)) == len(anchors) and {link[1:] for link in links if link[0] == "#"} <= {*anchors}
    text = text_of(page)
    evaluation = json.loads((run / "evaluation.json").read_text("utf-8"))
    for measures in (*evaluation["exits"], evaluation["ensemble"], evaluation["calibrated"]):
        assert f"{measures['nll']:.4f}".replace("-", "−") in text
    assert "20 test images of" in text and "20 validation images" in text and f"{task} <1>" in text
    assert re.findall("netfission evaluate [^.]*--cascade", text) and text.count("netfission evaluate") == 2
    assert f"netfission evaluate '{run}' --ood DATA" in text


@pytest.mark.usefixtures("blank_figures")
def test_photographs_stand_beside_their_masks_and_maps(run_of, tables, tmp_path):
    page = write_report([run_of("segmentation")], tmp_path / "page.html").read_text(encoding="utf-8")
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(content)))
        for content in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    ]
    assert len(pictures) == 5 * 4 and {picture.size for picture in pictures} == {(8, 8)}
    rows = [int(number) - 1 for number in re.findall(r"test image (\d+)<", page)]
    masks = sorted((tables / "masks" / "test" / "masks").iterdir())
    told = [float(share) for share in re.findall(r": ([\d.]+)\u00a0% of the pixels are right", page)]
    assert told == sorted(told) and len(told) == len(rows) == 5
    for row, share, start in zip(rows, told, range(0, 20, 4), strict=True):
        photograph, mask, predicted, uncertainty = pictures[start : start + 4]
        truth = np.asarray(Image.open(masks[row]))
        photograph_file = tables / "masks" / "test" / "images" / masks[row].name
        assert (np.asarray(photograph) == np.asarray(Image.open(photograph_file))).all()
        assert (np.asarray(mask) == truth).all() and uncertainty.mode == "L"
        right = (np.asarray(predicted) == truth)[truth != VOID].mean()
        assert share == pytest.approx(100 * right, abs=0.051)
    assert all(name in page for name in ("#800000", "void", ">ground<"))


@pytest.mark.usefixtures("blank_figures")
def test_a_page_without_photographs_says_why(run_of, tmp_path, monkeypatch):
    why = "None of 3 test images has a labelled pixel."
    monkeypatch.setattr(Segmentation, "inspect", lambda *_, **__: Inspection(without=why))
    text = text_of(write_report([run_of("segmentation")], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert why in text and "predicted correctly" not in text


@pytest.mark.usefixtures("blank_figures")
def test_what_a_run_lacks_is_named(copy_of, tables):
    run = copy_of("regression")
    for name in ("evaluation.json", "calibration.json", "metrics.csv"):
        (run / name).unlink()
    config = (run / "config.yaml").read_text("utf-8")
    config = re.sub(r"\n# checksum: .*", "", config).replace(str(tables), str(tables / "elsewhere"))
    (run / "config.yaml").write_text(config)
    text = text_of(write_report([run]).read_text(encoding="utf-8"))
    assert f"netfission evaluate '{run}'" in text
    assert "was trained without validation images" in text and "metrics.csv" in text
    assert f"netfission report '{run}' --data FOLDER" in text
    again = text_of(write_report([run], data=str(tables / "numbers.csv")).read_text(encoding="utf-8"))
    assert "--data FOLDER" not in again and "standard deviations off" in again


@pytest.mark.usefixtures("blank_figures")
def test_early_exit_is_shown_with_its_measure_and_its_parts(copy_of):
    run = copy_of("segmentation")
    points = [
        Point("full ensemble", "ensemble", 0.97, 0.97, 0.31),
        Point("chosen", "chosen", 0.6, 0.6, 0.3, 0.001, 0.002, thresholds=(0.5,)),
    ]
    choice = CascadeChoice((0.5,), 0.31, 0.31, 0.6)
    cascade = CascadeEvaluation("certainty", (0, 1), 0.2, None, choice, 0.312, 20, 20, {1: 2}, points)
    for tile, told in ((None, "an image stops once its certainty"), (4, "a tile of 4×4 pixels stops once")):
        found = replace(cascade, measure="mIoU", tile=tile)
        (run / "cascade.json").write_text(stamp_json(json.dumps(asdict(found))))
        text = text_of(write_report([run]).read_text(encoding="utf-8"))
        assert "chosen to lose at most 0.2 percentage points of mIoU needs 0.600×" in text
        assert told in text and "mIoU is measured on 20 test images" in text and "--cascade" not in text
        assert (run / "report" / "cascade.svg").is_file()


@pytest.mark.usefixtures("blank_figures")
def test_out_of_distribution_images_and_photographs_in_their_own_sizes_are_shown(copy_of):
    run = copy_of("segmentation")
    scores = {"entropy": Detection(0.8765, 0.5, 0.25)}
    detected = [OutOfDistribution("/some/where/moon", 20, 50, 1.0, scores)]
    (run / "ood.json").write_text(json.dumps(detected, default=asdict))
    measured = TargetEvaluation(20, "logits", [], {"mean_iou": 0.61, "nll": 0.5}, {}, {})
    windows = WindowEvaluation([90, 120], 0.25, 360, measured, [8, 8], {"mean_iou": 0.4})
    (run / "evaluation-windows.json").write_text(stamp_json(windows.to_json()))
    text = text_of(write_report([run]).read_text(encoding="utf-8"))
    assert "moon 50 entropy 87.65 50.00 25.00" in text and "from 20 test images" in text
    assert "windows of 90×120 61.00 0.5000 scaled to 8×8 40.00 –" in text and "by 360 windows" in text
    assert "--ood" not in text and "/some/where" not in text


@pytest.mark.usefixtures("blank_figures")
def test_a_measure_that_is_better_if_lower_is_said_to_be_so(run_of, tmp_path, monkeypatch):
    monkeypatch.setattr(Regression, "headline_note", "mean of 3 numbers")
    for task, times in (("regression", 3), ("multilabel", 1)):  # each has a figure of the NLL
        text = text_of(write_report([run_of(task)], tmp_path / "page.html").read_text(encoding="utf-8"))
        assert text.count("Lower is better.") == times
        assert re.search(r"has MAE \d\S+ \(mean of 3 numbers\) on the 20", text) or task == "multilabel"


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("task", ["segmentation", "multilabel"])
def test_runs_of_a_task_stand_side_by_side(run_of, copy_of, tmp_path, task):
    run, other = run_of(task), copy_of(task)
    evaluation = parse_json((other / "evaluation.json").read_text("utf-8"))
    for measures in (evaluation["ensemble"], evaluation["calibrated"]):
        measures |= {"nll": 1.0 + measures["nll"]}
    evaluation["calibrated"] = None
    (other / "evaluation.json").write_text(stamp_json(json.dumps(evaluation)))
    out = tmp_path / "both.html"
    page = write_report([run, other], out).read_text(encoding="utf-8")
    text = text_of(page)
    first = json.loads((run / "evaluation.json").read_text("utf-8"))
    nll, scaled = first["ensemble"]["nll"], first["calibrated"]["nll"]
    assert f"NLL {nll:.4f} {1 + nll:.4f}" in text and f"calibrated NLL {scaled:.4f} –" in text
    assert f"A {run.name} B {task} <1>" in text
    anchors = re.findall(r'\bid="([^"]+)"', page)
    assert len(anchors) == len(set(anchors))
    figures = {path.relative_to(tmp_path / "both").as_posix() for path in (tmp_path / "both").rglob("*.svg")}
    together = {"quality-cost", "learning"}
    each = {f"{key}/{name}" for key in ("run-1", "run-2") for name in FIGURES[task] | OF_ALL}
    assert figures == {f"{name}.svg" for name in together | each}
    assert all(f'href="both/{name}"' in page for name in figures)


def test_bad_requests_get_one_line(run_of, copy_of, capsys):
    damaged = copy_of("multilabel")
    (damaged / "evaluation.json").write_text("{")
    for arguments, message in (
        ([run_of("regression"), run_of("multilabel")], "one task, got regression and multilabel"),
        ([run_of("regression"), run_of("regression")], "different folders"),
        ([damaged], "evaluation.json must be"),
        ([run_of("regression"), "--data", "digits"], "data must be a table"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@given(seed=st.integers(0, 1000), parts=st.integers(1, 5))
@settings(max_examples=20)
def test_bins_hold_all_predictions_whatever_the_batches(seed, parts):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(50, generator=generator)
    right = torch.rand(50, generator=generator) < confidence
    whole, batched = ConfidenceBins(), ConfidenceBins()
    whole.add(confidence, right)
    for chunk in zip(confidence.chunk(parts), right.chunk(parts), strict=True):
        batched.add(*chunk)
    bins = batched.result()
    assert sum(one.count for one in bins) == 50
    assert sum(one.count * one.accuracy for one in bins) == pytest.approx(int(right.sum()))
    for number, (one, other) in enumerate(zip(bins, whole.result(), strict=True)):
        assert one.count == other.count and one.confidence == pytest.approx(other.confidence)
        assert not one.count or number / 15 <= one.confidence <= (number + 1) / 15 + 1e-6


def test_pixels_of_all_images_are_binned_and_photographs_chosen_by_their_accuracy():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(3, (9, 4, 6), generator=generator)
    logits = torch.nn.functional.one_hot(masks, 3).movedim(-1, 1).float()
    for row in range(9):  # row pixels are wrong; the last photograph is void
        logits[row, :, 0, :].view(3, 6)[:, : row % 6] *= -1
        logits[row, :, 1, :].view(3, 6)[:, : row // 6 * row] *= -1
    masks[8] = VOID
    calibration = PixelCalibration(n=3, average="logits", pixels=9, temperature=0.5)
    found = Segmentation(["a", "b", "c"]).inspect(
        Images(logits.unsqueeze(1), masks), average="logits", calibration=calibration
    )
    assert [example.title.partition(":")[0] for example in found.examples] == [
        "worst",
        "lower quartile",
        "median",
        "upper quartile",
        "best",
    ]
    shares = (logits.argmax(dim=1) == masks)[:8].double().mean(dim=(1, 2))
    assert found.examples[0].lines == [f"test image {10 * int(shares.argmin()) + 1}"]
    assert found.examples[-1].title == "best: 100.0 % of the pixels are right"
    for figure, temperature in zip(found.figures, (1, 0.5), strict=True):
        scores = PixelScores(3, VOID)
        scores.add(ensemble_log_probabilities(logits.unsqueeze(1) / temperature), masks)
        assert figure.ece == pytest.approx(scores.result()["ece"])


def test_a_class_named_void_keeps_its_color_beside_that_of_void_pixels():
    task = Segmentation(["road", "void"])
    found = task.inspect(Images(torch.zeros(2, 1, 2, 4, 4), torch.zeros(2, 4, 4).long()), average="logits")
    assert found.legend == task.colors() | {"void (without a class)": "#e0e0c0"}


def test_photographs_without_a_labelled_pixel_are_not_shown_and_the_page_says_so():
    masks = torch.full((3, 4, 4), VOID)
    found = Segmentation(["a", "b"]).inspect(Images(torch.zeros(3, 1, 2, 4, 4), masks), average="logits")
    assert not found.figures and not found.examples
    assert found.without == "None of 3 test images has a labelled pixel."


def test_labels_are_counted_and_the_most_wrong_images_shown():
    truth = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    outputs = torch.tensor([[2.0, -2.0], [-2.0, -1.0], [-2.0, 3.0], [1.0, -1.0]]).unsqueeze(1)
    calibration = LabelCalibration(n=3, average="logits", temperature=1.0, thresholds=[0.5, 0.9])
    task = Multilabel(["car", "tree"])
    found = task.inspect(Images(outputs, truth), average="logits", calibration=calibration)
    assert found.tables[0].rows == [
        ["car", "3", "2", "50.0 %", "100.0 %", "66.7 %"],
        ["tree", "1", "1", "90.0 %", "0.0 %", "0.0 %"],
    ]
    assert [(one.title, one.lines) for one in found.examples] == [
        ("2 wrong", ["missed: car, tree", "right: none"]),
        ("1 wrong", ["falsely predicted: tree", "right: none"]),
    ]
    assert [figure.name for figure in found.figures] == ["reliability", "reliability-scaled"]
    assert len(task.inspect(Images(outputs, truth), average="logits").figures) == 1


def test_numbers_stand_against_the_truth_with_intervals():
    outputs = torch.zeros(40, 2, 2)  # means of 0, and variances near 1
    truth = torch.linspace(-2, 2, 40).unsqueeze(1)
    task = Regression(["road"])
    std = task.predict(outputs, average="logits").std
    for errors, kind in (
        ([], "central interval of its Gaussian"),
        ([0.01 * n for n in range(20)], "conformal"),
    ):
        calibration = NumberCalibration(n=len(errors), average="logits", scales=[2.0], errors=[errors])
        found = task.inspect(Images(outputs, truth), average="logits", calibration=calibration)
        scatter, coverage = found.figures
        assert kind in scatter.meaning and scatter.truth == truth[:, 0].tolist()
        half = (scatter.high[0] - scatter.low[0]) / 2 / std[0].item()
        assert half == pytest.approx(2 * 1.6449 if not errors else 0.18, rel=1e-3)
        raw, calibrated = coverage.observed.values()
        assert raw[9] == ((truth / std).abs() <= 0.6745).double().mean().item()
        assert calibrated[9] == ((truth / std).abs() <= 2 * 0.6745).double().mean().item()
        farthest = sorted(one.lines[0].partition(" ± ")[0] for one in found.examples[:2])
        assert farthest == ["road: 2; predicted 0", "road: −2; predicted 0"]


def test_a_page_says_that_only_the_first_numbers_have_a_figure():
    for count in (8, 9):
        task = Regression([f"n{number}" for number in range(count)])
        found = task.inspect(Images(torch.zeros(4, 2, task.outputs), torch.zeros(4, count)), average="logits")
        *scatters, _ = found.figures
        told = [figure.meaning.endswith(" Of 9 numbers, the first 8 are drawn.") for figure in scatters]
        assert told == 8 * [count == 9]


def test_every_kind_of_figure_is_drawn():
    bins = ConfidenceBins()
    bins.add(torch.tensor([0.7, 0.9]), torch.tensor([False, True]))
    about = ("name", "title", "meaning")
    bars = draw(Bars(*about, {"road": 0.5, "sky": None, "car": 0.95}, "IoU, %")).axes[0]
    assert [text.get_text() for text in bars.texts] == ["50.0", "–", "95.0"]
    upper, lower = draw(Reliability(*about, bins.result(), "confidence", "right", "pixels, %")).axes
    assert upper.texts[0].get_text() == "ECE 40.00 %" and lower.get_ylabel() == "pixels, %"
    scatter = draw(Scatter(*about, [0.0, 1.0], [0.1, 0.8], [-0.5, 0.2], [0.5, 1.2], "road")).axes[0]
    assert scatter.lines[0].get_ydata().tolist() == [0.1, 0.8] and scatter.get_xlabel() == "road, true"
    coverage = draw(Coverage(*about, [0.5, 0.9], {"as trained": [0.4, 0.8], "calibrated": [0.5, 0.9]})).axes[
        0
    ]
    assert [line.get_ydata()[-1] for line in coverage.lines] == [100, 80, 90]
    assert [text.xy[0] for text in coverage.texts] == [100, 100]  # right of where the diagonal ends


def test_of_many_bars_the_lowest_are_shown():
    values, told = lowest({str(number): number / 50 if number else None for number in range(50)})
    assert list(values) == [str(number) for number in range(1, 41)] and told == " The 40 lowest of 50."
