"""The scripts that run exported files predict what netfission predicts, without it."""

import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import netfission as nf
from netfission.cli import main
from netfission.data import load_data
from netfission.data.images import to_pixels, to_pixels_within
from netfission.export import export
from netfission.export.cascade import Plan, Step, check_cascade, export_cascade
from netfission.export.cascade_answers import ClassAnswers
from netfission.export.onnx import OnnxModel
from netfission.inference.cascade import step_by_step
from netfission.models import create_model
from netfission.runs.folder import RunFolder
from netfission.runs.setup import build_network, load_run_data, network_spec
from netfission.runs.train import train

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXAMPLES = Path(__file__).parents[2] / "examples"
# Everything of netfission and of PyTorch is as if it were not installed.
ALONE = """
import runpy, sys
for name in ("torch", "torchvision", "timm", "netfission", "onnx", "onnxscript", "scipy", "sklearn"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(script: str, *arguments: str | Path, bad: int = 0) -> str:
    """Return what a script prints; `bad` of the images cannot be read."""
    command = [sys.executable, "-c", ALONE, EXAMPLES / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr.count("\n")) == (bad > 0, bad), done.stderr
    assert done.stderr.count(": cannot be read (") == bad
    return done.stdout


def imported(script: str, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location(script, EXAMPLES / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def files(digits, tmp_path_factory) -> list[Path]:
    """Images of digits."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.png" for number in range(12)]
    for path, image in zip(paths, digits.test.images[::25], strict=False):
        Image.fromarray(image[0].numpy()).save(path)
    return paths


@pytest.fixture(scope="module")
def model(finished_run, digits, tmp_path_factory) -> Path:
    """The finished run as an ONNX file."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    export(nf.Classifier.from_pretrained(finished_run), path, digits.validation.images[:5])
    return path


def test_run_onnx_says_what_the_classifier_predicts(finished_run, model, files) -> None:
    classifier = nf.Classifier.from_pretrained(finished_run)
    risk = sorted(set(classifier.calibration.risk_coverage.risk))[1]
    printed = run_alone("run_onnx.py", model, *files, "--risk", str(risk)).splitlines()
    pixels = torch.stack([classifier.pixels(Image.open(file)) for file in files])
    expected = classifier.predict(pixels, risk=risk)
    assert expected.abstains.any()  # else the answers would not show it
    assert len(printed) == len(files)
    for row, (file, line) in enumerate(zip(files, printed, strict=True)):
        name, answer, probability, votes, disagreement, entropy = re.fullmatch(
            r"(.*): (\w+), probability (\S+); exits vote (.*); disagreement (\S+), entropy (\S+) nats", line
        ).groups()
        assert name == str(file)
        assert answer == ("abstains" if expected.abstains[row] else str(expected.classes[row].item()))
        assert votes.split(", ") == [str(vote) for vote in expected.votes[row].tolist()]
        assert float(probability) == pytest.approx(expected.confidence[row].item(), abs=1e-4)
        assert float(disagreement) == pytest.approx(expected.disagreement[row].item(), abs=1e-3)
        assert float(entropy) == pytest.approx(expected.entropy[row].item(), abs=2e-4)


@pytest.fixture(scope="module")
def bad(files, tmp_path_factory) -> list[Path]:
    """Files that are no whole image, and one that is too large a one."""
    folder = tmp_path_factory.mktemp("bad")
    whole = files[0].read_bytes()
    for name, content in {"cut.png": whole[:-30], "empty.png": b"", "text.jpg": b"no image"}.items():
        (folder / name).write_bytes(content)
    Image.new("1", (10_000, 10_000)).save(folder / "bomb.png")
    return [*folder.iterdir(), folder / "nowhere.png"]


def test_run_onnx_answers_what_can_be_read(model, files, bad) -> None:
    given = [bad[0], files[0], *bad[1:], files[1]]
    printed = run_alone("run_onnx.py", model, *given, bad=len(bad))
    assert [line.split(": ")[0] for line in printed.splitlines()] == [str(file) for file in files[:2]]
    assert run_alone("run_onnx.py", model, *bad, bad=len(bad)) == ""


def test_run_onnx_refuses_what_is_no_such_network(model, files, tmp_path) -> None:
    (tmp_path / "text.onnx").write_text("no network")
    for name, flags, told in (
        ("nowhere.onnx", [], "must be a network exported by netfission, got an error ("),
        ("text.onnx", [], "must be a network exported by netfission, got an error ("),
        (model, ["--risk", "nan"], "--risk must be a share from 0 to 1, got nan"),
    ):
        command = [sys.executable, EXAMPLES / "run_onnx.py", tmp_path / name, files[0], *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2
        assert told in done.stderr.splitlines()[-1]


def drawn(mode: str, size: tuple[int, int]) -> Image.Image:
    generator = np.random.default_rng(0)
    if mode == "I;16":
        return Image.fromarray(generator.integers(0, 65536, size[::-1]).astype(np.uint16))
    if mode.startswith("F"):
        return Image.fromarray((float(mode[2:]) * generator.random(size[::-1])).astype(np.float32))
    layers = generator.integers(0, 256, (*size[::-1], 4)).astype(np.uint8)
    image = Image.fromarray(layers, "RGBA" if mode == "RGBA" else None).convert(mode)
    if mode == "RGB":
        image.getexif()[0x0112] = 6  # lies on its side
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 10), (31, 17), (4, 5)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "I;16", "F;1", "F;300"])
def test_images_are_made_ready_as_in_training(mode, size, channels, monkeypatch) -> None:
    image = drawn(mode, size)
    wanted = to_pixels(image, "L" if channels == 1 else "RGB", (10, 8))
    preprocessing = {"mode": "L" if channels == 1 else "RGB", "height": 10, "width": 8}
    found = imported("run_onnx", monkeypatch).to_pixels(image, preprocessing)
    assert found.dtype == np.uint8
    assert np.array_equal(found, wanted.numpy())


def test_photographs_of_maps_are_fitted_as_in_training(monkeypatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    preprocessing = {"mode": "RGB", "height": 9, "width": 8, "crops": False}
    found = imported("run_onnx", monkeypatch).to_pixels(image, preprocessing)
    assert np.array_equal(found, to_pixels_within(image, "RGB", (9, 8)).numpy())
    assert not found[:, 5:].any() and found[:, :5].any()


# --- cascades ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["margin", "confidence", "agreement"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_steps_give_what_the_cascade_gives(order, rule) -> None:
    """Step by step in PyTorch: every order needs other features of the stages that are shared."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nf.fission(create_model("wrn-10-1", 5), 3, example_input=torch.zeros(2, 3, 16, 16)).eval()
        images = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8)
    classifier = nf.Classifier.from_network(
        net, model="wrn-10-1", classes=list("abcde"), shape=(3, 16, 16), mean=[0.5] * 3, std=[0.2] * 3
    )
    cascade = nf.Cascade(net, (0.4, 0.6), order=order, rule=rule)
    logits = classifier.logits(images)
    means, scores = step_by_step(logits, order, rule)
    state = {"images": images}
    for number in range(3):
        step = Step(cascade, number, classifier._normalise, ClassAnswers(2.0))
        with torch.no_grad():
            outputs = step(*(state[name] for name in step.inputs))
        assert list(outputs) == step.outputs
        torch.testing.assert_close(outputs["probabilities"], (means[:, number] / 2).softmax(dim=1))
        if number < 2:
            torch.testing.assert_close(outputs["confidence"], scores[:, number])
        state = {name: (state | outputs)[name] for name in step.keeps}
    assert not state


