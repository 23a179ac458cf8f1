"""Other data are evaluated beside a run's own figures, and calibration is a command of its own."""

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from netfission.classifier import Classifier
from netfission.cli import main
from netfission.data.load import find_splits
from netfission.data.split_names import SplitName
from netfission.evaluation.calibration import Calibration
from netfission.evaluation.other_data import OtherEvaluation
from netfission.runs.calibrate import calibrate
from netfission.runs.folder import RunFolder
from netfission.runs.setup import is_run_data
from netfission.runs.train import train

DIGITS = load_digits()


def write_digits(folder: Path, digits: str, count: int = 12) -> Path:
    """Write the first images of some digits, each in the folder of its class."""
    for digit in digits:
        (folder / digit).mkdir(parents=True)
        rows = (DIGITS.target == int(digit)).nonzero()[0][:count]
        for row in rows:
            pixels = (DIGITS.images[row] * (255 / 16)).round().astype("uint8")
            Image.fromarray(pixels).save(folder / digit / f"{row:04}.png")
    return folder


def content(run: RunFolder) -> dict[str, bytes]:
    """The run's own files."""
    return {
        str(path): path.read_bytes()
        for path in run.path.rglob("*")
        if path.is_file() and run.evaluations not in path.parents
    }


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> RunFolder:
    folder = RunFolder(shutil.copytree(finished_run, tmp_path / "run"))
    for file in (folder.cascade, folder.out_of_distribution, folder.corruptions):
        file.write_text("of the run's own data")
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Three of the run's ten classes, which their folder sorts to other numbers than the run's."""
    return write_digits(tmp_path / "photographs", "973")


def evaluate(run: RunFolder, *arguments: object) -> int:
    return main(["evaluate", str(run.path), *map(str, arguments)])


def recorded(run: RunFolder) -> list[OtherEvaluation]:
    files = sorted(run.evaluations.glob("*.json"))
    found = [run.load_evaluation_of(json.loads(file.read_text("utf-8"))["data"]) for file in files]
    assert None not in found
    return [figures for figures in found if figures is not None]


def test_the_runs_own_files_stay_as_they_are(run: RunFolder, other: Path) -> None:
    before = content(run)
    assert evaluate(run, "--data", other) == 0
    assert content(run) == before
    assert len(list(run.evaluations.iterdir())) == 1


def test_figures_are_those_of_the_classifier_on_all_images(run: RunFolder, other: Path, capsys) -> None:
    assert evaluate(run, "--data", other) == 0
    shown = capsys.readouterr().out
    (figures,) = recorded(run)
    classifier = Classifier.from_pretrained(run.path)
    files = sorted(other.rglob("*.png"))
    pixels = torch.stack([classifier.pixels(Image.open(file)) for file in files])
    labels = torch.tensor([int(file.parent.name) for file in files])
    predictions = classifier.predict(pixels, risk=0.05)
    right = predictions.probabilities.argmax(1) == labels
    assert 0.2 < right.double().mean() < 1  # else classes in another order would not show
    assert (figures.data, figures.split, figures.left_out) == (str(other), "all", 0)
    assert figures.classes == ["3", "7", "9"]
    assert figures.evaluation.n == len(files) == 36
    assert figures.evaluation.ensemble["top1"] == pytest.approx(right.double().mean().item())
    calibration = run.load_calibration()
    assert calibration is not None
    reliability = figures.reliability
    assert (reliability.temperature, reliability.validation_images) == (
        calibration.temperature,
        calibration.n,
    )
    nll = -predictions.probabilities[range(36), labels].log().mean().item()
    assert reliability.scaled is not None
    assert reliability.scaled.metrics["nll"] == pytest.approx(nll, rel=1e-4)
    answered = next(entry for entry in reliability.abstentions if entry.risk == 0.05)
    assert answered.threshold == calibration.risk_coverage.threshold(0.05)
    assert answered.coverage == pytest.approx((~predictions.abstains).double().mean().item())
    assert shown.startswith(
        f"{other}, which is not the run's own data set: all 36 images, 3 of the network's 10 classes\n"
        "no images of 0, 1, 2, 4, …, 8\n\n"
    )
    assert figures.evaluation.table() in shown
    assert f"from {calibration.n} validation images" in shown
    assert f"wrote {run.evaluation_of(str(other))}; the run's own figures stay as they are\n" in shown


def test_each_data_set_has_its_own_file_and_only_one(run: RunFolder, tmp_path: Path, monkeypatch) -> None:
    first = write_digits(tmp_path / "a" / "images", "12", count=3)
    second = write_digits(tmp_path / "b" / "images", "12", count=4)
    for folder in (first, second, first):
        assert evaluate(run, "--data", folder) == 0
    monkeypatch.chdir(tmp_path / "b")
    assert evaluate(run, "--data", "images") == 0
    assert {figures.data: figures.evaluation.n for figures in recorded(run)} == {
        str(first): 6,
        str(second): 8,
    }
    assert len(list(run.evaluations.iterdir())) == 2


@pytest.mark.parametrize("name", ["/data/../x/ä b:c*", "/", "/data/" + 250 * "x", "/data/\udce9", "/data/.."])
def test_any_path_is_made_a_files_name(name: str, run: RunFolder) -> None:
    file = run.evaluation_of(name)
    assert file.parent == run.evaluations
    assert len(file.name.encode()) < 100
    assert file.name.replace("-", "").replace("_", "").removesuffix(".json").isalnum()
    assert file != run.evaluation_of(name + "x")


def test_out_names_the_file_and_never_replaces_another_kind(
    run: RunFolder, other: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "figures.json"
    for _ in range(2):
        assert evaluate(run, "--data", other, "--out", out) == 0
    assert json.loads(out.read_text("utf-8"))["data"] == str(other)
    assert not run.evaluations.exists()
    capsys.readouterr()
    before = content(run)
    for wrong in (run.evaluation, run.path / "run.txt", tmp_path / "nowhere" / "a.json"):
        assert evaluate(run, "--data", other, "--out", wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith(
            "netfission: --out must be a new file ending in .json, or one with figures on"
        )
        assert error.count("\n") == 1
    assert content(run) == before


@pytest.mark.parametrize(
    "arguments", [["--cascade"], ["--cascade", "--single", "x"], ["--ood", "inverted"], ["--corruptions"]]
)
def test_what_is_measured_on_the_runs_own_data_is_refused_on_others(
    arguments: list[str], run: RunFolder, other: Path, capsys
) -> None:
    before = content(run)
    assert evaluate(run, "--data", other, *arguments) == 2
    assert capsys.readouterr().err == (
        f"netfission: {arguments[0]} must be left out if --data is another data set than the run's, "
        "got both; it is measured on the run's own\n"
    )
    assert content(run) == before
    assert not run.evaluations.exists()


@pytest.mark.parametrize("arguments", [["--split", "all"], ["--data", "digits", "--out", "a.json"]])
def test_options_of_other_data_are_refused_on_the_runs_own(arguments: list[str], run, capsys) -> None:
    assert evaluate(run, *arguments) == 2
    assert "must be left out unless --data is another data set than the run's" in capsys.readouterr().err


def test_the_runs_own_data_by_name_is_evaluated_as_ever(run: RunFolder) -> None:
    before = content(run)
    assert evaluate(run, "--data", "digits") == 0
    assert content(run) == before
    assert not run.evaluations.exists()


@pytest.fixture
def folder_run(settings_of, other: Path, tmp_path: Path) -> RunFolder:
    """A run on the folder `other`."""
    path = tmp_path / "trained"
    settings = settings_of(data=str(other), limit_per_class=None, epochs=1, batch_size=8, sparsity=0.0)
    train(settings, path, progress=False)
    return RunFolder(path)


def test_a_data_set_that_has_moved_is_still_the_runs_own(folder_run: RunFolder, other: Path) -> None:
    config, spec = folder_run.load_config(), folder_run.load_spec()
    copy = shutil.copytree(other, other.with_name("copy"))
    assert is_run_data(config, spec, str(other / ".." / other.name))
    assert is_run_data(config, spec, str(copy))
    (copy / "3" / "more.png").write_bytes(next(copy.rglob("*.png")).read_bytes())
    assert not is_run_data(config, spec, str(copy))  # while its own is there to compare with
    moved = other.rename(other.with_name("moved"))
    assert is_run_data(config, spec, str(moved))
    assert not is_run_data(config, spec, str(copy))
    assert not is_run_data(config, spec, str(write_digits(other.with_name("fewer"), "973", count=11)))
    assert not is_run_data(config, spec, "digits")
    before = content(folder_run)
    assert evaluate(folder_run, "--data", moved) == 0
    assert evaluate(folder_run, "--data", moved, "--ood", "inverted") == 0
    assert folder_run.out_of_distribution.is_file()
    folder_run.out_of_distribution.unlink()
    assert content(folder_run) == before


@pytest.mark.filterwarnings("always::UserWarning")
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_copies_of_images_that_a_run_was_trained_on_are_not_passed_off_as_new(
    split: SplitName, folder_run: RunFolder, other: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    config = folder_run.load_config()
    own = find_splits(str(other), validation=config.data.validation, seed=config.fission.seed)[split]
    copies = tmp_path / "copies"
    for file in (Path(own.records.paths[row]) for row in own.rows[:4]):
        (copies / "3").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copies / "3" / f"{file.parent.name}-{file.name}")
    new = write_digits(tmp_path / "new", "2", count=3) / "2"
    new.rename(copies / "7")
    number = len(list((copies / "3").iterdir()))
    monkeypatch.chdir(tmp_path)
    warned = f"netfission: warning: {number} of {number + 3} images of copies (such as 3/"
    trained_on = f"{warned}*) have the same content as images that the network was trained on"
    own_images = f"{warned}*) have the same content as images of the run's own data set"
    for command, expected in {
        ("evaluate", "--data"): trained_on if split == "train" else "",
        ("calibrate", "--data"): trained_on if split == "train" else "",
        ("evaluate", "--ood"): own_images,
    }.items():
        assert main([command[0], str(folder_run.path), command[1], "copies/"]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert [fnmatch(line, f"{expected}*") for line in lines] == [True] * bool(expected)
    calibration = folder_run.load_calibration()
    assert (calibration.scores is None) == bool(calibration.dependence)
    assert (calibration.scores is None) == (split == "train")
    patient = replace(config, training=replace(config.training, patience=2))
    calibrate(folder_run, patient, str(copies))
    capsys.readouterr()
    assert (folder_run.load_calibration().scores is None) == (split != "test")
    other.rename(other.with_name("moved"))
    assert evaluate(folder_run, "--data", copies) == 0
    assert "same content" not in capsys.readouterr().err  # the run's own data set cannot be read any more


@pytest.mark.parametrize("command", ["report", "export"])
def test_report_and_export_take_no_other_data_for_the_runs_own(
    command: str, folder_run: RunFolder, tmp_path: Path, capsys
) -> None:
    images = write_digits(tmp_path / "images", "973", count=11)  # of the run's classes and size
    before = content(folder_run)
    assert main([command, str(folder_run.path), "--data", str(images)]) == 2
    assert capsys.readouterr().err == (
        "netfission: --data must be where the run's own data set is now "
        f"({folder_run.load_config().data.data} in its settings), got {images}, another data set\n"
    )
    assert content(folder_run) == before


@pytest.mark.filterwarnings("always::UserWarning")
def test_calibrating_on_other_data_is_kept_until_the_run_is_calibrated_again(
    run: RunFolder, other: Path, capsys
) -> None:
    before = content(run)
    replaced = run.load_calibration()
    assert main(["calibrate", str(run.path), "--data", str(other)]) == 0
    shown = capsys.readouterr().out
    calibration, reliability = run.load_calibration(), run.load_reliability()
    assert replaced is not None and calibration is not None and reliability is not None
    assert (calibration.n, calibration.fitted_on) == (36, "images of photographs")
    assert calibration.temperature != replaced.temperature
    assert (reliability.temperature, reliability.n) == (calibration.temperature, 359)
    assert shown.splitlines()[0].startswith(
        f"calibrated: temperature {calibration.temperature:.3f}, from 36 images of photographs, too few "
        "for more than a guess; on these 36 images: NLL "
    )
    assert shown.splitlines()[1].startswith(
        f"before:     temperature {replaced.temperature:.3f}, from {replaced.n} validation images; "
    )
    assert shown.splitlines()[2] == "calibrated on no images of 0, 1, 2, 4, …, 8"
    assert "still at the calibration before: corruptions.json; evaluate again" in shown
    calibrated = content(run)
    changed = {name for name in calibrated if calibrated[name] != before[name]}
    assert changed == {str(run.calibration), str(run.reliability)}
    # Evaluation measures with it and does not replace it.
    assert evaluate(run) == 0
    assert content(run) == calibrated
    assert evaluate(run, "--data", other) == 0
    assert "the run is calibrated on all 36 images of photographs: calibrated" in capsys.readouterr().err
    # Without other data it is that of the run's own validation split again, bit for bit.
    run.corruptions.write_text(json.dumps({"temperature": replaced.temperature}))
    capsys.readouterr()
    assert main(["calibrate", str(run.path)]) == 0
    shown = capsys.readouterr().out
    assert "still at the calibration before: evaluations; evaluate again" in shown
    run.corruptions.write_bytes(before[str(run.corruptions)])
    assert content(run) == before


def test_a_calibration_on_other_data_is_that_of_its_logits(run: RunFolder, other: Path) -> None:
    classifier = Classifier.from_pretrained(run.path)
    files = sorted(other.rglob("*.png"))
    logits = classifier.logits(torch.stack([classifier.pixels(Image.open(file)) for file in files]))
    expected = Calibration.fit(
        logits, torch.tensor([int(file.parent.name) for file in files]), average="logits"
    )
    assert main(["calibrate", str(run.path), "--data", str(other)]) == 0
    calibration = run.load_calibration()
    assert calibration is not None
    assert calibration.temperature == pytest.approx(expected.temperature, rel=1e-4)
    assert Classifier.from_pretrained(run.path).threshold(0.2) == pytest.approx(
        expected.risk_coverage.threshold(0.2), rel=1e-4
    )


@pytest.mark.filterwarnings("always::UserWarning")
def test_where_the_runs_own_data_are_gone_reliability_of_the_old_calibration_is_removed(
    folder_run: RunFolder, other: Path, tmp_path: Path, capsys
) -> None:
    other.rename(other.with_name("moved"))
    assert main(["calibrate", str(folder_run.path)]) == 2
    assert "--data must be a folder that exists" in capsys.readouterr().err
    assert folder_run.reliability.is_file()
    images = write_digits(tmp_path / "new", "37", count=5)
    assert main(["calibrate", str(folder_run.path), "--data", str(images)]) == 0
    shown, warned = capsys.readouterr()
    assert (
        "warning: whether images of new are copies of the run's own was not checked, as the run's" in warned
    )
    assert "no reliability.json any more: the run's own data set cannot be read (data folder " in shown
    assert f"wrote calibration.json in {folder_run.path}\n" in shown
    assert not folder_run.reliability.exists()
    assert main(["calibrate", str(folder_run.path), "--data", str(other.with_name("moved"))]) == 0
    assert folder_run.reliability.is_file()


@pytest.mark.filterwarnings("always::UserWarning")
def test_a_calibration_on_test_images_is_not_measured_on_them(
    folder_run: RunFolder, other: Path, tmp_path: Path, capsys
) -> None:
    config, copied = folder_run.load_config(), tmp_path / "copied"
    test = find_splits(str(other), validation=config.data.validation, seed=config.fission.seed)["test"]
    for row in test.rows:
        file = Path(test.records.paths[row])
        (copied / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copied / file.parent.name)
    assert main(["calibrate", str(folder_run.path), "--data", str(copied)]) == 0
    shown = capsys.readouterr().out
    assert "no reliability.json any more: it is calibrated on test images of its own; " in shown
    assert not folder_run.reliability.exists()
    assert folder_run.load_calibration().scores is not None  # the network does not depend on them
    assert main(["evaluate", str(folder_run.path)]) == 0
    warned = capsys.readouterr().err
    assert "warning: no reliability.json: it is calibrated on test images of its own; 6 of 6 images" in warned
    assert not folder_run.reliability.exists()


def test_a_run_without_validation_images_is_calibrated_on_other_data_alone(
    settings_of, other: Path, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "unheld"
    train(settings_of(validation=0.0, epochs=1, sparsity=0.0, limit_per_class=5), path, progress=False)
    assert main(["calibrate", str(path)]) == 2
    assert capsys.readouterr().err == (
        "netfission: --data must be another data set, as the run held out no images for validation, "
        "got nothing\n"
    )
    assert not (path / "calibration.json").exists()
    assert main(["calibrate", str(path), "--data", str(other)]) == 0
    assert "before:" not in capsys.readouterr().out
    assert Classifier.from_pretrained(path).threshold(0.05) is not None


def test_pages_and_tables_say_what_the_calibration_is_from(run: RunFolder, other: Path, capsys) -> None:
    for file in (run.cascade, run.out_of_distribution, run.corruptions):
        file.unlink()
    assert main(["calibrate", str(run.path), "--data", str(other)]) == 0
    image = next(other.rglob("*.png"))
    assert main(["predict", str(run.path), str(image)]) == 0
    assert "wrong answers within 5 % on the images of photographs" in capsys.readouterr().out
    assert main(["report", str(run.path)]) == 0
    page = run.report.read_text("utf-8")
    assert page.count("36 images of photographs") >= 2
    assert "36 validation images" not in page
    Classifier.from_pretrained(run.path).save_pretrained(run.path.with_name("shared"))
    assert "36 images of photographs" in (run.path.with_name("shared") / "README.md").read_text("utf-8")


def test_a_data_set_that_has_changed_is_refused(tmp_path, capsys):
    """Its splits would be cut again, and images that were trained on would be in the test split."""
    generator = np.random.default_rng(0)

    def add(names):
        for shade, label in ((60, "dark"), (190, "light")):
            (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
            for name in names:
                pixels = generator.integers(shade - 50, shade + 50, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{name}.png")

    add(range(20))
    run, photos = str(tmp_path / "run"), str(tmp_path / "photos")
    settings = [
        "--model",
        "wrn-10-1",
        "--exits",
        "2",
        "--image-size",
        "8",
        "--batch-size",
        "8",
        "--workers",
        "0",
    ]
    train = ["train", "--data", photos, *settings, "--validation", "0.2", "--out", run]
    assert main([*train, "--epochs", "1"]) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.json")}
    shutil.move(photos, tmp_path / "moved")
    assert main(["evaluate", run, "--data", str(tmp_path / "moved")]) == 0  # the same images
    shutil.move(tmp_path / "moved", photos)
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.json")}
    capsys.readouterr()
    first = min(tmp_path.glob("photos/*/*"))
    first.rename(first.with_stem("zzz"))  # as many images, but others are cut from them
    assert main(["evaluate", run]) == 2
    assert "with as many of other names, so that the splits share images" in capsys.readouterr().err
    first.with_stem("zzz").rename(first)
    add(range(20, 30))
    capsys.readouterr()
    message = "--data must be as it was in training, with 26 train images, got "
    for command in ("evaluate", "calibrate"):
        assert main([command, run]) == 2
        error = capsys.readouterr().err
        assert message in error.replace("netfission: data", "netfission: --data") and error.count("\n") == 1
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.json")} == before
    assert main(["export", run]) == 2
    assert "images have been added or removed" in capsys.readouterr().err
    (tmp_path / "run" / "model.safetensors").unlink()
    (tmp_path / "run" / "config.json").unlink()
    assert main([*train, "--epochs", "1", "--resume"]) == 2
    assert "as it was in training" in capsys.readouterr().err
    assert (tmp_path / "run" / "data.json").read_bytes() == before["data.json"]
