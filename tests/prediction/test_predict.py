import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from netfission.classifier import Classifier
from netfission.cli import main
from netfission.cli.predict import parser
from netfission.data.files import find_images as find_image_files
from netfission.evaluation.reliability import ReliabilityReport
from netfission.prediction import FORMATS, Failure, ImagePrediction, Layout, predict_images
from netfission.prediction.targets import TARGET_FORMATS, TargetPrediction


def find_in_folder(folder: Path) -> list[Path]:
    return [Path(path) for path in find_image_files(folder).images]


def predict(capsys, *arguments, status=0):
    """What the command writes to standard output."""
    assert main(["predict", *map(str, arguments)]) == status
    return capsys.readouterr().out


def standard_input(content):
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def test_figures_are_those_of_evaluate(digits_run, digit_files, capsys):
    test = digit_files / "test"
    predictions = records(predict(capsys, digits_run.path, test, "--format", "jsonl", "--probabilities"))
    assert [each["image"] for each in predictions] == [str(path) for path in find_in_folder(test)]
    truth = [path.parent.name for path in find_in_folder(test)]
    evaluation = digits_run.load_evaluation()
    reliability = ReliabilityReport.from_json((digits_run.path / "reliability.json").read_text("utf-8"))
    assert evaluation.n == reliability.n == len(predictions) == 100
    accuracy = sum(each["class"] == name for each, name in zip(predictions, truth, strict=True)) / 100
    assert accuracy == pytest.approx(evaluation.ensemble["top1"])
    nll = [-math.log(each["probabilities"][name]) for each, name in zip(predictions, truth, strict=True)]
    assert sum(nll) / 100 == pytest.approx(reliability.scaled.metrics["nll"], rel=1e-4)
    assert reliability.scaled.metrics["nll"] != pytest.approx(reliability.raw.metrics["nll"], rel=1e-4)
    assert sum(each["entropy"] for each in predictions) / 100 != pytest.approx(evaluation.predictive_entropy)
    assert sum(each["disagreement"] for each in predictions) / 100 == pytest.approx(
        evaluation.disagreement, rel=1e-4
    )
    own = next(each for each in reliability.abstentions if each.risk == 0.05)
    assert sum(not each["abstain"] for each in predictions) / 100 == pytest.approx(own.coverage)


def test_csv_says_the_same_as_json_lines(digits_run, digit_files, tmp_path, capsys):
    odd = tmp_path / 'a, "b".png'
    shutil.copy(find_in_folder(digit_files / "test")[0], odd)
    request = [digits_run.path, odd, "nowhere.png", digit_files / "test" / "digit 3", "--risk", "0.3"]
    lines = records(predict(capsys, *request, "--format", "jsonl", status=1))
    rows = list(csv.DictReader(io.StringIO(predict(capsys, *request, "--format", "csv", status=1))))
    assert len(rows) == len(lines) > 3
    assert rows[0]["image"] == str(odd)
    assert (rows[1]["error"], rows[1]["class"]) == ("no such file or directory", "")
    for row, line in zip(rows, lines, strict=True):
        assert row["image"] == line["image"]
        assert row["error"] == line.get("error", "")
        if "error" not in line:
            assert row["class"] == line["class"]
            assert [row[f"exit_{index}"] for index in range(3)] == line["votes"]
            assert row["abstain"] == str(int(line["abstain"]))
            for name in ("probability", "disagreement", "entropy", "mutual_information"):
                assert float(row[name]) == line[name]


def test_csv_with_every_probability(digits_run, digit_files, capsys):
    text = predict(
        capsys, digits_run.path, digit_files / "test/digit 1", "--format", "csv", "--probabilities"
    )
    for row in csv.DictReader(io.StringIO(text)):
        each = {name: float(cell) for name, cell in row.items() if name.startswith("p_digit")}
        assert len(each) == 10
        assert sum(each.values()) == pytest.approx(1, abs=1e-4)
        assert each[f"p_{row['class']}"] == max(each.values()) == float(row["probability"])


