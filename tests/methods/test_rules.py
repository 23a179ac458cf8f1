"""Each method is trained and scored by the rules of its authors."""

import hashlib
import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from netfission.classifier import Classifier
from netfission.classifier.predictions import Predictions
from netfission.config import MethodConfig, RunConfig, TrainingConfig
from netfission.ensemble import ensemble_probabilities
from netfission.evaluation import Evaluation, collect_logits, evaluate_logits
from netfission.evaluation.calibration import Calibration
from netfission.evaluation.corruption import CorruptionMetrics
from netfission.evaluation.out_of_distribution import uncertainty_scores
from netfission.evaluation.reliability import ReliabilityReport
from netfission.experiments.grid import Grid
from netfission.experiments.records import Records
from netfission.export.cascade import check_cascade
from netfission.export.predictor import Predictor
from netfission.methods.born_again import BornAgainLoss
from netfission.methods.registry import METHODS, find_method
from netfission.report.votes import collect_votes
from netfission.runs.calibrate import calibrate
from netfission.runs.evaluate import evaluate, evaluate_cascade
from netfission.runs.folder import RunFolder
from netfission.runs.other_data import evaluate_other_data
from netfission.runs.setup import load_run_data, make_batches
from netfission.runs.train import train
from netfission.serve.responses import json_answers
from netfission.utils.checksums import parse_json