def test_an_exported_cascade_stops_where_the_cascade_does(
    settings_of, digits, files, bad, tmp_path, monkeypatch
) -> None:
    train(settings_of(exits=3, sparsity=0.0, epochs=3), tmp_path / "run", progress=False)
    classifier = nf.Classifier.from_pretrained(tmp_path / "run")
    images = digits.test.images
    order = nf.exit_costs(classifier.network, torch.zeros(1, 1, 8, 8)).order
    _, confidence = step_by_step(classifier.logits(images), order, "margin")
    plan = Plan(order, (confidence[:, 0].median().item(), confidence[:, 1].quantile(0.25).item()), "margin")
    assert export_cascade(classifier, plan, tmp_path / "cascade", digits.validation.images[:20]) <= 1e-4
    script = imported("run_onnx_cascade", monkeypatch)
    answers, used = script.Cascade(tmp_path / "cascade")(images.numpy())
    cascade = nf.Cascade(classifier.network, plan.thresholds, order=order)
    expected = cascade.run(classifier._normalise(images))
    assert expected.exits_used.unique().tolist() == [1, 2, 3]
    assert np.array_equal(used, expected.exits_used.numpy())
    wanted = (expected.logits / classifier.temperature).softmax(dim=1).numpy()
    np.testing.assert_allclose(answers["probabilities"], wanted, rtol=0, atol=1e-4)
    assert np.array_equal(answers["classes"], wanted.argmax(axis=1))
    printed = run_alone("run_onnx_cascade.py", tmp_path / "cascade", *bad, *files, bad=len(bad)).splitlines()
    assert run_alone("run_onnx_cascade.py", tmp_path / "cascade", *bad, bad=len(bad)) == ""
    shown = torch.stack([classifier.pixels(Image.open(file)) for file in files])
    alone = cascade.run(classifier._normalise(shown))
    for file, line, own, exits in zip(files, printed, alone.logits, alone.exits_used, strict=True):
        assert line.startswith(f"{file}: {own.argmax().item()}, probability ")
        assert line.endswith(f", {exits} of 3 exits")


@pytest.fixture(scope="module")
def graphs() -> dict[int, OnnxModel]:
    """The steps of the finished run's cascade from exit 1 to exit 0, once they are exported."""
    return {}


