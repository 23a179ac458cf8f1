"""Each method is trained and scored by the rules of its authors."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from netfission.classifier import Classifier
from netfission.config import MethodConfig, RunConfig, TrainingConfig
from netfission.ensemble import ensemble_probabilities
from netfission.evaluation.calibration import Calibration
from netfission.methods.born_again import BornAgainLoss
from netfission.methods.registry import METHODS, find_method
from netfission.runs.calibrate import calibrate
from netfission.runs.folder import RunFolder
from netfission.runs.other_data import evaluate_other_data
from netfission.runs.train import train

LOGITS = {"fission", "narrow", "multi-exit", "neurotrails", "born-again"}
MEANS = {"batch-ensemble", "packed", "neurotrails"}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_states_its_rules_and_their_source(name: str) -> None:
    method = METHODS[name]
    assert method.average == ("logits" if name in LOGITS else "probabilities")
    assert method.average_source
    loss = find_method(MethodConfig(name)).loss(TrainingConfig())
    if not isinstance(loss, BornAgainLoss):
        assert loss.reduction == ("mean" if name in MEANS else "sum")
        assert find_method(MethodConfig(name)).loss(TrainingConfig(reduction="mean")).reduction == "mean"
        assert find_method(MethodConfig(name)).loss(TrainingConfig(reduction="sum")).reduction == "sum"


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
    reliability = json.loads(Path(run.reliability).read_text())
    assert reliability["raw"]["metrics"]["nll"] == pytest.approx(evaluation.ensemble["nll"])
    rows = run.metrics.read_text().splitlines()
    last = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    assert classifier.calibration is not None
    # The validation NLL that training shows is that of the calibration's ensemble at temperature 1.
    assert float(last["val/nll"]) == pytest.approx(classifier.calibration.raw["nll"], rel=1e-5)


def test_the_temperature_is_of_the_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 3, 5, generator=generator)
    labels = ensemble_probabilities(logits, "probabilities").multinomial(1, generator=generator).squeeze(1)
    assert Calibration.fit(logits, labels, "probabilities").temperature == pytest.approx(1.0, abs=0.1)
    assert Calibration.fit(logits, labels, "logits").temperature > 1.5


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
