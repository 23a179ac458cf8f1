import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netfission.cli import main
from netfission.evaluation.calibration import Calibration
from netfission.evaluation.metrics import classification_metrics
from netfission.evaluation.reliability import Reliability, ReliabilityReport
from netfission.evaluation.selective import RiskCoverage
from netfission.runs.evaluate import evaluate
from netfission.runs.folder import RunFolder

CLASSES = ("ant", "bee", "cow", "dog", "elk", "fox", "gnu")


def random_case(seed=0, n=300, scale=2.0):
    """Logits that are `scale` times what the labels were drawn by, so that the temperature is `scale`."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(n, 1, len(CLASSES), generator=generator).expand(-1, 3, -1)
    labels = true[:, 0].softmax(1).multinomial(1, generator=generator).squeeze(1)
    return scale * true, labels


@given(st.integers(0, 1000), st.sampled_from([0.1, 1.0, 5.0, 300.0]))
@settings(max_examples=50, deadline=None)
def test_the_bins_are_those_the_calibration_error_is_made_of(seed, scale):
    logits, labels = random_case(seed, 50, scale)
    own = Reliability.from_log_probabilities(logits[:, 0].double().log_softmax(1), labels)
    assert len(own.bins) == 15
    assert sum(each.count for each in own.bins) == 50
    gaps = [each.count / 50 * abs(each.confidence - each.accuracy) for each in own.bins]
    assert sum(gaps) == pytest.approx(own.metrics["ece"], abs=1e-6)
    for place, each in enumerate(own.bins):
        assert each.count == 0 or place / 15 - 1e-6 <= each.confidence <= (place + 1) / 15 + 1e-6


def test_raw_and_scaled_figures_are_those_of_the_mean_logits():
    logits, labels = random_case()
    calibration = Calibration.fit(*random_case(seed=1, n=3000))
    assert calibration.temperature == pytest.approx(2.0, rel=0.1)
    own = ReliabilityReport.from_logits(logits, labels, CLASSES, calibration)
    mean = logits.double().mean(1)
    assert own.raw.metrics == classification_metrics(mean.log_softmax(1), labels)
    scaled = (mean / calibration.temperature).log_softmax(1)
    assert own.scaled.metrics == classification_metrics(scaled, labels)
    assert own.risk_coverage == RiskCoverage.from_confidence(scaled.amax(1).exp(), scaled.argmax(1) == labels)
    assert own.scaled.metrics["nll"] < own.raw.metrics["nll"]
    assert own.scaled.metrics["ece"] < own.raw.metrics["ece"]
    assert (own.n, own.validation, own.temperature) == (300, 3000, calibration.temperature)


def test_abstention_is_by_the_thresholds_of_the_validation_split():
    logits, labels = random_case()
    calibration = Calibration.fit(*random_case(seed=1))
    own = ReliabilityReport.from_logits(logits, labels, CLASSES, calibration)
    confidence = (logits.mean(1).double() / calibration.temperature).softmax(1).amax(1)
    right = logits.mean(1).argmax(1) == labels
    for each in own.abstentions:
        assert each.threshold == calibration.risk_coverage.threshold(each.risk)
        answered = confidence >= each.threshold
        assert each.coverage == pytest.approx(answered.double().mean().item())
        assert each.error == (
            pytest.approx((~right[answered]).double().mean().item()) if answered.any() else 0
        )
    assert own.abstentions[0].coverage < own.abstentions[-1].coverage


def test_the_worst_classes_and_what_they_are_taken_for():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    answers = torch.tensor([0, 0, 0, 1, 1, 1, 0, 3, 3])
    logits = torch.nn.functional.one_hot(answers, 7).float().unsqueeze(1)
    worst = ReliabilityReport.from_logits(logits, labels, CLASSES, None).worst
    assert [(each.name, each.n, each.accuracy) for each in worst] == [
        ("cow", 3, 0.0),
        ("ant", 4, 0.75),
        ("bee", 2, 1.0),
    ]
    assert [each.taken_for for each in worst] == [{"dog": 2, "ant": 1}, {"bee": 1}, {}]


def test_without_a_validation_split_nothing_is_scaled():
    own = ReliabilityReport.from_logits(*random_case(), CLASSES, None)
    assert (own.temperature, own.scaled, own.abstentions, own.validation) == (None, None, [], 0)
    assert own.summary().startswith("no temperature, as no images were held out for validation\narea under")
    assert ReliabilityReport.from_json(own.to_json()) == own


def test_a_validation_split_without_errors_is_said_to_be_a_guess():
    labels = torch.arange(40) % 7
    logits = torch.nn.functional.one_hot(labels, 7).float().unsqueeze(1)
    calibration = Calibration.fit(logits, labels)
    own = ReliabilityReport.from_logits(*random_case(), CLASSES, calibration)
    assert own.flawless
    assert "from 40 validation images, too few for one to be wrong, so a guess: NLL" in own.summary()
    assert ReliabilityReport.from_json(own.to_json()) == own
    confidence = (logits[:, 0] / calibration.temperature).softmax(1).amax(1)
    assert confidence.max() < 0.99  # not sure of everything
    other = ReliabilityReport.from_logits(*random_case(), CLASSES, Calibration.fit(*random_case(seed=1)))
    assert not other.flawless
    assert "validation images: NLL" in other.summary()


def test_trust_of_before_it_knew_flaws_is_read():
    own = ReliabilityReport.from_logits(*random_case(), CLASSES, Calibration.fit(*random_case(seed=1)))
    old = json.loads(own.to_json())
    del old["flawless"]
    assert ReliabilityReport.from_json(json.dumps(old)) == own


def test_json_round_trip_is_exact():
    own = ReliabilityReport.from_logits(*random_case(), CLASSES, Calibration.fit(*random_case(seed=1)))
    assert ReliabilityReport.from_json(own.to_json()) == own
    with pytest.raises(ValueError, match=r"text is not what Trust\.to_json writes"):
        ReliabilityReport.from_json('{"n": 3}')


def test_a_runs_trust_is_kept_and_shown(finished_run, tmp_path, capsys):
    folder = RunFolder(shutil.copytree(finished_run, tmp_path / "run"))
    (folder.path / "reliability.json").unlink()
    assert main(["evaluate", str(folder.path)]) == 0
    shown = capsys.readouterr().out
    own = ReliabilityReport.from_json((folder.path / "reliability.json").read_text())
    assert own.summary() in shown
    evaluation, calibration = folder.load_evaluation(), folder.load_calibration()
    assert own.n == evaluation.n
    assert own.raw.metrics["nll"] == pytest.approx(evaluation.ensemble["nll"], rel=1e-5)
    assert own.raw.metrics["top1"] == evaluation.ensemble["top1"]
    assert own.temperature == calibration.temperature
    assert json.loads((folder.path / "reliability.json").read_text())["scaled"]["bins"][14].keys() == {
        "count", "confidence", "accuracy"
    }  # fmt: skip


def test_a_run_without_validation_has_trust_too(settings_of, finished_run, tmp_path):
    folder = RunFolder(shutil.copytree(finished_run, tmp_path / "run"))
    evaluate(folder, settings_of(validation=0.0))
    assert ReliabilityReport.from_json((folder.path / "reliability.json").read_text()).temperature is None
