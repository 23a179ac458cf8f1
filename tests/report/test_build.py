import json
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
import yaml
from matplotlib.textpath import TextPath

from netfission.cli import main
from netfission.evaluation.cascade import CascadeEvaluation, Point
from netfission.evaluation.metrics import accuracy_error
from netfission.evaluation.out_of_distribution import Detection, OutOfDistribution
from netfission.evaluation.reliability import Abstention, WorstClass
from netfission.inference.thresholds import CascadeChoice
from netfission.profiling.timing import Quartiles
from netfission.report import figures, write_report
from netfission.report.run_data import Run, load_runs
from netfission.runs.folder import RunFolder
from netfission.runs.train import train
from netfission.utils.checksums import parse_json

FIGURES = {
    "accuracy-cost",
    "learning",
    "likelihood",
    "network",
    "reliability",
    "reliability-scaled",
    "risk-coverage",
    "worst-classes",
}
WRITTEN = ("evaluation.json", "calibration.json", "reliability.json")


@pytest.fixture(scope="module")
def smaller_run(settings_of, tmp_path_factory) -> Path:
    """A run of one epoch on half of the images, of another seed; not to be changed."""
    path = tmp_path_factory.mktemp("runs") / "smaller"
    train(settings_of(limit_per_class=10, seed=4, epochs=1), path, progress=False)
    return path


