"""Exported networks of labels, numbers and pixels give what the network predicts."""

import json
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import netfission as nf
from netfission.cli import main
from netfission.export import export_targets, targets
from netfission.export.samples import sample_split
from netfission.export.targets import TargetModule
from netfission.runs.evaluate import load_matching_data
from netfission.runs.folder import RunFolder
from netfission.tasks import find_task

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def images_of(run):
    folder = RunFolder(run)
    data = load_matching_data(folder, folder.load_config(), folder.load_spec(any_task=True))
    return sample_split(data.test, 100)


def run_file(path, images):
    """What a file gives, by its format's own runtime, and its metadata."""
    if path.suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("netfission.json"))
            written = json.loads(archive.read(name))
        return torch.export.load(str(path)).module()(images), written
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    arrays = session.run(names, {"images": images.numpy()})
    written = json.loads(session.get_modelmeta().custom_metadata_map["netfission"])
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}, written


@pytest.mark.parametrize(
    ("kind", "file", "flags"),
    [
        ("multilabel", "model.onnx", []),
        ("regression", "model.onnx", ["--coverage", "0.8"]),
        ("segmentation", "model.onnx", []),
    ],
)
def test_a_file_gives_what_the_network_predicts(kind, file, flags, run_of, tmp_path, capsys):
    run = run_of(kind)
    assert main(["export", str(run), "--out", str(tmp_path / file), *flags]) == 0
    assert re.search(
        r"checked on \d+ images of the validation split: outputs differ by", capsys.readouterr().out
    )
    predictor, images = nf.Predictor.from_pretrained(run), images_of(run)
    found, written = run_file(tmp_path / file, images)
    assert set(found) == set(written["outputs"]) <= set(predictor.task.exported)
    assert written["task"] == kind and written["classes"] == predictor.spec.classes
    predictions = predictor.predict(images, coverage=0.8 if flags else None)
    if kind == "segmentation":
        maps = [
            torch.tensor(list(predictions.class_map(row).get_flattened_data())) for row in range(len(images))
        ]
        assert torch.equal(found["classes"].flatten(1).long(), torch.stack(maps).long())
        entropies = [record["entropy"] for record in predictions.records()]
        assert found["entropy"].mean(dim=(1, 2)).tolist() == pytest.approx(entropies, rel=1e-4)
        assert found["classes"].dtype == torch.uint8
        return
    for name, values in found.items():
        expected = getattr(predictions, name)
        if expected.is_floating_point():
            torch.testing.assert_close(values, expected.float(), rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(values, expected)
    assert ("intervals" in found) == bool(flags)


def test_a_file_that_gives_something_else_is_discarded(run_of, tmp_path, monkeypatch):
    predictor, images = nf.Predictor.from_pretrained(run_of("multilabel")), images_of(run_of("multilabel"))
    right = TargetModule.outputs

    def wrong(module, outputs):
        found = right(module, outputs)
        return found | {"labels": ~found["labels"]}

    monkeypatch.setattr("netfission.export.targets.TargetModule.outputs", wrong)
    monkeypatch.setattr(
        TargetModule,
        "forward",
        lambda module, images: right(module, module.network(module.normalise(images))),
    )
    with pytest.raises(
        RuntimeError, match=r"is discarded: its values differ from PyTorch's by more than round"
    ):
        export_targets(predictor, tmp_path / "model.pt2", images, format="pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spoil", [lambda mean: mean * torch.nan, lambda mean: mean + torch.tensor([0, 1e-3])]
)
def test_each_number_is_checked_in_its_own_unit(spoil, monkeypatch):
    task = find_task("regression", ["metres", "share"], {"mean": [0.0, 0.5], "std": [1e6, 0.01]})
    module = TargetModule(
        nn.Flatten(), nn.Identity(), task, average="logits", calibration=None, coverage=None
    )
    outputs = torch.randn(6, 2, 4)
    right = module.outputs(outputs)
    predictor = SimpleNamespace(logits=lambda _: outputs)
    images = torch.zeros(1, 1)  # `check_batches` gives them at once
    assert targets._check(lambda images: right, module, predictor, images) == 0
    with pytest.raises(RuntimeError, match="is discarded"):
        targets._check(lambda images: right | {"mean": spoil(right["mean"])}, module, predictor, images)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--precision", "fp16"], "--precision must be left out for a run of task=multilabel, got 'fp16'"),
        (["--cascade"], "--cascade must be left out for a run of task=multilabel, got True"),
        (["--risk", "0"], "--risk must be left out for a run of task=multilabel, got 0"),
        (["--coverage", "0.9"], "--coverage must be left out for a run of task=multilabel, got 0.9"),
    ],
)
def test_what_has_no_meaning_for_the_task_is_refused(flags, message, run_of, tmp_path, capsys):
    assert main(["export", str(run_of("multilabel")), "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_the_runs_data_the_error_says_what_to_pass(run_of, tmp_path, capsys):
    copied = Path(shutil.copytree(run_of("multilabel"), tmp_path / "run"))
    (copied / "config.yaml").unlink()
    assert main(["export", str(copied), "--out", str(tmp_path / "out.pt2")]) == 2
    assert (
        "a folder with config.yaml, or --images, a folder of images like its own" in capsys.readouterr().err
    )
    photographs = Path(RunFolder(run_of("multilabel")).load_config().data.data).parent
    (tmp_path / "images").mkdir()
    shutil.copy(photographs / "3.png", tmp_path / "images")
    flags = ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "out.pt2")]
    assert main(["export", str(copied), *flags]) == 0
    assert "checked on 1 images of" in capsys.readouterr().out
