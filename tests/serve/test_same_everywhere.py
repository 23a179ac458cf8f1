"""Sets, bounds and p-values are the same, image by image, wherever the network runs."""

import json
import shutil

import pytest
import torch
from PIL import Image

from netfission.classifier import Classifier
from netfission.classifier.answer_settings import AnswerSettings
from netfission.cli import main
from netfission.data import load_data

SETTINGS = {"coverage": 0.8, "risk": 0.3, "delta": 0.2, "accept_false_alarms": 0.1, "score": "raps"}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Test images as files, and noise of none of the classes."""
    folder = tmp_path_factory.mktemp("images")
    images = load_data("digits").test.images[:30]
    noise = torch.randint(256, (10, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    paths = [folder / f"{number:02}.png" for number in range(40)]
    for path, image in zip(paths, torch.cat([images, noise]), strict=True):
        Image.fromarray(image[0].numpy()).save(path)
    return paths


def of_python(run, files):
    classifier = Classifier.from_pretrained(run)
    pixels = torch.stack([classifier.pixels(Image.open(file)) for file in files])
    own = classifier.predict(pixels, **SETTINGS)
    return outputs_by_name(
        classifier.spec.classes, own.sets, own.abstains, own.out_of_distribution, own.p_values
    )


def outputs_by_name(names, sets, abstain, marks, p_values):
    return [
        {
            "set": [name for name, inside in zip(names, row, strict=True) if inside],
            "abstain": bool(withheld),
            "out_of_distribution": bool(marked),
            "p_value": float(p),
        }
        for row, withheld, marked, p in zip(sets, abstain, marks, p_values, strict=True)
    ]


def of_command(run, files, capsys):
    capsys.readouterr()
    assert main(["predict", str(run), *map(str, files), *FLAGS, "--format", "jsonl"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def of_onnx(path, files):
    """With nothing but what onnxruntime and the file give."""
    onnxruntime = pytest.importorskip("onnxruntime")
    np = pytest.importorskip("numpy")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["netfission"])
    pixels = np.stack([np.asarray(Image.open(file))[None] for file in files])
    outputs = ("set", "abstain", "out_of_distribution", "p_value")
    found = session.run(list(outputs), {"images": pixels})
    return outputs_by_name(about["classes"], *found), about


def of_pt2(path, files):
    extra = {"netfission.json": ""}
    program = torch.export.load(str(path), extra_files=extra)
    about = json.loads(extra["netfission.json"])
    from torchvision.transforms.functional import pil_to_tensor

    found = program.module()(torch.stack([pil_to_tensor(Image.open(file)) for file in files]))
    found = [found[name] for name in ("set", "abstain", "out_of_distribution", "p_value")]
    return outputs_by_name(about["classes"], *found), about


def test_python_command_onnx_pt2_and_endpoint_say_the_same(finished_run, files, serving, tmp_path, capsys):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    run = shutil.copytree(finished_run, tmp_path / "run")
    expected = of_python(run, files)
    assert {len(one["set"]) for one in expected} != {1}
    for name in ("abstain", "out_of_distribution"):
        assert {one[name] for one in expected} == {False, True}, name  # else a constant would do
    routes = {"predict": of_command(run, files, capsys)}
    for format, load in (("onnx", of_onnx), ("pt2", of_pt2)):
        assert main(["export", str(run), "--format", format, *FLAGS]) == 0
        routes[format], about = load(run / f"model.{format}", files)
        assert {name: about["promises"][name] for name in SETTINGS} == SETTINGS
    with serving(run, answers=AnswerSettings(**SETTINGS)) as server:
        routes["serve"] = [server.predict(file.read_bytes())[2] for file in files]
    images = Classifier.from_pretrained(run).calibration.n
    for route, answers in routes.items():
        for own, answer in zip(expected, answers, strict=True):
            for name in ("set", "abstain", "out_of_distribution"):
                assert answer[name] == own[name], (route, name)
            # Rounding may exchange an image with one of the calibration.
            assert answer["p_value"] == pytest.approx(own["p_value"], abs=1.5 / (images + 1)), route