def test_the_table_is_aligned_and_says_where_it_abstains(digits_run, digit_files, capsys):
    folder = digit_files / "test" / "digit 2"
    lines = predict(capsys, digits_run.path, folder, "nowhere.png", status=1).splitlines()
    head, *rows, missing, foot = lines
    assert head.split()[:3] == ["image", "class", "p"]
    assert len(rows) == len(find_in_folder(folder))
    assert {row[head.index("class") :][:5] for row in rows} == {"digit"}
    assert {row[head.index("exit 1") :][:5] for row in rows} == {"digit"}
    assert missing.split(maxsplit=1) == ["nowhere.png", "error: no such file or directory"]
    threshold = digits_run.load_calibration().risk_coverage.threshold(0.05)
    effect = "keeps the share of wrong answers within 5 % on the validation images"
    below = f"abstains if p is below the threshold ({threshold:.3f}), which {effect}"
    assert foot == (below if threshold <= 1 else f"abstains on every image: no threshold of p {effect}")
    end = head.index("  exit 0")
    for row in rows:
        confidence = float(row[end - 5 : end])
        if abs(confidence - threshold) > 1e-3:
            assert row.endswith("yes") == (confidence < threshold)


def test_failures_are_counted_and_the_status_is_1(digits_run, digit_files, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    good = find_in_folder(digit_files / "test")[0]
    request = ["predict", str(digits_run.path), str(tmp_path / "bad.png"), str(tmp_path / "empty"), str(good)]
    assert main([*request, "--format", "jsonl"]) == 1
    out, error = capsys.readouterr()
    assert error == "netfission: 1 of 2 images could not be read; folders without images: 1\n"
    bad, empty, answered = records(out)
    assert bad == {"image": str(tmp_path / "bad.png"), "error": "not an image of a known format"}
    assert empty == {"image": str(tmp_path / "empty"), "error": "the folder holds no images"}
    assert answered["class"].startswith("digit ")


def test_a_folder_tells_of_all_that_is_named_as_an_image(digits_run, digit_files, tmp_path, capsys):
    folder, linked = tmp_path / "folder", tmp_path / "linked"
    folder.mkdir()
    linked.mkdir()
    for place in (folder / "a.png", folder / ".hidden.png", linked / "b.png"):
        shutil.copy(find_in_folder(digit_files / "test")[0], place)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.png")
    (folder / "link").symlink_to(linked)
    (linked / "back").symlink_to(folder)  # which would lead round for ever
    predictions = records(predict(capsys, digits_run.path, folder, "--format", "jsonl", status=1))
    told = {each["image"].removeprefix(f"{folder}/"): each.get("error") for each in predictions}
    assert told == {
        "a.png": None,
        "gone.png": "no such file or directory",
        "link/b.png": None,
        "pipe.png": "not a regular file",
    }


def test_names_from_a_closed_standard_input_are_refused(digits_run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert main(["predict", str(digits_run.path), "-"]) == 2
    told = "images must be files or folders, got '-'; standard input is closed"
    assert capsys.readouterr().err == f"netfission: {told}\n"


def test_an_empty_folder_is_no_image(digits_run, tmp_path, capsys):
    assert main(["predict", str(digits_run.path), str(tmp_path)]) == 1
    assert capsys.readouterr().err == "netfission: folders without images: 1\n"


ODD = 'a\nb\x1b[31m\r,"c".png'


@pytest.mark.parametrize("name", ["a\nb.png", "a\rb.png", ODD])
def test_csv_of_a_name_with_line_ends_reads_back(name, digits_run, digit_files, tmp_path, capsys):
    shutil.copy(find_in_folder(digit_files / "test")[0], tmp_path / name)
    request = [digits_run.path, tmp_path / name, tmp_path / f"no {name}"]
    text = predict(capsys, *request, "--format", "csv", status=1)
    _, answered, missing = csv.reader(io.StringIO(text, newline=""))
    assert (answered[0], missing[0]) == (str(tmp_path / name), str(tmp_path / f"no {name}"))
    out = tmp_path / "said.csv"
    predict(capsys, *request[:2], "--out", out)
    with out.open(newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["image", str(tmp_path / name)]


def test_a_name_cannot_steer_the_terminal(classifier, digit_files, tmp_path):
    image = tmp_path / ODD
    shutil.copy(find_in_folder(digit_files / "test")[0], image)
    spec = replace(classifier.spec, classes=[f"\x1b]0;{name}" for name in classifier.spec.classes])
    odd = Classifier(classifier.network, spec, classifier.calibration)
    images = [image, Failure(image, "no \x07 image")]
    limits = odd.limits(risk=0.05)
    writer = FORMATS["table"](Layout.from_classifier(odd, images, limits=limits, probabilities=False))
    lines = [*writer.header(), *map(writer.line, predict_images(odd, images, limits=limits))]
    assert all(line.isprintable() for line in lines)
    head, answered, failed = lines
    assert answered.startswith(str(tmp_path) + r'/a\nb\x1b[31m\r,"c".png  \x1b]0;digit')
    assert answered.index(r"\x1b]0;digit") == head.index("class") == failed.index("error:")


def test_names_from_standard_input(digits_run, digit_files, monkeypatch, capsys):
    first, second, third = find_in_folder(digit_files / "test")[:3]
    monkeypatch.setattr(sys, "stdin", standard_input(f"{second}\n\n{third}\n".encode()))
    predictions = records(predict(capsys, digits_run.path, first, "-", "--format", "jsonl"))
    assert [each["image"] for each in predictions] == [str(first), str(second), str(third)]


def test_an_image_in_place_of_names_is_refused(digits_run, digit_files, monkeypatch, capsys):
    image = find_in_folder(digit_files / "test")[0]
    monkeypatch.setattr(sys, "stdin", standard_input(image.read_bytes()))
    assert main(["predict", str(digits_run.path), "-"]) == 2
    expected = "images must be names of files on standard input, one per line"
    told = f"{expected}, got an image (PNG); pass the name of the file in place of -"
    assert capsys.readouterr().err == f"netfission: {told}\n"


@pytest.mark.parametrize("form", ["table", "csv", "jsonl"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_name_can_be_written_on_any_terminal(
    encoding, form, digits_run, digit_files, tmp_path, monkeypatch
):
    names = [b"caf\xe9.png", "猫.png".encode(), "café.png".encode()]
    for name in names:
        shutil.copy(find_in_folder(digit_files / "test")[0], os.fsencode(tmp_path) + b"/" + name)
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    assert main(["predict", str(digits_run.path), str(tmp_path), "--format", form]) == 0
    written = output.buffer.getvalue()
    output.detach()
    if form == "csv":
        assert all(name + b",digit" in written for name in names)
    elif form == "jsonl":
        read = [os.fsencode(record["image"]) for record in records(written.decode())]
        assert {name.rpartition(b"/")[2] for name in read} == set(names)
    else:
        text = written.decode(encoding)
        assert r"caf\xe9.png " in text
        assert (r"\u732b.png " if encoding != "utf-8" else "猫.png ") in text


def test_a_name_that_is_too_long_is_an_error_of_that_image(digits_run, digit_files, monkeypatch, capsys):
    image = find_in_folder(digit_files / "test")[0]
    monkeypatch.setattr(sys, "stdin", standard_input(b"x" * 5000 + f"\n{image}\n".encode()))
    first, second = records(predict(capsys, digits_run.path, "-", "--format", "jsonl", status=1))
    assert first["error"] == "file name too long"
    assert second["class"].startswith("digit ")


def test_a_name_that_is_no_text_comes_back_as_it_was(digits_run, digit_files, tmp_path, monkeypatch, capsys):
    odd = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    shutil.copy(find_in_folder(digit_files / "test")[0], odd)
    monkeypatch.setattr(sys, "stdin", standard_input(odd + b"\n"))
    predict(capsys, digits_run.path, "-", "--out", tmp_path / "said.csv")
    assert odd in (tmp_path / "said.csv").read_bytes()


def test_a_file_is_written_in_the_form_its_name_tells(digits_run, digit_files, tmp_path, capsys):
    image = find_in_folder(digit_files / "test")[0]
    for name, start in {
        "said.csv": "image,class",
        "said.jsonl": '{"image"',
        "said.txt": "image ",
    }.items():
        assert (
            predict(capsys, digits_run.path, image, "--out", tmp_path / name) == f"wrote {tmp_path / name}\n"
        )
        assert (tmp_path / name).read_text("utf-8").startswith(start)
    for name in ("said", "said.json", "said.JSONL"):
        predict(capsys, digits_run.path, image, "--out", tmp_path / name, "--format", "jsonl")
        assert (tmp_path / name).read_text("utf-8").startswith('{"image"')


def test_answers_are_not_lost_in_a_closed_standard_output(digits_run, digit_files, monkeypatch, capsys):
    request = ["predict", str(digits_run.path), str(find_in_folder(digit_files / "test")[0])]
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - as the command opens it in place of a closed one
        monkeypatch.setattr(sys, "stdout", nowhere)
        assert main(request) == 2
    message = "netfission: --out must be given if standard output is closed, got nothing\n"
    assert capsys.readouterr().err == message


def test_no_image_nor_pipe_nor_file_of_a_run_is_replaced(digits_run, digit_files, tmp_path, capsys):
    image, other, pipe = tmp_path / "a.png", tmp_path / "b.csv", tmp_path / "pipe"
    shutil.copy(find_in_folder(digit_files / "test")[0], image)
    content = image.read_bytes()
    other.symlink_to(image)
    os.mkfifo(pipe)
    request = ["predict", str(digits_run.path), str(tmp_path / "none.png"), str(image), "--format", "csv"]
    for out in (image, other, tmp_path / "." / "a.png"):
        assert main([*request, "--out", str(out)]) == 2
        assert f"--out must be another file than the images, got {out}\n" in capsys.readouterr().err
    assert image.read_bytes() == content
    assert main([*request, "--out", str(pipe)]) == 2
    assert "--out must be a regular file, got" in capsys.readouterr().err
    assert pipe.is_fifo()
    metrics = digits_run.metrics.read_bytes()
    (tmp_path / "link.csv").symlink_to(digits_run.metrics)
    for out in (digits_run.metrics, tmp_path / "link.csv"):
        assert main([*request, "--out", str(out)]) == 2
        assert f"--out must be another file than a run's own, got {out}\n" in capsys.readouterr().err
    assert digits_run.metrics.read_bytes() == metrics


def test_a_run_without_calibration_never_abstains(digits_run, digit_files, tmp_path, capsys):
    run = shutil.copytree(digits_run.path, tmp_path / "run")
    (run / "calibration.json").unlink()
    image = find_in_folder(digit_files / "test")[0]
    (predictions,) = records(predict(capsys, run, image, "--format", "jsonl"))
    assert "abstain" not in predictions
    assert "abstain" not in predict(capsys, run, image)
    assert main(["predict", str(run), str(image), "--risk", "0.1"]) == 2
    assert "risk must be left out for a network without calibration, got 0.1" in capsys.readouterr().err
    assert main(["predict", str(run), str(image), "--delta", "0.1"]) == 2
    assert "delta must be left out for a network without calibration, got 0.1; " in capsys.readouterr().err


def test_the_help_says_when_a_default_risk_is_left_out():
    words = " ".join(parser().format_help().split())
    assert "with --delta and --coverage or --accept-false-alarms it never abstains)" in words


def test_p_values_are_written_as_the_classifier_has_them(digits_run, digit_files, classifier, capsys):
    request = [digits_run.path, digit_files / "test", "nowhere.png", "--accept-false-alarms", "0.1"]
    *lines, failed = records(predict(capsys, *request, "--format", "jsonl", status=1))
    assert set(failed) == {"image", "error"}
    files = [line["image"] for line in lines]
    pixels = torch.stack([classifier.pixels(Image.open(path)) for path in files])
    own = classifier.predict(pixels, accept_false_alarms=0.1)
    assert [line["p_value"] for line in lines] == pytest.approx(own.p_values.tolist(), abs=1e-6)
    assert [line["out_of_distribution"] for line in lines] == own.out_of_distribution.tolist()
    assert 0 < sum(own.out_of_distribution) < 50
    assert {(line["accept_false_alarms"], line["detector"]) for line in lines} == {(0.1, "energy")}
    rows = list(csv.DictReader(io.StringIO(predict(capsys, *request, "--format", "csv", status=1))))
    assert rows.pop()["p_value"] == ""
    for row, line in zip(rows, lines, strict=True):
        assert float(row["p_value"]) == line["p_value"]
        assert [row[name] for name in ("out_of_distribution", "accept_false_alarms", "detector")] == [
            str(int(line["out_of_distribution"])), "0.1", "energy",
        ]  # fmt: skip
    without = records(predict(capsys, digits_run.path, files[0], "--format", "jsonl"))[0]
    assert without["p_value"] == lines[0]["p_value"] and "out_of_distribution" not in without
    other = records(
        predict(capsys, digits_run.path, files[0], "--format", "jsonl", "--detector", "mutual-information")
    )[0]
    assert other["detector"] == "mutual-information"
    expected = classifier.predict(pixels[:1], detector="mutual-information").p_values.item()
    assert other["p_value"] == pytest.approx(expected, abs=1e-6) != without["p_value"]


def test_the_table_marks_images_and_says_how_many_falsely(digits_run, digit_files, capsys):
    request = [digits_run.path, digit_files / "test" / "digit 2", "--accept-false-alarms", "0.2"]
    head, *rows, marks, _ = predict(capsys, *request).splitlines()
    lines = records(predict(capsys, *request, "--format", "jsonl"))
    start, end = head.index("  p-value"), head.index("outside")
    for row, line in zip(rows, lines, strict=True):
        assert float(row[start : end - 2]) == pytest.approx(line["p_value"], abs=1e-3)
        assert row[end:].startswith("yes") == line["out_of_distribution"]
    assert marks == (
        "outside: marked as out of distribution by energy; so are at most 20 % of images like the 30 "
        "validation images, on average over their choice"
    )
    head, *_, bounded = predict(capsys, *request, "--delta", "0.1").splitlines()
    assert "abstain" not in head  # the default risk may have no bound
    assert bounded.endswith("with a probability of 90 % over their choice")


def test_a_calibration_of_an_earlier_version_gives_no_p_values(digits_run, digit_files, tmp_path, capsys):
    run = shutil.copytree(digits_run.path, tmp_path / "run")
    calibration = json.loads((run / "calibration.json").read_text("utf-8"))
    del calibration["scores"]["uncertainty"], calibration["checksum"]
    (run / "calibration.json").write_text(json.dumps(calibration))
    image = sorted((digit_files / "test").rglob("*.*"))[0]
    (line,) = records(predict(capsys, run, image, "--coverage", "0.8", "--format", "jsonl"))
    assert "p_value" not in line and line["set"]
    for flags, name in (
        (["--accept-false-alarms", "0.1"], "accept-false-alarms"),
        (
            ["--detector", "energy"],
            "detector",
        ),
    ):
        assert main(["predict", str(run), str(image), *flags]) == 2
        error = capsys.readouterr().err
        assert f"--{name} must be left out for a calibration without scores of images, got " in error
        assert error.endswith("for a run with `netfission calibrate RUN`\n")


PROMISES = ["--coverage", "0.8", "--risk", "0.3", "--delta", "0.2"]


def test_sets_and_bounded_abstention_are_written_as_the_classifier_has_them(
    digits_run, digit_files, classifier, capsys
):
    request = [digits_run.path, digit_files / "test", "nowhere.png", *PROMISES]
    *lines, failed = records(predict(capsys, *request, "--format", "jsonl", status=1))
    assert set(failed) == {"image", "error"}
    files = find_in_folder(digit_files / "test")
    pixels = torch.stack([classifier.pixels(Image.open(path)) for path in files])
    own = classifier.predict(pixels, coverage=0.8, risk=0.3, delta=0.2)
    names = classifier.spec.classes
    expected = [[names[k] for k in row.nonzero()[:, 0]] for row in own.sets]
    assert [line["set"] for line in lines] == expected
    assert len({len(classes) for classes in expected}) > 1
    assert [line["abstain"] for line in lines] == own.abstains.tolist()
    assert {(line["coverage"], line["risk"], line["delta"]) for line in lines} == {(0.8, 0.3, 0.2)}
    rows = list(csv.DictReader(io.StringIO(predict(capsys, *request, "--format", "csv", status=1))))
    assert rows.pop()["set"] == ""
    for row, line in zip(rows, lines, strict=True):
        assert json.loads(row["set"]) == line["set"]
        assert [row[name] for name in ("abstain", "risk", "delta", "coverage")] == [
            str(int(line["abstain"])), "0.3", "0.2", "0.8",
        ]  # fmt: skip


def test_the_table_says_what_is_promised_and_by_how_many_images(digits_run, digit_files, capsys):
    request = [digits_run.path, digit_files / "test" / "digit 2"]
    head, *rows, sets, abstention = predict(capsys, *request, *PROMISES).splitlines()
    assert head.split()[-2:] == ["abstain", "set"]
    start = head.index("set")
    lines = records(predict(capsys, *request, *PROMISES, "--format", "jsonl"))
    assert [row[start:] for row in rows] == [", ".join(line["set"]) or "(empty)" for line in lines]
    chance, choice = "with a probability of 80 %", "over the choice of the 30 validation images"
    promise = "sets contain the true class of at least 80 % of the images"
    assert sets == f"{promise}, {chance} {choice}"
    assert abstention.endswith(f" at most 30 % of the answers are wrong, {chance}")
    only_sets = predict(capsys, *request, "--coverage", "0.8", "--delta", "0.2").splitlines()
    assert "abstain" not in only_sets[0] and only_sets[-1] == sets
    *_, on_average, _ = predict(capsys, *request, "--coverage", "0.8", "--score", "aps").splitlines()
    assert on_average == f"{promise}, on average {choice}"


@pytest.mark.parametrize(("delta", "chance"), [(None, "on average"), (0.05, "with a probability of 95 %")])
def test_class_wise_sets_are_described_class_by_class(delta, chance):
    layout = Layout(
        ["a"],
        1,
        risk=None,
        threshold=None,
        probabilities=False,
        images=5,
        calibration_images=80,
        delta=delta,
        coverage=0.8,
        score="aps",
        class_wise=True,
    )
    (foot,) = FORMATS["table"](layout).footer()
    assert foot == (
        "sets contain the true class of at least 80 % of the images of each class, for each class "
        f"{chance} over the choice of the 80 validation images"
    )
    prediction = ImagePrediction(Path("a.png"), "a", 1.0, ["a"], 0.0, 0.0, 0.0, None, {"a": 1.0}, ["a"])
    line = json.loads(FORMATS["jsonl"](layout).line(prediction))
    assert (line["score"], line["class_wise"]) == ("aps", True)
    written = FORMATS["csv"](layout)
    row = next(csv.DictReader([*written.header(), written.line(prediction)]))
    assert (row["coverage"], row["score"], row["class_wise"]) == ("0.8", "aps", "1")


def test_limits_keep_whether_sets_are_class_wise(classifier):
    limits = classifier.limits(coverage=0.6, class_wise=True)
    layout = Layout.from_classifier(classifier, [Path("a.png")], limits=limits, probabilities=False)
    assert limits.class_wise and layout.class_wise and layout.score == "lac"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--coverage 1", "--coverage must be a share of images above 0 and below 1, got 1.0"),
        ("--coverage 0.9 --delta 0", "--delta must be a probability above 0 and below 1, got 0.0"),
        ("--coverage 0.9 --score abs", "--score must be one of lac, aps, raps, got 'abs'"),
        ("--class-wise", "--class-wise must be left out without a coverage, got True"),
        ("--score aps", "--score must be left out without a coverage, got 'aps'"),
        (
            "--risk 0 --delta 0.1",
            "--risk must be a share of wrong answers above 0 and below 1 to have a bound",
        ),
        (
            "--coverage 0.99",
            "--coverage must be at most 0.96 with 30 calibration images, got 0.99; 99 images are enough",
        ),
        (
            "--risk 0.05 --delta 0.1",
            "--risk must be at least 0.1 with 30 calibration images, got 0.05; 56 images without an error "
            "are enough",
        ),
        (
            "--coverage 0.99 --class-wise",
            "--coverage must be at most 0.75 class by class with 3 calibration images of the largest class",
        ),
        (
            "--accept-false-alarms 1",
            "--accept-false-alarms must be a share of images above 0 and below 1, got 1.0",
        ),
        (
            "--accept-false-alarms 0.01",
            "--accept-false-alarms must be at least 0.04 with 30 calibration images, got 0.01; 99 images are "
            "enough",
        ),
        (
            "--detector msp",
            "--detector must be one of energy, entropy, maximum-probability, mutual-information, got 'msp'",
        ),
        ("--batch_size 0", "--batch-size must be a positive integer, got 0"),
        ("--risk 1.5", "risk must be a share of wrong answers from 0 to 1, got 1.5"),
        ("--probabilities", "--format must be csv or jsonl with --probabilities, got 'table'"),
        ("--format xml", "--format must be one of table, csv, jsonl, got 'xml'"),
        ("--out .", "--out must be a file in a folder that can be written to, got ."),
        (
            "--format csv --out said.jsonl",
            "--out must be a file name that suits the format csv, got said.jsonl",
        ),
        (
            "--format table --out said.CSV",
            "--out must be a file name that suits the format table, got said.CSV",
        ),
        (
            "--out said.xml",
            "--out must be a name that ends in .csv, .jsonl, .txt, got said.xml; or pass --format",
        ),
        (
            "--out nowhere/said.csv",
            "--out must be a file in a folder that can be written to, got nowhere/said.csv",
        ),
    ],
)
def test_a_bad_request_ends_in_one_line_and_status_2(digits_run, digit_files, flags, message, capsys):
    assert main(["predict", str(digits_run.path), str(digit_files / "test"), *flags.split()]) == 2
    out, error = capsys.readouterr()
    assert message in error
    assert (error.count("\n"), out) == (1, "")


def test_standard_input_without_names(digits_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", standard_input(b"\n"))
    assert main(["predict", str(digits_run.path), "-"]) == 2
    assert (
        capsys.readouterr().err
        == "netfission: images must be one file or more, got no names on standard input\n"
    )


def test_a_run_without_weights(digits_run, tmp_path, capsys):
    run = shutil.copytree(digits_run.path, tmp_path / "run")
    (run / "model.safetensors").unlink()
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    assert main(["predict", str(run), str(tmp_path / "image.png")]) == 2
    error = capsys.readouterr().err
    assert "model.safetensors must be the weights of a network, got no such file" in error
    assert error.count("\n") == 1


def test_standard_output_closed_early_ends_it_quietly(digits_run, digit_files):
    images = [digit_files / "test"] * 4  # more lines than a pipe holds
    command = [sys.executable, "-m", "netfission", "predict", digits_run.path, *images]
    flags = ["--batch_size", "8", "--format", "jsonl", "--probabilities"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert json.loads(process.stdout.readline())["image"]
        process.stdout.close()
        assert process.wait(timeout=300) == 141
        assert process.stderr.read() == b""


def test_the_table_never_rounds_to_certainty():
    layout = Layout(["a", "b"], 1, risk=0.05, threshold=0.9999, probabilities=False, images=5)
    writer = FORMATS["table"](layout)
    for p, shown in ((0.9996, "> 0.999"), (1.0, "> 0.999"), (0.9994, "  0.999")):  # 1: from float32
        prediction = ImagePrediction(
            Path("a.png"), "a", p, ["a"], 0.0, 4e-4, 0.0, False, {"a": p, "b": 1 - p}
        )
        line = writer.line(prediction)
        assert line.startswith(f"a.png  a       {shown}  a ")
        assert line.split()[-4:] == ["0.000", "<", "0.001", "0.000"]
    assert next(writer.footer()).startswith(
        "abstains if p is below the threshold (> 0.999), which keeps the share of wrong"
    )


def test_a_table_says_that_no_threshold_keeps_to_the_risk():
    layout = Layout(
        ["a", "b"], 1, risk=0.025, threshold=2.0, probabilities=False, images=5, fitted_on="images of pets"
    )
    assert list(FORMATS["table"](layout).footer()) == [
        "abstains on every image: no threshold of p keeps the share of wrong answers within 2.5 % on the "
        "images of pets"
    ]


@pytest.mark.parametrize(
    ("threshold", "start"),
    [
        (0.0, "answers every image: by the 80 validation images, at most"),
        (0.75, "abstains if p at temperature 1 is below 0.750: by the 80 validation images, at most"),
        (2.0, "abstains on every image: by the 80 validation images, no threshold promises that at most"),
    ],
)
def test_a_table_says_what_a_bound_promises(threshold, start):
    layout = Layout(
        ["a"],
        1,
        risk=0.1,
        threshold=threshold,
        probabilities=False,
        images=5,
        calibration_images=80,
        delta=0.05,
    )
    (foot,) = FORMATS["table"](layout).footer()
    assert foot == f"{start} 10 % of the answers are wrong, with a probability of 95 %"


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_cell_is_no_formula(name):
    layout = Layout([name, "dog"], 2, risk=None, threshold=None, probabilities=False, images=5)
    line = FORMATS["csv"](layout).line(Failure(Path(name), "no such file"))
    (row,) = csv.reader(io.StringIO(line))
    assert row[0] == f"'{name}"


def test_names_of_labels_are_no_commands():
    shares = {"=1+1": 0.9, "\x1b[31m, red": 0.8}
    prediction = TargetPrediction(Path("=a.png"), {"labels": list(shares), "probabilities": shares})
    written = {}
    for form in ("csv", "table"):
        writer = TARGET_FORMATS[form](list(prediction.flat), images=6)
        written[form] = [*writer.header(), writer.line(prediction), writer.line(Failure(Path("-"), "=2"))]
    head, line, failed = csv.reader(written["csv"])
    assert head[1:4] == ["labels", "probabilities_=1+1", "probabilities_\x1b[31m, red"]
    assert line[:2] == ["'=a.png", "'=1+1|\x1b[31m, red"]
    assert (failed[0], failed[-1]) == ("'-", "'=2")
    assert all(line.isprintable() for line in written["table"])
