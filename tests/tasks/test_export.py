"""Exported networks of labels, numbers and pixels give what the network predicts."""

import importlib.util
import json
import re
import shutil
import zipfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import netfission as nf
from netfission.classifier.folder import NetworkSpec
from netfission.cli import main
from netfission.cli.export import _plan
from netfission.export import export_targets, targets
from netfission.export.cascade import TARGET, Plan, Step, export_cascade
from netfission.export.cascade_answers import answers_of
from netfission.export.check import largest_magnitude
from netfission.export.predictor import trace
from netfission.export.samples import labelled_batches, sample_split
from netfission.export.targets import TargetModule
from netfission.runs.evaluate import load_matching_data
from netfission.runs.folder import RunFolder
from netfission.tasks import find_task
from netfission.tasks.segmentation import Segmentation

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("one_table_of_operators")


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def script():
    """The example that runs a cascade with onnxruntime alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        spec = importlib.util.spec_from_file_location("cascade", EXAMPLES / "run_onnx_cascade.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


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
        (["--cascade", "--precision", "fp16"], "--precision must be float32 with --cascade, got 'fp16'"),
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


class Skipping(nn.Module):
    """A network whose later layers read the first one's maps, too; of maps, or of their means."""

    def __init__(self, outputs, *, pooled):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.third = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.last = nn.Linear(8, outputs) if pooled else nn.Conv2d(8, outputs, 1)
        self.pooled = pooled

    def forward(self, images):
        early = self.first(images)
        maps = torch.cat([early, self.third(self.second(early))], dim=1)
        return self.last(maps.mean(dim=(2, 3)) if self.pooled else maps)


def skipping(kind, images):
    """A predictor of two exits, calibrated on random targets of some images."""
    names = ["road", "sky"]
    scale = {"mean": [1.0, 0.0], "std": [2.0, 0.5]} if kind == "regression" else {}
    task = find_task(kind, names, scale)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Skipping(task.outputs, pooled=not task.draws_maps)
        network = nf.fission(model, 2, stages=["second", "third"], example_input=torch.zeros(1, 3, 8, 8))
        targets = torch.rand(len(images), 2) if kind == "regression" else torch.randint(2, (len(images), 2))
        targets = torch.randint(2, (len(images), 8, 8)) if task.draws_maps else targets.float()
    shape, mean, std = [3, 8, 8], [0.5] * 3, [0.2] * 3
    spec = NetworkSpec(
        "own", names, shape, mean, std, fission={"exits": 2}, netfission="0.1.0", task=kind, scale=scale
    )
    predictor = nf.Predictor(network.eval(), spec)
    predictor.calibration = task.calibrate(predictor.logits(images), targets, average="logits")
    return predictor


IMAGES = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_cascade_stops_where_pytorch_stops_and_answers_so(tmp_path, script):
    kind = "segmentation"  # graphs of other tasks take seconds, too; see the test of a traced step
    predictor = skipping(kind, IMAGES)
    task, rule = predictor.task, predictor.task.early_exit()
    outputs = predictor.logits(IMAGES)
    confidence = rule.confidence(outputs[:, 1])
    threshold = confidence.sort().values[9:11].mean().item()  # half of the images stop
    plan = Plan((1, 0), (threshold,), rule.name)
    assert export_cascade(predictor, plan, tmp_path / "cascade", IMAGES[:5]) <= 1e-4
    answers, used = script.Cascade(tmp_path / "cascade")(IMAGES.numpy())
    cascade = nf.Cascade(predictor.network, plan.thresholds, order=plan.order, rule=rule)
    assert used.tolist() == cascade.run(predictor._normalise(IMAGES)).exits_used.tolist()
    assert sorted(used) == [1] * 10 + [2] * 10
    assert list(answers) == list(task.exported_early)
    for row, exits in enumerate(used):
        ran = outputs[[row]][:, [1, 0][:exits]]
        expected = task.export(ran, average="logits", calibration=predictor.calibration)
        for name, values in answers.items():
            found = torch.from_numpy(values[[row]]).double()
            assert torch.allclose(found, expected[name].double(), atol=1e-4), name
    metadata = json.loads((tmp_path / "cascade" / "cascade.json").read_text("utf-8"))
    assert (metadata["task"], metadata["rule"]) == (kind, rule.name)
    features = [name for name in metadata["steps"][1]["inputs"] if name.startswith("features")]
    assert features == ["features_1_0", "features_1_1"]  # all that a stage passes on
    assert script.describe({name: values[0] for name, values in answers.items()}, metadata)


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_a_traced_step_answers_as_the_ensemble_of_the_exits_so_far(kind):
    predictor = skipping(kind, IMAGES)
    answers, rule = answers_of(predictor)
    cascade = nf.Cascade(predictor.network, (1.0,), order=(1, 0), rule=rule)
    first, last = (Step(cascade, number, predictor._normalise, answers, {1: 2}) for number in range(2))
    with torch.no_grad():
        state = first(IMAGES)
        inputs = {name: state[name] for name in last.inputs}
        found = trace(last, inputs).module()(*(value[:3] for value in inputs.values()))
    outputs = predictor.logits(IMAGES[:3])[:, [1, 0]]
    expected = predictor.task.export(outputs, average="logits", calibration=predictor.calibration)
    for name in predictor.task.exported_early:
        assert torch.allclose(found[name].double(), expected[name].double(), atol=1e-4), name
    assert torch.allclose(found["confidence"], rule.confidence(rule.combined(outputs)), atol=1e-4)
    assert torch.allclose(state["confidence"][:3], rule.confidence(outputs[:, 0]), atol=1e-5)


