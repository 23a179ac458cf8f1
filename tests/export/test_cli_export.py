"""`netfission export`: what it says, and what it refuses."""

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import netfission as nf
from netfission.cli import main
from netfission.data import load_data
from netfission.export.check import check_outputs
from netfission.export.predictor import Predictor
from netfission.runs.folder import RunFolder
from netfission.runs.setup import load_run_data
from netfission.utils.checksums import parse_json

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture
def run_folder(finished_run, tmp_path: Path) -> Path:
    """A copy of a run's folder, to be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def changed(run_folder: Path, **settings) -> None:
    config = run_folder / "config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text("utf-8")) | settings))


def refused(capsys, *flags: str, status: int = 2) -> str:
    assert main(["export", *flags]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("netfission: ")
    return error


def test_it_is_checked_on_the_validation_split_and_written_into_the_run(run_folder, capsys) -> None:
    assert main(["export", str(run_folder)]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"checked on \d+ images of the validation split: probabilities differ by \S+ at most", printed
    )
    assert f"wrote {run_folder / 'model.onnx'}" in printed and (run_folder / "model.onnx").is_file()


def test_it_is_checked_on_the_test_split_where_there_is_no_validation_split(run_folder, capsys) -> None:
    changed(run_folder, validation=0.0)
    folder = RunFolder(run_folder)
    data = load_run_data(folder.load_config().data, folder.load_config().fission.seed)
    description = parse_json(folder.spec.read_text("utf-8"))  # as if it had been trained without one
    folder.spec.write_text(json.dumps(description | {"mean": data.mean, "std": data.std}))
    assert main(["export", str(run_folder), "--out", str(run_folder / "other.pt2")]) == 0
    assert "256 images of the test split" in capsys.readouterr().out
    assert (run_folder / "other.pt2").is_file() and not (run_folder / "model.pt2").exists()


def test_it_is_checked_on_images_of_a_folder_where_the_data_set_is_gone(run_folder, capsys) -> None:
    changed(run_folder, data=str(run_folder / "gone"))
    error = refused(capsys, str(run_folder))
    assert re.search(
        r"data must be the data set that the network was trained on, got \S*gone \(.*\); "
        r"pass --data, where the data set is now, or --images, a folder",
        error,
    )
    for flags in (["--precision", "int8"], ["--cascade"]):  # which take its own images
        error = refused(capsys, str(run_folder), *flags)
        assert error.endswith("; pass --data, where the data set is now\n")
    (run_folder / "config.yaml").rename(run_folder / "kept")
    assert (
        "run must be a folder with config.yaml, or --images, a folder of images like its own, got one without"
        in refused(capsys, str(run_folder))
    )
    assert not (run_folder / "model.onnx").exists()
    folder = run_folder / "photographs" / "some"
    folder.mkdir(parents=True)
    Image.effect_noise((20, 30), 90).save(folder / "noise.png")
    assert main(["export", str(run_folder), "--format", "pt2", "--images", str(folder.parent)]) == 0
    assert f"checked on 1 images of {folder.parent}" in capsys.readouterr().out
    (folder / "broken.png").write_bytes(b"no image")
    error = refused(capsys, str(run_folder), "--images", str(folder))
    assert re.search(r"images must be files that can be read, got \S*broken\.png \(", error)


def test_what_fewer_bits_change_is_printed(run_folder, capsys) -> None:
    assert main(["export", str(run_folder), "--precision", "fp16", "--format", "pt2"]) == 0
    assert re.search(
        r"float32 → fp16 on the validation split: accuracy \d+\.\d\d → \d+\.\d\d %, NLL \d\.\d+ → \d\.\d+ on "
        r"\d+ images; largest difference of a probability \d",
        capsys.readouterr().out,
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--opset 7", "opset must be an integer from 18 to 23, got 7"),
        ("--opset 99", "opset must be an integer from 18 to 23, got 99"),
        ("--opset 0 --format pt2", "--opset must be left out unless --format is onnx, got 0"),
        ("--opset 20 --format pt2", "--opset must be left out unless --format is onnx, got 20"),
        ("--images a --data b", "--data must be left out with --images, got 'b'; they are read in its place"),
        ("--cascade --format pt2", "--cascade must be left out unless --format is onnx, got True"),
        (
            "--precision int8 --format pt2",
            "--precision must be float32 or fp16 unless --format is onnx, got 'int8'",
        ),
        ("--precision int8 --cascade", "--precision must be float32 with --cascade, got 'int8'"),
        (
            "--precision fp16 --images .",
            r"--images must be left out with --precision fp16, got '\.'; they have no labels",
        ),
        ("--images nowhere", "images must be a folder with images, got 'nowhere'"),
        (
            "--out nowhere/model.onnx",
            r"--out must be a file in a folder that exists and can be written to, got nowhere/model\.onnx",
        ),
        ("--out .", r"--out must be a file .*, got \."),
        ("--format pt2 --out a.onnx", r"--out must be a file name that suits the format pt2, got a\.onnx"),
        ("--opset 20 --out a.pt2", "--opset must be left out unless --format is onnx, got 20"),
        ("--cascade --out a.onnx", r"--out must be a folder's name with --cascade, got a\.onnx"),
        (
            "--data nowhere/at-all",
            "data must be the data set that the network was trained on, got nowhere/at-all",
        ),
        ("--format tflite", "--format must be one of onnx, pt2, got 'tflite'"),
    ],
)
def test_a_bad_request_ends_in_one_line_and_leaves_nothing(
    flags, message, run_folder, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(run_folder)
    before = set(run_folder.rglob("*"))
    assert re.search(message, refused(capsys, str(run_folder), *flags.split()))
    assert set(run_folder.rglob("*")) == before


def test_no_folder(capsys) -> None:
    assert "run must be the folder of a run, got nowhere" in refused(capsys, "nowhere")


def test_a_run_without_weights(run_folder, capsys) -> None:
    (run_folder / "model.safetensors").unlink()
    assert "model.safetensors must be the weights of a network, got no such" in refused(
        capsys, str(run_folder)
    )


def test_a_data_set_of_other_classes(run_folder, capsys) -> None:
    for name in ("cat", "dog"):
        (run_folder / "pets" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (8, 8), (name[0] == "c" and "red") or "blue").save(
                run_folder / "pets" / name / f"{number}.png"
            )
    error = refused(capsys, str(run_folder), "--data", str(run_folder / "pets"), "--precision", "int8")
    assert re.search(
        r"data set of 10 classes and images of shape \(1, 8, 8\) that .* trained on, got "
        r"\S*pets with 2 classes and images of shape \(3, 8, 8\)$",
        error,
    )


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_package_that_is_missing(package, run_folder, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(capsys, str(run_folder))
    assert f"format 'onnx' needs {package}; install it by pip install 'netfission[export]'" in error


def test_a_cascade_of_a_run_without_validation_split(run_folder, capsys) -> None:
    changed(run_folder, validation=0.0)
    assert "validation must be above 0 in the run's training, got 0; --cascade chooses" in refused(
        capsys, str(run_folder), "--cascade"
    )
    assert not (run_folder / "cascade").exists()


def test_a_cascade_goes_into_no_folder_of_something_else(run_folder, tmp_path, capsys) -> None:
    (tmp_path / "cascade.json").write_text("of something else")
    for folder in (tmp_path, run_folder):
        error = refused(capsys, str(run_folder), "--cascade", "--out", str(folder))
        assert (
            "--out must be where a folder is new, empty or of earlier output of this command, got " in error
        )
    assert (tmp_path / "cascade.json").read_text() == "of something else"


def test_a_file_that_cannot_be_written_is_named(run_folder, capsys, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device", str(run_folder / "model.pt2"))

    monkeypatch.setattr("netfission.export.write.write_whole", full)
    assert "model.pt2" in refused(capsys, str(run_folder), "--format", "pt2", status=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--risk", "0", "--cascade"], "--risk must be left out with --cascade, got 0"),
        (["--coverage", "0.9", "--cascade"], "--coverage must be left out with --cascade, got 0.9"),
        (["--coverage", "0.999"], "--coverage must be at most 0.99 with 145 calibration images, got 0.999; "),
        (["--score", "aps"], "--score must be left out without a coverage, got 'aps'"),
    ],
)
def test_promises_that_the_file_cannot_keep_are_refused(run_folder, capsys, flags, message) -> None:
    assert message in refused(capsys, str(run_folder), *flags)
    assert not (run_folder / "model.onnx").exists()


def test_a_calibration_on_other_images_promises_nothing_in_fewer_bits(run_folder, capsys) -> None:
    file = run_folder / "calibration.json"
    file.write_text(json.dumps(parse_json(file.read_text("utf-8")) | {"fitted_on": "test images of pets"}))
    error = refused(capsys, str(run_folder), "--risk", "0.1", "--precision", "fp16", "--format", "pt2")
    assert "precision must be float32 with this calibration, got 'fp16'; the network in float32 was" in error
    assert "calibrated on test images of pets" in error and not (run_folder / "model.pt2").exists()


def test_a_file_whose_sets_or_marks_are_others_is_discarded(finished_run) -> None:
    classifier = nf.Classifier.from_pretrained(finished_run)
    limits = classifier.limits(coverage=0.8, risk=0.3, delta=0.2, accept_false_alarms=0.1)
    images = load_data("digits").validation.images[:20]
    predictor = Predictor.from_classifier(classifier, limits=limits)

    def run(name: str = "", **inputs: Tensor) -> dict[str, Tensor]:
        outputs = predictor(inputs["images"])
        if name:
            outputs[name] = ~outputs[name] if outputs[name].dtype == torch.bool else 1 - outputs[name]
        return outputs

    check_outputs(run, classifier, images, limits)
    for output, name in (
        ("set", "sets"),
        ("abstain", "abstentions"),
        ("p_value", "p-values"),
        ("out_of_distribution", "marks"),
    ):
        with pytest.raises(RuntimeError, match=f"^the exported file is discarded: .* of its {name} differ"):
            check_outputs(partial(run, output), classifier, images, limits)