@pytest.fixture
def steps_exported_once(graphs):
    """Tests of what comes after the export share it."""
    export_step = OnnxModel.from_module

    def once(step, *arguments) -> OnnxModel:
        assert step.cascade.order == (1, 0)
        if step.step not in graphs:
            graphs[step.step] = export_step(step, *arguments)
        return graphs[step.step]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxModel, "from_module", once)
        yield


@pytest.mark.usefixtures("steps_exported_once")
def test_a_cascade_that_gives_other_probabilities_is_not_kept(finished_run, digits, monkeypatch, tmp_path):
    classifier = nf.Classifier.from_pretrained(finished_run)
    other = torch.tensor([0.0, 2e-4])
    monkeypatch.setattr("netfission.export.cascade._differences", lambda *_: [other])
    with pytest.raises(RuntimeError, match=r"is discarded: its probabilities on 5 images differ by 0\.0002"):
        export_cascade(
            classifier, Plan((1, 0), (0.5,), "margin"), tmp_path / "cascade", digits.test.images[:5]
        )
    assert not (tmp_path / "cascade").exists()


@pytest.mark.usefixtures("steps_exported_once")
def test_a_cascade_that_cannot_be_written_leaves_the_one_before(finished_run, digits, monkeypatch, tmp_path):
    classifier, plan = nf.Classifier.from_pretrained(finished_run), Plan((1, 0), (0.5,), "margin")
    before = {"step0.onnx": b"of the network before", "cascade.json": b"that, too"}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)

    def fails_at_the_second(name: str) -> None:
        own, done = getattr(os, name), []

        def call(*arguments: object) -> None:
            done.append(1)
            if len(done) == 2:
                raise OSError(errno.ENOSPC, "disk full")
            own(*arguments)

        monkeypatch.setattr(os, name, call)
        with pytest.raises(OSError, match="disk full"):
            export_cascade(classifier, plan, tmp_path, digits.test.images[:3])
        monkeypatch.undo()

    fails_at_the_second("fsync")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    fails_at_the_second("replace")  # no index, for it would name graphs of two networks
    assert not (tmp_path / "cascade.json").exists()


def test_what_evaluate_chose_is_taken(finished_run, tmp_path, capsys) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    chosen = {"order": [0, 1], "rule": "confidence", "choice": {"thresholds": [0.625]}}
    target = {"max_accuracy_drop": 2.0, "max_cost": None, "delta": 0.1, "validation_images": 145}
    chosen |= target
    (run / "cascade.json").write_text(json.dumps(chosen))
    assert main(["export", str(run), "--cascade"]) == 0
    assert "order 0, 1; an image stops at confidence above 0.625" in capsys.readouterr().out
    index = json.loads((run / "cascade" / "cascade.json").read_text("utf-8"))
    assert [(step["exit"], step["threshold"]) for step in index["steps"]] == [(0, 0.625), (1, None)]
    assert index["target"] == target
    other = chosen | {"weights": "0" * 64}
    (run / "cascade.json").write_text(json.dumps(other))
    assert main(["export", str(run), "--cascade"]) == 2
    assert "cascade.json must be of this network, got one of another network; " in capsys.readouterr().err
    own = chosen | {"weights": RunFolder(run).weights_sha256()}
    assert Plan.read(_written(run / "cascade.json", own), own["weights"]).target == target
    (run / "cascade.json").write_text("{}")
    assert main(["export", str(run), "--cascade"]) == 2
    assert (
        "cascade.json must be a file written by netfission evaluate --cascade, got other content"
        in capsys.readouterr().err
    )


def _written(file: Path, content: dict) -> Path:
    file.write_text(json.dumps(content))
    return file


def test_where_nothing_was_chosen_it_is_on_the_validation_split(
    finished_run, settings_of, capsys, monkeypatch
) -> None:
    taken = []
    monkeypatch.setattr(
        "netfission.export.cascade.export_cascade",
        lambda _, plan, *args, **settings: taken.append(plan) or 0.0,
    )
    assert main(["export", str(finished_run), "--cascade"]) == 0
    assert "an image stops at margin above" in capsys.readouterr().out
    classifier, split = (
        nf.Classifier.from_pretrained(finished_run),
        load_run_data(settings_of().data, 3).validation,
    )
    costs = nf.exit_costs(classifier.network, torch.zeros(1, 1, 8, 8))
    wanted = nf.choose_thresholds(
        classifier.logits(split.images), split.labels, costs.dense, order=costs.order, max_accuracy_drop=0.2
    )
    target = {"max_accuracy_drop": 0.2, "max_cost": None, "delta": None, "validation_images": 145}
    assert taken == [Plan(costs.order, pytest.approx(wanted.thresholds), "margin", target)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "deep-ensemble"}, "two exits or more to export a cascade, got method=deep-ensemble$"),
        ({"exits": 1}, "two exits or more to export a cascade, got one exit$"),
    ],
)
def test_a_network_without_exits_to_stop_at_is_refused(changes, message, settings_of) -> None:
    config = settings_of(sparsity=0.0, **changes)
    data = load_run_data(config.data, 3)
    with pytest.raises(ValueError, match=message):
        check_cascade(nf.Classifier(build_network(config, data), network_spec(config, data)))
