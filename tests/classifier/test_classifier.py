import copy
import hashlib
import itertools
import json
import math
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import netfission as nf
from netfission.classifier.folder import NetworkSpec, state_sha256
from netfission.classifier.model_card import model_card
from netfission.classifier.predictions import AnswerLimits
from netfission.cli import main
from netfission.evaluation.calibration import Calibration
from netfission.models import create_model
from netfission.runs.calibrate import calibrate
from netfission.runs.evaluate import evaluate, evaluate_cascade
from netfission.runs.folder import RunFolder
from netfission.runs.setup import load_run_data
from netfission.runs.train import train
from netfission.utils.checksums import parse_json

SHAPE = (3, 8, 8)
IMAGES = torch.randint(256, (6, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class OwnNet(nn.Module):
    """A user's own model."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, 12, 3, padding=1)
        self.second = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3))
        self.third = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3))
        self.head = nn.Linear(12, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.third(self.second(self.first(images)))
        return self.head(features.mean(dim=(2, 3)))


def described(network: nf.FissionNetwork, model: str | None) -> nf.Classifier:
    with torch.no_grad():
        for parameter in network.parameters():  # as if trained: far from what any seed draws
            parameter.mul_(1.5).add_(0.01 * (parameter != 0))
    return nf.Classifier.from_network(
        network, model=model, classes=list("abcd"), shape=SHAPE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)
    )


def test_saved_and_loaded_in_another_process_logits_are_the_same(tmp_path):
    saved = {}
    for grouping, sparsity in itertools.product(["weights", "channels", "copies"], [0.0, 0.5]):
        network = nf.fission(
            create_model("wrn-10-1", 4), 3, branch_after=[1, 1], grouping=grouping, sparsity=sparsity,
            criterion="magnitude", example_input=torch.zeros(2, *SHAPE), ratio=[2, 1, 1], seed=7,
        )  # fmt: skip
        name = f"{grouping}-{sparsity}"
        saved[name] = described(network, "wrn-10-1")
        saved[name].save_pretrained(tmp_path / name)
    torch.save(IMAGES, tmp_path / "images.pt")
    code = """if True:
        import sys
        from pathlib import Path
        import torch
        import netfission as nf
        images = torch.load(sys.argv[1])
        for folder in map(Path, sys.argv[2:]):
            torch.save(nf.Classifier.from_pretrained(folder).logits(images), folder / "logits.pt")
    """
    folders = [tmp_path / name for name in saved]
    subprocess.run([sys.executable, "-c", code, tmp_path / "images.pt", *folders], check=True)
    for name, classifier in saved.items():
        assert torch.equal(torch.load(tmp_path / name / "logits.pt"), classifier.logits(IMAGES)), name


@pytest.mark.parametrize("grouping", ["weights", "channels"])
def test_a_network_of_an_own_factory_comes_back(grouping, tmp_path):
    network = nf.fission(
        OwnNet(4, 3), 2, stages=["second", "third"], grouping=grouping, example_input=torch.zeros(2, *SHAPE)
    )
    classifier = described(network, None)
    classifier.save_pretrained(tmp_path)
    again = nf.Classifier.from_pretrained(tmp_path, factory=OwnNet)
    assert torch.equal(again.logits(IMAGES), classifier.logits(IMAGES))
    with pytest.raises(ValueError, match=r"factory must be the function that makes .* has no name, got None"):
        nf.Classifier.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors must be the weights of .*json, got others"):
        nf.Classifier.from_pretrained(tmp_path, factory=_wider)


def _wider(num_classes: int, in_channels: int) -> nn.Module:
    model = OwnNet(num_classes, in_channels)
    model.first = nn.Conv2d(in_channels, 12, 5, padding=2)
    return model


def test_no_file_is_a_pickle(finished_run, tmp_path):
    nf.Classifier.from_pretrained(finished_run).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "calibration.json", "evaluation.json", "README.md"}
    for path in tmp_path.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, ImportError)):
            pickle.loads(path.read_bytes())


def test_a_runs_predictions_are_those_of_its_evaluation(finished_run, tmp_path):
    folder = RunFolder(shutil.copytree(finished_run, tmp_path / "run"))
    config = folder.load_config()
    evaluation = evaluate(folder, config)
    classifier = nf.Classifier.from_pretrained(folder.path)
    data = load_run_data(config.data, config.fission.seed)
    predictions = classifier.predict(data.test.images)
    assert (predictions.classes == data.test.labels).double().mean().item() == pytest.approx(
        evaluation.ensemble["top1"], abs=1e-6
    )
    assert predictions.disagreement.mean().item() == pytest.approx(evaluation.disagreement, abs=1e-6)
    own = classifier.predict(data.validation.images).probabilities.gather(1, data.validation.labels[:, None])
    assert -own.log().mean().item() == pytest.approx(classifier.calibration.scaled["nll"], rel=1e-4)
    assert classifier.calibration.scaled["nll"] <= classifier.calibration.raw["nll"] + 1e-9
    assert classifier.temperature == classifier.calibration.temperature != 1


def test_it_abstains_where_the_risk_would_be_too_high(finished_run):
    classifier = nf.Classifier.from_pretrained(finished_run)
    images = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8)
    assert classifier.predict(images).abstains is None
    cautious, bold = (classifier.predict(images, risk=risk).abstains for risk in (0.0, 1.0))
    assert cautious.sum() > bold.sum()
    predictions = classifier.predict(images)
    least = predictions.confidence.min().item()
    assert not replace(predictions, threshold=least).abstains.any()  # as sure as it has to be
    assert replace(predictions, threshold=least + 1e-6).abstains.any()
    with pytest.raises(
        ValueError, match=r"risk must be left out for a network without calibration, got 0\.1"
    ):
        nf.Classifier(classifier.network, classifier.spec).predict(images, risk=0.1)


def test_sets_and_bounded_abstention_are_of_the_probabilities_before_calibration(finished_run, tmp_path):
    classifier = nf.Classifier.from_pretrained(finished_run)
    images = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    raw = nf.ensemble_probabilities(classifier.logits(images).double())
    scores = classifier.calibration.scores
    assert len(scores.labels) == classifier.calibration.n
    predictions = classifier.predict(images, coverage=0.9, risk=0.3, delta=0.2)
    quantile = scores.quantiles(0.9, "lac", classifier.spec.classes, delta=0.2)[0]
    assert predictions.sets.tolist() == (-raw.log() <= quantile).tolist()
    assert 0 < predictions.sets.double().mean() < 1
    threshold = scores.threshold(0.3, 0.2)
    assert predictions.abstains.tolist() == (raw.amax(dim=1) < threshold).tolist()
    assert torch.equal(predictions.logits, classifier.predict(images).logits)
    limits = classifier.limits(coverage=0.9, score="aps")
    assert limits.quantiles == scores.quantiles(0.9, "aps", classifier.spec.classes)
    assert classifier.predict_within(images, limits).abstains is None
    classifier.save_pretrained(tmp_path)
    again = nf.Classifier.from_pretrained(tmp_path).predict(images, coverage=0.9, risk=0.3, delta=0.2)
    assert torch.equal(again.sets, predictions.sets)
    assert torch.equal(again.abstains, predictions.abstains)


def test_bounds_and_sets_are_of_the_answers_that_are_given_if_probabilities_are_averaged(monkeypatch):
    net = nf.fission(create_model("wrn-10-1", 3), exits=2, example_input=IMAGES.float())
    classifier = nf.Classifier.from_network(
        net, model=None, classes=["cat", "dog", "fox"], shape=SHAPE, mean=[0.5] * 3, std=[0.2] * 3
    )
    monkeypatch.setattr(NetworkSpec, "average", "probabilities")
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(300, 3, 3, generator=generator)
    at_one = nf.ensemble_probabilities(logits.double(), "probabilities")
    calibration = Calibration.fit(logits, at_one.argmax(dim=1), average="probabilities")
    classifier.calibration = replace(calibration, temperature=3.0)
    monkeypatch.setattr(classifier, "logits", lambda pixels: logits)
    pixels = IMAGES[:1].expand(300, *SHAPE)
    plain = classifier.predict(pixels, risk=0.1)
    assert plain.classes.tolist() == plain.probabilities.argmax(dim=1).tolist()
    assert plain.classes.tolist() != at_one.argmax(dim=1).tolist()
    bounded = classifier.predict(pixels, risk=0.1, delta=0.1)
    assert bounded.classes.tolist() == at_one.argmax(dim=1).tolist()
    assert bounded.confidence.tolist() == bounded.probabilities[range(300), bounded.classes].tolist()
    with_sets = classifier.predict(pixels, coverage=0.9, score="aps")
    assert with_sets.sets[range(300), with_sets.classes].all()


def test_an_answer_that_is_not_a_number_is_withheld():
    limits = AnswerLimits(risk=0.1, delta=0.1, threshold=0.0)
    assert limits.withheld(torch.tensor([[0.5, 0.5], [math.nan, 0.5]]).log()).tolist() == [False, True]


def test_what_limits_refuses(finished_run):
    classifier = nf.Classifier.from_pretrained(finished_run)
    with pytest.raises(
        ValueError,
        match=r"^delta must be left out without a risk, a coverage or a rate of alarms to bound, got",
    ):
        classifier.limits(delta=0.1)
    for asked in ({"score": "aps"}, {"class_wise": True}):
        with pytest.raises(ValueError, match=r"^\w+ must be left out without a coverage, got"):
            classifier.limits(**asked)
    for asked in ({"coverage": "0.9"}, {"risk": "0.1"}, {"risk": 0.1, "delta": "0.1"}):
        with pytest.raises(ValueError, match=rf"^{list(asked)[-1]} must be a .*, got '0\.[19]'"):
            classifier.limits(**asked)
    with pytest.raises(ValueError, match=r"^pixels must be at least one image, got none$"):
        classifier.drift_p_value(torch.zeros(0, *classifier.spec.shape, dtype=torch.uint8))
    unscored = replace(classifier.calibration, scores=None)
    reasons = [
        (None, "network without calibration", "; calibrate it on images that it was neither trained nor"),
        (unscored, "calibration without scores of images", "; it is of an earlier version: calibrate again"),
        (replace(unscored, dependence="chosen so"), "calibration without scores of images", "; chosen so: "),
    ]
    for calibration, what, hint in reasons:
        bare = nf.Classifier(classifier.network, classifier.spec, calibration)
        for asked in ({"coverage": 0.9}, {"risk": 0.1, "delta": 0.1}, {"delta": 0.1}):
            message = f"^{list(asked)[-1]} must be left out for a {what}, got 0[.][19]{hint}"
            with pytest.raises(ValueError, match=message):
                bare.limits(**asked)


def test_images_that_the_best_epoch_was_chosen_on_promise_nothing(finished_run, tmp_path):
    folder = RunFolder(shutil.copytree(finished_run, tmp_path / "run"))
    config = folder.load_config()
    chosen = replace(config, training=replace(config.training, patience=2))
    start = RunFolder(tmp_path / "start")
    start.path.mkdir()
    begun = replace(config, model=replace(config.model, weights=str(start.path)))
    reasons = {
        "patience chose the epoch on the validation images": (chosen, config),
        "the network started from a run whose epoch patience chose": (begun, chosen),
        "the network started from a run with another validation split": (
            begun,
            replace(config, fission=replace(config.fission, seed=config.fission.seed + 1)),
        ),
    }
    elsewhere = replace(chosen, data=replace(chosen.data, data="another"))
    for again, (reason, (dependent, begins)) in itertools.product((evaluate, calibrate), reasons.items()):
        for harmless in (config, elsewhere):
            start.config.write_text(yaml.safe_dump(harmless.to_dict()))
            folder.calibration.unlink()  # what it says of the same weights would still hold
            again(folder, begun)
            assert folder.load_calibration().scores is not None
        start.config.write_text(yaml.safe_dump(begins.to_dict()))
        again(folder, dependent)
        assert folder.load_calibration().scores is None
        assert folder.load_calibration().dependence.startswith(reason)
    start.path.rename(tmp_path / "elsewhere")
    evaluate(folder, dependent)
    assert folder.load_calibration().dependence.startswith(reason)  # which can no longer be found out
    with pytest.raises(ValueError, match=reason):
        evaluate_cascade(folder, dependent, max_accuracy_drop=5, delta=0.1)


def test_an_image_of_any_size_is_made_ready(finished_run):
    classifier = nf.Classifier.from_pretrained(finished_run)
    photograph = Image.fromarray(np.full((30, 20, 3), 200, dtype=np.uint8))
    assert classifier.pixels(photograph).tolist() == torch.full((1, 8, 8), 200).tolist()


def test_the_readme_is_written_from_the_runs_own_figures(finished_run, tmp_path):
    classifier = nf.Classifier.from_pretrained(finished_run)
    classifier.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert text.startswith("---\nlibrary_name: netfission\n")
    assert f"{100 * classifier.evaluation.ensemble['top1']:.2f} %" in text
    assert f"a temperature of {classifier.temperature:.3f}" in text
    assert "limit_per_class: 20" in text
    again = tmp_path / "again"
    nf.Classifier.from_pretrained(tmp_path).save_pretrained(again)
    assert (again / "evaluation.json").read_bytes() == (finished_run / "evaluation.json").read_bytes()


def test_the_card_and_the_table_distinguish_linear_exits(finished_run):
    classifier = nf.Classifier.from_pretrained(finished_run)
    spec = replace(classifier.spec, fission=classifier.spec.fission | {"exits": 1, "linear_exits": [2]})
    card = model_card(spec, evaluation=classifier.evaluation)
    assert f"# {spec.model}, one exit and 1 linear exit\n" in card
    assert "| exit 0 |" in card and "| exit 1 (linear) |" in card
    rows = [line.split("  ")[0] for line in classifier.evaluation.table(linear=1).splitlines()]
    assert rows[1:3] == ["exit 0", "exit 1 (linear)"]
    assert "(linear)" not in classifier.evaluation.table()


def test_the_card_says_where_the_temperature_is_a_guess(finished_run):
    classifier = nf.Classifier.from_pretrained(finished_run)
    calibration, spec = classifier.calibration, classifier.spec
    for top1, guessed in ((0.9, False), (1.0, True)):
        own = replace(calibration, raw=calibration.raw | {"top1": top1})
        guess = "validation images, all classified correctly, so it is a guess, where"
        assert (guess in model_card(spec, own)) is guessed
    few = replace(calibration, n=99)
    assert "99 validation images, too few for more than a guess, where" in model_card(spec, few)


def test_it_is_pushed_to_the_hub_as_it_is_saved(finished_run, monkeypatch, tmp_path):
    pushed = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **_):
            pushed[repo_id] = {path.name for path in folder_path.iterdir()}

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("netfission.classifier.hub.is_in_reach", lambda: True)
    nf.Classifier.from_pretrained(finished_run).push_to_hub("someone/digits")
    assert pushed["someone/digits"] > {"config.json", "model.safetensors", "README.md"}
    classifier = nf.Classifier.from_pretrained(finished_run)
    classifier.save_pretrained(tmp_path / "digits", push_to_hub=True, repo_id="someone/again")
    classifier.save_pretrained(tmp_path / "digits", push_to_hub=True)
    assert pushed["someone/again"] == pushed["digits"] == pushed["someone/digits"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"\xff" * 40, "must be the weights of .*json, got others"),
        ("model.safetensors", None, r"model\.safetensors must be the weights of a network, got no such"),
        ("config.json", b"{", r"config\.json must be a valid JSON file, got damaged content"),
        ("config.json", b"[]", r"config\.json must be a mapping from settings to values, got \[\]"),
        ("config.json", b"[" * 100_000, r"config\.json must be a valid JSON file, got damaged content"),
        ("config.json", b'{"format": 3, "netfission": "9.1", "new": 1}', "got format 3 of netfission 9.1"),
        ("config.json", b'{"shape": []}', "config.json must be the description of a network, got damaged"),
        ("calibration.json", b'{"n": 3}', "calibration.json must be a valid JSON file, got damaged content"),
        ("evaluation.json", b"", "evaluation.json must be a valid JSON file, got damaged content"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(file, content, message, finished_run, tmp_path):
    copied = shutil.copytree(finished_run, tmp_path / "run")
    (copied / file).unlink()
    if content is not None:
        (copied / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        nf.Classifier.from_pretrained(copied)
    assert "\n" not in str(error.value)


def test_a_calibration_of_another_network_is_refused(finished_run, tmp_path, capsys):
    copied = RunFolder(shutil.copytree(finished_run, tmp_path / "run"))
    own = nf.Classifier.from_pretrained(copied.path)
    assert own.calibration.weights == copied.weights_sha256()
    with torch.no_grad():
        next(own.network.parameters()).mul_(1.01)  # as further training would
    with pytest.raises(ValueError, match=r"^calibration must be of the network's weights, got one of others"):
        own.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    copied.save_network(own.network, own.spec)
    message = r"calibration\.json must be of the network in model\.safetensors, got one of another network \("
    with pytest.raises(ValueError, match=message):
        nf.Classifier.from_pretrained(copied.path)
    digest = own.calibration.digest.encode()
    (copied.path / "model.onnx").write_bytes(b"graph" + digest)
    assert main(["evaluate", str(copied.path)]) == 0
    assert "not exported with this calibration: model.onnx; export again" in capsys.readouterr().out
    assert main(["evaluate", str(copied.path)]) == 0  # it still is
    assert "not exported with this calibration: model.onnx; export again" in capsys.readouterr().out
    assert copied.load_calibration().digest.encode() != digest
    (copied.path / "model.onnx").write_bytes(b"graph" + copied.load_calibration().digest.encode())
    assert main(["evaluate", str(copied.path)]) == 0
    assert "exported with this" not in capsys.readouterr().out
    again = nf.Classifier.from_pretrained(copied.path)
    assert again.calibration.weights == copied.weights_sha256() != own.calibration.weights
    calibration = json.loads(copied.calibration.read_text("utf-8"))
    del calibration["weights"], calibration["checksum"]  # as an earlier version wrote it
    copied.calibration.write_text(json.dumps(calibration))
    assert main(["evaluate", str(copied.path)]) == 0
    assert main(["calibrate", str(copied.path)]) == 0
    assert "model.onnx" not in capsys.readouterr().out  # nothing has changed


def test_a_run_whose_weights_were_written_otherwise_is_shared_with_its_calibration(finished_run, tmp_path):
    copied = RunFolder(shutil.copytree(finished_run, tmp_path / "run"))
    save_file(load_file(copied.weights), copied.weights)  # as an earlier version did: without a checksum
    calibration = json.loads(copied.calibration.read_text("utf-8"))
    del calibration["checksum"]
    for digest in (calibration["weights"], hashlib.sha256(copied.weights.read_bytes()).hexdigest()):
        copied.calibration.write_text(json.dumps(calibration | {"weights": digest}))
        nf.Classifier.from_pretrained(copied.path).save_pretrained(tmp_path / "saved")
        shared = nf.Classifier.from_pretrained(tmp_path / "saved")
        assert shared.calibration.weights == copied.weights_sha256()


def test_the_digest_of_weights_depends_on_each_name_dtype_shape_and_value():
    states = [
        {"a": torch.zeros(2)},
        {"b": torch.zeros(2)},
        {"a": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.zeros(2, 1)},
        {"a": torch.tensor([0.0, 1.0])},
        {"a": torch.tensor(0.0, dtype=torch.bfloat16)},
        {"a": torch.zeros(0)},
        {},
    ]
    assert len({state_sha256(state) for state in states}) == len(states)


def test_a_calibration_of_an_earlier_version_has_no_digest_and_gets_one_when_it_is_saved(
    finished_run, tmp_path
):
    copied = RunFolder(shutil.copytree(finished_run, tmp_path / "run"))
    calibration = json.loads(copied.calibration.read_text("utf-8"))
    del calibration["weights"], calibration["checksum"]
    copied.calibration.write_text(json.dumps(calibration))
    classifier = nf.Classifier.from_pretrained(copied.path)
    assert classifier.calibration.weights == ""
    classifier.save_pretrained(tmp_path / "saved")
    saved = nf.Classifier.from_pretrained(tmp_path / "saved")
    assert saved.calibration.weights == RunFolder(tmp_path / "saved").weights_sha256()


def test_without_a_network_it_says_so(monkeypatch, small):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError, match="someone/net is not a folder, the hub cannot be reached"):
        nf.Classifier.from_pretrained("someone/net")
    with pytest.raises(ConnectionError, match="someone/net cannot be pushed to, as the hub cannot"):
        nf.Classifier.from_network(small, **GOOD).push_to_hub("someone/net")
    with pytest.raises(
        ValueError,
        match=r"name must be a folder, or .* on the hub, got 'no/such/folder'",
    ):
        nf.Classifier.from_pretrained("no/such/folder")


GOOD = {"model": "wrn-10-1", "classes": list("abcd"), "shape": SHAPE, "mean": (0.5,) * 3, "std": (0.2,) * 3}


@pytest.fixture(scope="module")
def small():
    return nf.fission(create_model("wrn-10-1", 4), 2, example_input=torch.zeros(2, *SHAPE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["a"]}, "classes must be 4 names, one per logit, got 1"),
        ({"classes": [1, 2, 3, 4]}, r"classes must be different names, got \[1, 2, 3, 4\]"),
        ({"classes": list("abca")}, "classes must be different names, got "),
        ({"shape": (2, 8, 8)}, "shape must be 1 or 3 channels, height and width, got "),
        ({"shape": (3, 8)}, "shape must be 1 or 3 channels, height and width, got "),
        ({"shape": (3, 8.5, 8)}, r"shape must be a list of numbers, got \(3, 8.5, 8\)"),
        ({"shape": (1, 8, 8), "mean": [0.5], "std": [0.2]}, r"shape must be the .*, got \[1, 8, 8\]"),
        ({"std": (0.2, 0.0, 0.2)}, r"std must be positive numbers, got \[0.2, 0.0, 0.2\]"),
        ({"std": (0.2, 0.2)}, "std must be a finite number for each of 3 channels, got "),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean must be a finite number for each of 3 channels, got "),
        ({"mean": 0.5}, "mean must be a list of numbers, got 0.5"),
        ({"mean": "abc"}, "mean must be a list of numbers, got 'abc'"),
        ({"model": "wrn-10-2"}, r"model must be .*, got 'wrn-10-2', which makes another \(Missing key"),
        ({"model": "wrn-10-x"}, "wrn-10-x"),
    ],
)  # fmt: skip
def test_from_network_refuses_what_is_not_valid(small, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        nf.Classifier.from_network(small, **GOOD | change)
    assert "\n" not in str(caught.value)


def test_from_network_refuses_a_model_that_differs_without_weights():
    single = create_model("wrn-10-1", 4)
    for module in single.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "reflect"
    network = nf.fission(single, 2, example_input=torch.zeros(2, *SHAPE))
    with pytest.raises(ValueError, match=r"got 'wrn-10-1', which makes another \(its logits differ\)"):
        nf.Classifier.from_network(network, **GOOD)


def test_a_network_of_another_type_is_refused_by_its_type_and_predicts(small, finished_run):
    message = r"^network must be of float32, as it is loaded again, got weights of bfloat16; call float\(\)"
    with pytest.raises(ValueError, match=message):
        nf.Classifier.from_network(copy.deepcopy(small).bfloat16(), **GOOD)
    classifier = nf.Classifier.from_pretrained(finished_run)
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    expected = classifier.logits(images)
    logits = classifier.bfloat16().logits(images)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, expected, rtol=0.1, atol=0.1)


def test_from_network_compares_logits_relative_to_their_spread():
    network = nf.fission(create_model("wrn-10-1", 4), 2, example_input=torch.zeros(2, *SHAPE))
    with torch.no_grad():
        for path in network.exit_paths:
            for parameter in path.head.parameters():
                parameter.mul_(1e-4)
    nf.Classifier.from_network(network, **GOOD)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "reflect"
    with pytest.raises(ValueError, match=r"got 'wrn-10-1', which makes another \(its logits differ\)"):
        nf.Classifier.from_network(network, **GOOD)


def test_from_network_refuses_a_grouping_that_no_name_tells():
    network = nf.fission(create_model("wrn-10-1", 4), 2, example_input=torch.zeros(2, *SHAPE))
    network.config = None
    with pytest.raises(ValueError, match="network must be made with a grouping given by its name"):
        nf.Classifier.from_network(network, **GOOD)


def test_a_network_is_described_as_training_left_it():
    network = nf.fission(create_model("wrn-10-1", 4), 2, example_input=torch.zeros(2, *SHAPE)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    numbers = {
        "shape": np.array(SHAPE),
        "mean": torch.full((3,), 0.5),
        "std": np.full(3, 0.2, dtype=np.float32),
    }
    classifier = nf.Classifier.from_network(network, **GOOD | numbers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert classifier.spec.mean == [0.5] * 3


def test_a_folder_holds_nothing_of_the_network_before(finished_run, small, tmp_path):
    nf.Classifier.from_pretrained(finished_run).save_pretrained(tmp_path)
    readme = (tmp_path / "README.md").read_bytes()
    with pytest.warns(UserWarning, match=r"README.md stays as it is") as warned:
        nf.Classifier.from_network(small, **GOOD).save_pretrained(tmp_path)
    assert warned[0].filename == __file__
    again = nf.Classifier.from_pretrained(tmp_path)
    assert (again.temperature, again.calibration, again.evaluation) == (1.0, None, None)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert (tmp_path / "README.md").read_bytes() == readme
    with pytest.raises(ValueError, match="save_directory must be another folder than a run's, got "):
        again.save_pretrained(finished_run)


def test_a_folder_of_other_files_loses_none(small, tmp_path):
    (tmp_path / "evaluation.json").write_text("of something else")
    nf.Classifier.from_network(small, **GOOD).save_pretrained(tmp_path)
    assert (tmp_path / "evaluation.json").read_text("utf-8") == "of something else"


def test_where_saving_fails_the_network_before_is_kept(finished_run, small, tmp_path, monkeypatch):
    nf.Classifier.from_pretrained(finished_run).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("netfission.classifier.folder.save", full)
    with pytest.raises(OSError, match="No space left"):
        nf.Classifier.from_network(small, **GOOD).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("pixels", "found"),
    [
        (torch.rand(2, *SHAPE), r"torch.float32 of shape \(2, 3, 8, 8\)"),
        (torch.zeros(2, 3, 9, 8, dtype=torch.uint8), r"of shape \(2, 3, 9, 8\)"),
        (torch.zeros(SHAPE, dtype=torch.uint8), r"of shape \(3, 8, 8\)"),
        (np.zeros((2, *SHAPE), dtype=np.uint8), "ndarray"),
    ],
)
def test_what_predict_refuses(small, pixels, found):
    with pytest.raises(ValueError, match=rf"pixels must be uint8 of shape \(n, 3, 8, 8\), .*got .*{found}"):
        nf.Classifier.from_network(small, **GOOD).predict(pixels)


def test_the_description_is_json(finished_run):
    assert json.loads((finished_run / "config.json").read_text("utf-8"))["format"] == 1


def test_fewer_class_names_than_the_weights_have_are_refused(settings_of, tmp_path):
    train(settings_of(grouping="channels", sparsity=0.0, epochs=1), tmp_path / "run", progress=False)
    spec = parse_json((tmp_path / "run" / "config.json").read_text("utf-8"))
    (tmp_path / "run" / "config.json").write_text(json.dumps(spec | {"classes": ["a", "b"]}))
    message = r"must be the weights of .*config\.json, got others \(10 classes, not 2\)"
    with pytest.raises(ValueError, match=message):
        nf.Classifier.from_pretrained(tmp_path / "run")