def page_of(*paths: Path, out: Path | None = None, **settings) -> str:
    return write_report(list(paths), out, **settings).read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees, but for the figures."""
    without = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", without)).split())


def links(page: str) -> set[str]:
    body = re.sub(r"<svg\b.*?</svg>", " ", page, flags=re.DOTALL)
    return set(re.findall(r'(?:href|src)="([^"]*)"', body))


def change(path: Path, **entries) -> None:
    path.write_text(json.dumps(parse_json(path.read_text("utf-8")) | entries))


def test_the_page_needs_nothing_beside_it(reported):
    page = (reported / "report.html").read_text(encoding="utf-8")
    assert len(page) < 2_000_000
    for link in links(page):
        assert link.startswith(("#", "data:", "report/")), link
    assert not re.search(r"@import|url\((?!#)|<script|<link rel=\"stylesheet", page)
    anchors = set(re.findall(r'\bid="([^"]+)"', page))
    assert {link[1:] for link in links(page) if link.startswith("#")} <= anchors
    assert len(re.findall(r'\bid="([^"]+)"', page)) == len(anchors)


def test_every_figure_lies_beside_it_as_svg(reported):
    page = (reported / "report.html").read_text(encoding="utf-8")
    named = {reported / unquote(link) for link in links(page) if link.startswith("report/")}
    assert named == {reported / "report" / f"{name}.svg" for name in FIGURES}
    assert named == set((reported / "report").iterdir())
    for file in named:
        assert ET.parse(file).getroot().tag.endswith("svg")


def test_its_figures_are_those_of_the_run(reported):
    text = text_of((reported / "report.html").read_text(encoding="utf-8"))
    evaluation = json.loads((reported / "evaluation.json").read_text("utf-8"))
    for each in [*evaluation["exits"], evaluation["ensemble"]]:
        error = 100 * accuracy_error(each["top1"], evaluation["n"])  # as a fine-tuning prints it
        assert f"{100 * each['top1']:.2f} ± {error:.2f}" in text
        assert f"{each['nll']:.4f}" in text
    scaled = json.loads((reported / "reliability.json").read_text("utf-8"))["scaled"]["metrics"]
    assert re.search(rf"ensemble, scaled {100 * scaled['top1']:.2f}.*{scaled['nll']:.4f}", text)
    network, _ = RunFolder(reported).load_network()
    assert f"{sum(parameter.numel() for parameter in network.parameters()):,}" in text
    assert "sparsity 0.5" in text
    assert re.search(r"torch \d+\.\d+", text)


def test_the_same_run_gives_the_same_page(run):
    assert page_of(run) == page_of(run)


def test_names_are_text_and_no_markup(run):
    reliability = parse_json((run / "reliability.json").read_text("utf-8"))
    reliability["worst"][0] |= {"name": "<script>alert('$x$')</script>", "accuracy": 0.25}
    (run / "reliability.json").write_text(json.dumps(reliability))
    page = page_of(run.rename(run.parent / "<script> & run"))
    assert "<script" not in page
    assert '<h2 class="unseen">&lt;script&gt; &amp; run</h2>' in page  # by the template
    assert "&lt;script&gt;alert" in page  # in a figure


@pytest.mark.usefixtures("blank_figures")
def test_what_a_run_lacks_is_named_with_the_command_that_makes_it(run):
    folder = run.rename(run.parent / "my run")
    text = text_of(page_of(folder))
    assert f"netfission evaluate '{folder}' --cascade" in text
    assert f"netfission evaluate '{folder}' --ood DATA" in text
    assert "--corruptions" not in text  # its images are too small for them
    for name in (*WRITTEN, "metrics.csv"):
        (folder / name).unlink()
    shutil.rmtree(folder / "report")
    text = text_of(page_of(folder))
    assert f"The run has not been evaluated on the test split. netfission evaluate '{folder}'" in text
    assert "metrics.csv, which training writes, is missing" in text
    assert [file.stem for file in (folder / "report").iterdir()] == ["network"]


@pytest.mark.usefixtures("undrawn_figures")
def test_the_page_says_what_the_calibration_images_promise(run):
    promises = RunFolder(run).load_reliability().promises
    text = text_of(page_of(run))
    for sets in promises.sets:
        row = f"{sets.score} 90 % {100 * sets.covered:.1f} % {sets.size:.2f} {100 * sets.empty:.1f} %"
        assert f"{row} {sets.least_covered} (" in text
    assert len(promises.false_alarms) == 4
    for alarms in promises.false_alarms:
        assert f"{alarms.detector} 5 % {100 * alarms.marked:.1f} %" in text
    assert "1 % from 287 images 0.0 % –" in text
    assert "With a probability of 90 % over the choice of the 145 validation images, the share of" in text
    elsewhere = "This is promised for images like the images of pets, not for those of the run's test split."
    assert "This is promised for images like" not in text
    change(run / "reliability.json", fitted_on="images of pets")
    assert text_of(page_of(run)).count(elsewhere) == 3
    change(run / "reliability.json", promises=None)  # as a network has that was chosen on these images
    text = text_of(page_of(run))
    assert "Prediction sets" not in text and "False alarms" not in text and "with a bound" not in text


@pytest.mark.usefixtures("blank_figures")
def test_a_run_without_validation_says_so(run):
    reliability = parse_json((run / "reliability.json").read_text("utf-8"))
    change(
        run / "reliability.json",
        **reliability
        | {"temperature": None, "scaled": None, "validation_images": 0, "abstentions": [], "promises": None},
    )
    (run / "calibration.json").unlink()
    settings = yaml.safe_load((run / "config.yaml").read_text("utf-8")) | {"validation": 0.0}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = [line.split(",") for line in (run / "metrics.csv").read_text("utf-8").splitlines()]
    kept = [place for place, name in enumerate(rows[0]) if not name.startswith("val/")]
    (run / "metrics.csv").write_text("".join(",".join(row[place] for place in kept) + "\n" for row in rows))
    page = page_of(run)
    text = text_of(page)
    assert "There is no temperature scaling: the run was trained without validation images." in text
    assert "Early exit needs thresholds from validation images, and the run has none." in text
    assert "Accuracy on training images after every epoch" in text
    assert "ensemble, scaled" not in text


@pytest.mark.usefixtures("blank_figures")
def test_a_temperature_that_is_a_guess_is_said_to_be_one(run):
    assert "a guess" not in text_of(page_of(run))
    for values, guess in (
        ({"flawless": True}, "all classified correctly, so it is a guess"),
        ({"flawless": False, "validation_images": 99}, "too few for more than a guess"),
    ):
        change(run / "reliability.json", **values)
        text = text_of(page_of(run))
        assert f"validation images best, {guess}." in text
        assert f"validation images, {guess}." in text


def test_accuracies_near_100_percent_fit_an_axis_that_ends_there():
    networks = [("ensemble", 1.0, 1.0), ("curve", 0.6, 0.96), ("exit 0", 0.5, 0.95), ("exit 1", 0.4, 0.9)]
    points = [Point(name, name.split()[0], macs, macs, accuracy) for name, macs, accuracy in networks]
    choice = CascadeChoice((0.4,), 0.7, 0.7, 0.6)
    axes = figures.cascade(
        CascadeEvaluation("margin", (1, 0), 0.2, None, choice, 0.7, 36, 359, {256: 10}, points)
    ).axes[0]
    low, high = axes.get_ylim()
    assert low < 90
    assert 100 < high < 101


def test_cascade_and_out_of_distribution_images_are_shown(run):
    ratio = Quartiles(0.6, 0.66, 0.7)
    networks = [("single network", "single", 1.0, None), ("full ensemble", "ensemble", 0.97, 0.7)]
    networks += [("exit 0", "exit", 0.5, 0.6), ("exit 1", "exit", 0.5, 0.6), ("a", "curve", 0.5, 0.6)]
    points = [Point(name, kind, macs, macs, accuracy) for name, kind, macs, accuracy in networks]
    points.append(Point("chosen", "chosen", 0.6123, 0.6, 0.69, 0.0123, 0.004, 1.3, (0.4,), {256: ratio}))
    points.append(Point("b", "curve", 0.97, 0.97, 0.7))
    choice = CascadeChoice((0.4,), 0.7, 0.7, 0.6)
    cascade = CascadeEvaluation("margin", (1, 0), 0.2, None, choice, 0.7, 36, 359, {256: 10}, points)
    scores = {"entropy": Detection(0.8765, 0.5, 0.25), "knn": Detection(0.9, 0.6, 0.2)}
    detected = [OutOfDistribution("/some/where/letters", 359, 50, 1.1, scores, 1293, "pytorch-ood 0.4.0")]
    for name, content in (("cascade", cascade), ("ood", detected)):
        (run / f"{name}.json").write_text(json.dumps(content, default=vars))
    change(run / "cascade.json", environment={"device": "x"})
    page = page_of(run)
    text = text_of(page)
    assert "needs 0.612× the single network’s MACs and loses 1.23 ± 0.40 percentage points" in text
    assert "0.66× (0.60–0.70) at batch 256" in text
    gained = replace(points[5], accuracy_drop=-0.0167)
    single = replace(points[0], accuracy=0.65)
    always_first = replace(
        cascade,
        points=[gained, single, *points[1:5]],
        choice=replace(choice, thresholds=(0.0,)),
        max_accuracy_drop=50.0,
    )
    (run / "cascade.json").write_text(json.dumps(always_first, default=vars))
    page = page_of(run)
    assert "and gains 1.67 ± 0.40 percentage points" in text_of(page)
    assert "With those of the chosen cascade, every image stops at the first exit." in text_of(page)
    assert "E: all exits; S: the single network, trained by itself; numbers" in text_of(page)
    assert "The accepted loss against all exits is far below." in text_of(page)
    assert figures.cascade(always_first).axes[0].get_ylim()[0] > 50
    assert "every image stops" not in text and "S: " not in text
    assert not re.search(r"\d %|\d ±|± \d", page) and "with a confidence of 80\u00a0%" in page
    assert "Ring: the chosen cascade; E: all exits" in text
    assert "Dotted: the accepted loss against all exits." in text
    line = figures.cascade(cascade).axes[0].lines
    assert [69.8, 69.8] in [pytest.approx(list(drawn.get_ydata())) for drawn in line]
    assert "letters 50 entropy 87.65 50.00 25.00 knn 90.00 60.00 20.00" in text
    assert " KNN reads the features of the exits, fitted to 1,293 training images (pytorch-ood 0.4.0)" in text
    assert "/some/where" not in text
    assert (run / "report" / "cascade.svg").is_file()
    assert "--cascade" not in text and "--ood" not in text


@pytest.mark.usefixtures("blank_figures")
def test_where_the_data_set_is_gone_the_page_says_so(run, tmp_path):
    settings = yaml.safe_load((run / "config.yaml").read_text("utf-8")) | {"data": str(tmp_path / "gone")}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    page = page_of(run)
    assert "The data set gone cannot be read here, so its images are left out" in text_of(page)
    assert "<img" not in page
    assert "<img" in page_of(run, data="digits")
    with pytest.raises((ValueError, OSError), match="nowhere"):
        page_of(run, data=str(tmp_path / "nowhere"))


@pytest.mark.usefixtures("blank_figures")
def test_other_classes_are_not_passed_off_as_its_own(run):
    spec = parse_json((run / "config.json").read_text("utf-8"))
    change(run / "config.json", classes=[f"class {name}" for name in spec["classes"]])
    assert "data must be of the run's classes, got digits with other classes" in text_of(page_of(run))


def test_runs_stand_side_by_side(run, settings_of, tmp_path):
    other = tmp_path / "other"
    train(settings_of(exits=1, sparsity=0.0, epochs=1), other, progress=False)
    out = tmp_path / "both.html"
    page = page_of(run, other, out=out)
    text = text_of(page)
    accuracies = [
        json.loads((each / "evaluation.json").read_text("utf-8"))["ensemble"]["top1"] for each in (run, other)
    ]
    first, second = (rf"{100 * accuracy:.2f} ± \d+\.\d\d" for accuracy in accuracies)
    assert re.search(rf"accuracy, % {first} {second} NLL", text)
    assert "exits 2 1" in text and "epochs 2 1" in text and "sparsity 0.5 0.0" in text
    assert "batch_size 50 50" not in text
    assert "They were trained on" not in text and "Their seeds cut" not in text
    assert "With one exit there is no disagreement." in text
    anchors = re.findall(r'\bid="([^"]+)"', page)
    assert len(anchors) == len(set(anchors))
    assert {each.name for each in (tmp_path / "both").iterdir()} == {
        "accuracy-cost.svg",
        "learning.svg",
        "run-1",
        "run-2",
    }
    assert {each.stem for each in (tmp_path / "both" / "run-1").iterdir()} == FIGURES
    assert not (run / "report").exists()


@pytest.mark.usefixtures("blank_figures")
def test_runs_on_different_images_are_told_apart_in_a_line(run, smaller_run, tmp_path):
    other = shutil.copytree(smaller_run, tmp_path / "other")
    config = (run / "config.yaml").read_text("utf-8")
    moved = config.replace("data: digits", "data: /elsewhere/digits").replace("# checksum", "# was")
    (run / "config.yaml").write_text(moved)
    text = text_of(page_of(run, other, out=tmp_path / "both.html"))
    assert "They were trained on data in different places: A /elsewhere/digits, B digits." in text
    assert "They were trained on different numbers of images: A 200, B 100." in text
    assert "Their seeds cut different validation images from the training images." in text


@pytest.mark.usefixtures("blank_figures")
def test_what_is_not_known_or_not_cut_is_no_difference(run, smaller_run, tmp_path):
    other = shutil.copytree(smaller_run, tmp_path / "other")
    for path in (run, other):
        summary = parse_json((path / "data.json").read_text("utf-8"))
        change(path / "data.json", validation=summary["validation"] | {"origin": "digits/val"})
    text = text_of(page_of(run, other, out=tmp_path / "own.html"))
    assert "They were trained on different numbers of images: A 200, B 100." in text
    assert "Their seeds cut" not in text
    (run / "data.json").unlink()  # as in a run of an earlier version
    text = text_of(page_of(run, other, out=tmp_path / "unknown.html"))
    assert "They were trained on" not in text and "Their seeds cut" not in text


@pytest.mark.usefixtures("undrawn_figures")
def test_one_epoch_is_a_point_of_each_curve(settings_of, tmp_path):
    run = tmp_path / "run"
    train(settings_of(epochs=1), run, progress=False)
    axes = figures.learning_curves(load_runs([run], Run)[0]).axes[0]
    lines, (left, right) = axes.lines, axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if left <= tick <= right] == [1]
    assert "Hollow: augmented training images" in text_of(page_of(run))
    assert len(lines) == 6  # two exits and the ensemble, on training and validation images
    assert {(len(line.get_xdata()), line.get_marker()) for line in lines} == {(1, "o")}


def test_one_exit_alone_is_a_network_and_no_ensemble(settings_of, tmp_path):
    run = tmp_path / "run"
    train(settings_of(exits=1, sparsity=0.0, epochs=1), run, progress=False)
    page = page_of(run)
    text = text_of(page)
    assert "ensemble" not in text.lower() and "N: the network" in text
    figures = [path.read_text("utf-8") for path in (run / "report").glob("*.svg")]
    assert figures and not any("ensemble" in figure for figure in figures)
    assert len(figures) > 1 and any(">NLL of the network" in figure for figure in figures)


@pytest.mark.usefixtures("blank_figures")
def test_a_baseline_is_reported_without_paths(settings_of, tmp_path):
    run = tmp_path / "run"
    train(settings_of(method="deep-ensemble", sparsity=0.0, epochs=1), run, progress=False)
    text = text_of(page_of(run))
    assert "deep-ensemble of 2" in text
    assert "Networks of method=deep-ensemble are not drawn." in text
    assert "member 1" in text and "<img" in page_of(run)


@pytest.mark.parametrize(("method", "validation"), [("mimo", 0.0), ("mc-dropout", 0.2), ("snapshot", 0.2)])
def test_a_baseline_that_trains_as_one_what_predicts_as_several_is_reported(
    method, validation, settings_of, finished_run, tmp_path, request
):
    run = tmp_path / "run"
    train(settings_of(method=method, sparsity=0.0, validation=validation), run, progress=False)
    assert "train/exit1" not in (run / "metrics.csv").read_text("utf-8")
    page_of(run)
    curves = (run / "report" / "learning.svg").read_text("utf-8")
    assert ("member 0" in curves and "member 1" in curves) == (validation > 0)
    assert "ensemble" in curves
    request.getfixturevalue("blank_figures")
    assert f"{method} of 2" in text_of(page_of(finished_run, run, out=tmp_path / "both.html"))


# --- bad requests -----------------------------------------------------------------------------------


def refused(capsys, *arguments: str) -> str:
    """The one line that a bad request ends in."""
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("netfission: ") and error.count("\n") == 1
    return error


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("name", [*WRITTEN, "cascade.json", "ood.json", "corruptions.json", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_file_is_named(name, damage, run, capsys):
    file = run / name
    whole = file.read_text("utf-8") if file.is_file() else '{"n": 1, "more": 2}'
    file.write_text(whole[: len(whole) // 2] if damage == "cut" else '{"n": "x"}')
    assert name in refused(capsys, str(run))
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("text", ["epoch,val/nll\n1,much\n", "epoch,val/nll\n1\n", "epoch\n1,2\n"])
def test_a_damaged_table_of_epochs_is_named(text, run, capsys):
    (run / "metrics.csv").write_text(text)
    assert "metrics.csv must be a table of numbers, got a damaged file" in refused(capsys, str(run))


def test_figures_that_are_missing_from_a_file_are_named(run, capsys):
    ensemble = json.loads((run / "evaluation.json").read_text("utf-8"))["ensemble"]
    change(run / "evaluation.json", ensemble={"top1": ensemble["top1"]})
    assert (
        "evaluation.json must be a file with brier, ece, nll, top1 of each network, got a file without "
        "brier, ece, nll" in refused(capsys, str(run))
    )


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert "must be the folder of a run, got one without config.yaml" in refused(capsys, str(tmp_path))


def test_a_run_whose_training_has_not_ended_is_refused(run, capsys):
    for name in ("config.json", "model.safetensors", *WRITTEN):
        (run / name).unlink()
    refusal = refused(capsys, str(run))
    assert "got one without config.json, as its training has not ended; resume it" in refusal


def test_runs_on_other_data_are_refused(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    change(other / "evaluation.json", n=12)
    error = refused(capsys, str(run), str(other), "--out", str(tmp_path / "page.html"))
    assert (
        f"run must be folders of runs on the same data, got {other} (digits, 10 classes, 12 test images) "
        f"beside {run} (" in error
    )
    change(other / "evaluation.json", n=json.loads((run / "evaluation.json").read_text("utf-8"))["n"])
    change(other / "config.json", classes=list("abcdefghij"))
    assert "run must be folders of runs on the same data, got" in refused(
        capsys, str(run), str(other), "--out", str(tmp_path / "page.html")
    )


def test_a_run_named_twice_is_refused(run, capsys):
    assert f"run must be different folders, got {run}/../run twice" in refused(
        capsys, str(run), f"{run}/../run"
    )


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("out", ["page", "folder.html", "nowhere/page.html", "file.txt/page.html"])
def test_a_page_that_cannot_be_written_is_refused(out, run, tmp_path, capsys):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file.txt").touch()
    assert (
        f"out must be a file ending in .html, in a folder that exists and can be written to, got "
        f"{tmp_path / out}" in refused(capsys, str(run), "--out", str(tmp_path / out))
    )


def test_a_folder_of_figures_that_cannot_be_made_is_named(run, tmp_path, capsys):
    (tmp_path / "page").touch()
    assert str(tmp_path / "page") in refused(capsys, str(run), "--out", str(tmp_path / "page.html"))


@pytest.mark.usefixtures("blank_figures")
def test_the_command_says_what_it_wrote(run, tmp_path, capsys):
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert (
        capsys.readouterr().out
        == f"wrote {tmp_path}/page.html, and its figures one by one in {tmp_path}/page\n"
    )


def test_the_worst_classes_are_shown_with_their_number_of_images():
    worst = [WorstClass("rose", 1, 0.0, {"tulip": 1}), WorstClass("daisy", 1200, 0.5, {})]
    axes = figures.worst_classes(worst).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rose (1)", "daisy (1,200)"]


def test_names_of_wrong_classes_end_in_their_bar_with_their_counts():
    long = {"a very long name of a class": 8, "another very long name": 3, "and a third long name": 2}
    axes = figures.worst_classes(
        [WorstClass("rose", 12, 0.4, long), WorstClass("tulip", 12, 0.6, long)]
    ).axes[0]
    for text, end in zip(axes.texts, (100, 60), strict=True):
        assert text.get_text().startswith("a ver") and "… ×8" in text.get_text()
        width = TextPath((0, 0), text.get_text(), text.get_fontsize()).get_extents().width
        room = (axes.transData.transform((end, 0)) - axes.transData.transform(text.get_position()))[0]
        assert width < room * 72 / axes.figure.dpi


def test_dots_close_together_share_a_label():
    dots = [
        Abstention(risk, 0.9, coverage, 0.1) for risk, coverage in ((0.01, 0.02), (0.1, 0.02), (0.2, 0.8))
    ]
    curve = SimpleNamespace(coverage=[0.1, 1.0], risk=[0.0, 0.5])
    axes = figures.risk_coverage(SimpleNamespace(risk_coverage=curve, abstentions=dots)).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1, 10 %", "20 %"]