@pytest.mark.parametrize("weights", [None, (1.0, 0.5)])
@pytest.mark.parametrize("kind", ["multilabel", "regression", "segmentation"])
def test_answers_of_a_graph_are_compared_up_to_rounding(kind, weights):
    predictor = skipping(kind, IMAGES)
    answers, rule = answers_of(predictor)
    outputs = predictor.logits(IMAGES)
    combined = answers.combined(outputs, weights)
    assert torch.equal(combined, rule.combined(outputs, weights))
    right = answers.answers(outputs, combined, weights)
    assert largest_magnitude(answers.differences(right, outputs, combined, weights)) == 0
    for name, values in right.items():
        wrong = values + 0.01 if values.is_floating_point() else 1 - values.int()
        differences = answers.differences(right | {name: wrong}, outputs, combined, weights)
        assert largest_magnitude(differences) > 1e-4, name


def test_what_evaluate_chose_is_taken_unless_it_is_of_tiles_or_of_another_rule(run_of, tmp_path, capsys):
    run = Path(shutil.copytree(run_of("segmentation"), tmp_path / "run"))
    chosen = {"order": [1, 0], "rule": "certainty", "choice": {"thresholds": [0.625]}}
    for change, message in (
        (
            {"tile": 4},
            "cascade.json must be of whole images, which an exported cascade runs, got one of tiles",
        ),
        ({"rule": "margin"}, "rule must be certainty with task=segmentation, got 'margin'"),
    ):
        (run / "cascade.json").write_text(json.dumps(chosen | change))
        assert main(["export", str(run), "--cascade"]) == 2
        assert message in capsys.readouterr().err
    (run / "cascade.json").write_text(json.dumps(chosen | {"tile": None}))
    assert Plan.read(run / "cascade.json", "") == Plan([1, 0], [0.625], "certainty", dict.fromkeys(TARGET))


def test_thresholds_are_chosen_in_batches_of_the_task(run_of, monkeypatch):
    folder = RunFolder(run_of("segmentation"))
    monkeypatch.setattr(Segmentation, "batch_size", classmethod(lambda kind, shape, limit: 7))
    monkeypatch.setattr(Plan, "choose", lambda network, batches: [len(images) for images, _ in batches])
    predictor = nf.Predictor.from_pretrained(folder.path)
    assert _plan(predictor, folder.load_config(), Namespace(data=None)) == [7, 7, 6]


@pytest.mark.parametrize("kind", ["multilabel", "regression", "segmentation"])
def test_where_nothing_was_chosen_it_is_on_validation_images(kind, run_of):
    folder = RunFolder(run_of(kind))
    predictor = nf.Predictor.from_pretrained(folder.path)
    data = load_matching_data(folder, folder.load_config(), predictor.spec)
    plan = Plan.choose(predictor, labelled_batches(data.validation, 0))
    rule, images = predictor.task.early_exit(), data.validation.images
    outputs, targets = predictor.logits(images), data.validation.labels.long()
    targets = targets if kind == "segmentation" else data.validation.labels
    so_far = [rule.combined(outputs[:, plan.order[: step + 1]]) for step in range(2)]
    stops = rule.confidence(so_far[0]) > plan.thresholds[0]
    counts = [rule.counts(part, targets) for part in so_far]
    chosen = torch.where(stops[:, None], counts[0], counts[1])
    assert rule.score(counts[1].sum(dim=0)) - rule.score(chosen.sum(dim=0)) <= 0.002 + 1e-9
    assert plan.target == {
        "max_accuracy_drop": 0.2,
        "max_cost": None,
        "delta": None,
        "validation_images": 20,
    }