LOGITS = {"singular-value-ensemble", "fission", "narrow", "multi-exit", "neurotrails", "born-again"}
MEANS = {"singular-value-ensemble", "batch-ensemble", "lora-ensemble", "packed", "neurotrails"}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_states_its_rules_and_their_source(name: str) -> None:
    method = METHODS[name]
    assert method.average == ("logits" if name in LOGITS else "probabilities")
    assert method.average_source
    loss = find_method(MethodConfig(name)).loss(TrainingConfig())
    if not isinstance(loss, BornAgainLoss):
        assert loss.reduction == ("mean" if name in MEANS else "sum")
        for asked in ("mean", "sum"):
            method = find_method(MethodConfig(name))
            if name != "mimo":
                assert method.loss(TrainingConfig(reduction=asked)).reduction == asked
                continue
            with pytest.raises(ValueError, match=r"^reduction must be left out with method=mimo"):
                method.hooks(3, TrainingConfig(reduction=asked))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Of a method that averages probabilities."""
    path = tmp_path_factory.mktemp("runs") / "run"
    settings = {
        "data": "digits", "limit_per_class": 20, "model": "wrn-10-1", "epochs": 2, "batch_size": 25,
        "accelerator": "cpu", "method": "deep-ensemble", "exits": 2,
    }  # fmt: skip
    train(RunConfig.from_dict(settings), path, progress=False)
    return RunFolder(path)


def test_a_run_is_evaluated_calibrated_and_used_by_the_rule_of_its_method(run: RunFolder) -> None:
    classifier = Classifier.from_pretrained(run.path)
    evaluation = run.load_evaluation()
    assert evaluation is not None and evaluation.average == "probabilities"
    assert evaluation.ensemble["nll"] != evaluation.other_average["nll"]
    pixels = torch.randint(256, (5, *classifier.spec.shape), dtype=torch.uint8)
    predictions = classifier.predict(pixels)
    scaled = classifier.logits(pixels) / classifier.temperature
    expected = ensemble_probabilities(scaled, "probabilities")
    assert torch.equal(predictions.probabilities, expected)
    assert not torch.allclose(expected, scaled.mean(dim=1).softmax(dim=1))
    one = classifier.interpret(classifier.logits(pixels)[3, None], classifier.limits())
    (answer,) = json_answers(one, classifier.spec.classes, len(classifier.spec.classes))
    assert answer["probability"] == pytest.approx(expected[3].max().item())
    reliability = json.loads(Path(run.reliability).read_text("utf-8"))
    assert reliability["raw"]["metrics"]["nll"] == pytest.approx(evaluation.ensemble["nll"])
    rows = run.metrics.read_text("utf-8").splitlines()
    last = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    assert classifier.calibration is not None
    # The validation NLL that training shows is that of the calibration's ensemble at temperature 1.
    assert float(last["val/nll"]) == pytest.approx(classifier.calibration.raw["nll"], rel=1e-5)


def test_the_temperature_is_of_the_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 3, 5, generator=generator)
    labels = ensemble_probabilities(logits, "probabilities").multinomial(1, generator=generator).squeeze(1)
    assert Calibration.fit(logits, labels, average="probabilities").temperature == pytest.approx(1.0, abs=0.1)
    assert Calibration.fit(logits, labels, average="logits").temperature > 1.5


def test_a_new_calibration_follows_the_rule_too(run: RunFolder) -> None:
    before = run.calibration.read_bytes(), run.reliability.read_bytes()
    calibrate(run, run.load_config())
    assert (run.calibration.read_bytes(), run.reliability.read_bytes()) == before


def test_other_data_are_scored_by_the_rule_too(run: RunFolder, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for digit in range(10):
        (tmp_path / "others" / str(digit)).mkdir(parents=True)
        for number in range(3):
            pixels = torch.randint(256, (8, 8), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(tmp_path / "others" / str(digit) / f"{number}.png")
    result, _ = evaluate_other_data(run, run.load_config(), str(tmp_path / "others"))
    assert result.evaluation.average == "probabilities"
    assert result.reliability.raw.metrics == pytest.approx(result.evaluation.ensemble)


def test_the_votes_of_a_report_follow_the_rule_too(run: RunFolder) -> None:
    classifier = Classifier.from_pretrained(run.path)
    data = load_run_data(run.load_config().data, seed=0)
    logits, labels = collect_logits(
        classifier.network, make_batches(data.test, data, 256, device="cpu", shuffle=False), "cpu"
    )
    classes = ensemble_probabilities(logits / classifier.temperature, "probabilities").argmax(dim=1)
    votes = collect_votes(classifier, data)
    assert votes.right_agreed + votes.right_disagreed == int((classes == labels).sum())


def test_a_calibration_of_the_other_rule_is_refused_and_fitted_again(run: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(Path(shutil.copytree(run.path, tmp_path / "copy")))
    content = parse_json(copy.calibration.read_text("utf-8"))
    del content["average"]  # as an older version wrote it, which knew the mean of logits alone
    copy.calibration.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"calibration.json must be of the mean of probabilities, .* fits it again$"
    ):
        Classifier.from_pretrained(copy.path)
    evaluate(copy, copy.load_config())
    assert copy.calibration.read_bytes() == run.calibration.read_bytes()


def test_a_record_by_another_rule_or_of_an_earlier_training_does_not_count(tmp_path: Path) -> None:
    common = {"data": "digits", "model": "wrn-10-1"}
    (cell,) = Grid({"a": {"method": "deep-ensemble"}}, [0], common, "a").cells()
    records, logits = Records(tmp_path), torch.randn(5, 3, 10)
    for average in ("logits", "probabilities"):
        evaluation = json.loads(evaluate_logits(logits, torch.arange(5), average=average).to_json())
        records.write(cell, environment={}, seconds=1.0, evaluation=evaluation)
        assert (records.find_success(cell) is None) == (average == "logits")
    (packed,) = Grid({"a": {"method": "packed"}}, [0], common, "a").cells()
    assert METHODS["packed"].revision == 1
    key = hashlib.sha256(json.dumps({"data": "digits", "method": "packed", "model": "wrn-10-1"}).encode())
    assert packed.key != key.hexdigest()[:12]


def test_an_older_evaluation_has_no_entropy_of_the_mean_of_probabilities() -> None:
    content = json.loads(evaluate_logits(torch.randn(5, 3, 10), torch.arange(5), average="logits").to_json())
    del content["other_average"]
    assert Evaluation.from_json(json.dumps(content)).predictive_entropy is None


def test_a_cascade_is_refused_where_probabilities_are_averaged(tmp_path: Path) -> None:
    settings = {
        "data": "digits", "limit_per_class": 20, "model": "wrn-10-1", "epochs": 1, "batch_size": 25,
        "accelerator": "cpu", "method": "treenet", "exits": 2,
    }  # fmt: skip
    config = RunConfig.from_dict(settings)
    train(config, tmp_path / "run", progress=False)
    folder = RunFolder(tmp_path / "run")
    network, _ = folder.load_network()
    assert network.branch_after == (1,)
    with pytest.raises(
        ValueError, match=r"a run with method=fission or multi-exit for a cascade, got method=treenet"
    ):
        evaluate_cascade(folder, config, max_accuracy_drop=1.0)
    with pytest.raises(ValueError, match=r"to export a cascade, got method=treenet"):
        check_cascade(Classifier.from_pretrained(folder.path))


@pytest.mark.parametrize(
    "measure",
    [
        evaluate_logits,
        uncertainty_scores,
        Calibration.fit,
        ReliabilityReport.from_logits,
        CorruptionMetrics.from_logits,
        Predictions,
        Predictor,
    ],
)
def test_no_measure_has_a_rule_of_its_own(measure):
    average = inspect.signature(measure).parameters["average"]
    assert (average.kind, average.default) == (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty)
