import json
import shutil
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netfission.cli import main
from netfission.evaluation.calibration import Calibration
from netfission.evaluation.conformal import class_scores
from netfission.evaluation.metrics import classification_metrics
from netfission.evaluation.p_values import DetectorScore
from netfission.evaluation.reliability import CalibrationCurve, ReliabilityReport
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


def surer_case(seed=0):
    """The same, but every answer of more than average confidence is right."""
    logits, labels = random_case(seed)
    confidence, answers = logits.mean(1).softmax(1).max(1)
    return logits, torch.where(confidence > confidence.mean(), answers, labels)


@given(st.integers(0, 1000), st.sampled_from([0.1, 1.0, 5.0, 300.0]))
@settings(max_examples=50, deadline=None)
def test_the_bins_are_those_the_calibration_error_is_made_of(seed, scale):
    logits, labels = random_case(seed, 50, scale)
    curve = CalibrationCurve.from_log_probabilities(logits[:, 0].double().log_softmax(1), labels)
    assert len(curve.bins) == 15
    assert sum(each.count for each in curve.bins) == 50
    gaps = [each.count / 50 * abs(each.confidence - each.accuracy) for each in curve.bins]
    assert sum(gaps) == pytest.approx(curve.metrics["ece"], abs=1e-6)
    for place, each in enumerate(curve.bins):
        assert each.count == 0 or place / 15 - 1e-6 <= each.confidence <= (place + 1) / 15 + 1e-6


def test_raw_and_scaled_figures_are_those_of_the_mean_logits():
    logits, labels = random_case()
    calibration = Calibration.fit(*random_case(seed=1, n=3000), average="logits")
    assert calibration.temperature == pytest.approx(2.0, rel=0.1)
    report = ReliabilityReport.from_logits(logits, labels, CLASSES, calibration, average="logits")
    mean = logits.double().mean(1)
    assert report.raw.metrics == classification_metrics(mean.log_softmax(1), labels)
    scaled = (logits.double() / calibration.temperature).mean(1).log_softmax(1)
    assert report.scaled.metrics == classification_metrics(scaled, labels)
    assert report.risk_coverage == RiskCoverage.from_confidence(
        scaled.amax(1).exp(), scaled.argmax(1) == labels
    )
    assert report.scaled.metrics["nll"] < report.raw.metrics["nll"]
    assert report.scaled.metrics["ece"] < report.raw.metrics["ece"]
    assert (report.n, report.validation_images, report.temperature) == (300, 3000, calibration.temperature)


def test_abstention_is_by_the_thresholds_of_the_validation_split():
    logits, labels = random_case()
    calibration = Calibration.fit(*random_case(seed=1), average="logits")
    report = ReliabilityReport.from_logits(logits, labels, CLASSES, calibration, average="logits")
    confidence = (logits.mean(1).double() / calibration.temperature).softmax(1).amax(1)
    right = logits.mean(1).argmax(1) == labels
    for each in report.abstentions:
        assert each.threshold == calibration.risk_coverage.threshold(each.risk)
        answered = confidence >= each.threshold
        assert each.coverage == pytest.approx(answered.double().mean().item())
        assert each.error == (
            pytest.approx((~right[answered]).double().mean().item()) if answered.any() else 0
        )
    assert report.abstentions[0].coverage < report.abstentions[-1].coverage


def test_sets_and_bounded_abstention_are_measured_on_the_test_split():
    logits, labels = surer_case()
    calibration = Calibration.fit(*surer_case(seed=1), average="logits")
    promises = ReliabilityReport.from_logits(logits, labels, CLASSES, calibration, average="logits").promises
    log_probabilities = logits.double().mean(1).log_softmax(1)
    assert [each.score for each in promises.sets] == ["lac", "aps", "raps"]
    for each in promises.sets:
        quantile = calibration.scores.quantiles(0.9, each.score, CLASSES)[0]
        inside = class_scores(log_probabilities, each.score) <= quantile
        covered = inside[torch.arange(300), labels].double()
        assert each.covered == pytest.approx(covered.mean().item())
        assert each.size == pytest.approx(inside.sum(1).double().mean().item())
        assert each.empty == pytest.approx((~inside.any(1)).double().mean().item())
        assert sum(own.n for own in each.classes.values()) == 300
        assert each.classes["dog"].covered == pytest.approx(covered[labels == 3].mean().item())
        assert each.classes[each.least_covered].covered == min(own.covered for own in each.classes.values())
    assert [bound.threshold is None for bound in promises.abstentions] == [
        bound.needed > 300 for bound in promises.abstentions
    ]
    bound = promises.abstentions[-1]
    assert bound.threshold == calibration.scores.threshold(0.2, 0.1)
    right = log_probabilities.argmax(1) == labels
    answered = log_probabilities.exp().amax(1) >= bound.threshold
    assert bound.answered == pytest.approx(answered.double().mean().item())
    assert 0 < bound.answered < 1
    assert bound.error == pytest.approx((~right[answered]).double().mean().item())
    assert [each.detector for each in promises.false_alarms] == list(get_args(DetectorScore))
    for each in promises.false_alarms:
        detector = calibration.scores.detector(each.detector, accept_false_alarms=0.05)
        assert each.marked == detector.marks(logits, average="logits").double().mean().item()
        assert each.marked == pytest.approx(0.05, abs=0.05) and each.marked > 0
    few = Calibration.fit(*random_case(seed=1, n=8), average="logits")
    few_promises = ReliabilityReport.from_logits(logits, labels, CLASSES, few, average="logits").promises
    assert few_promises.sets == few_promises.false_alarms == []
    assert {bound.answered for bound in few_promises.abstentions} == {0}


def test_the_worst_classes_and_what_they_are_confused_with():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    answers = torch.tensor([0, 0, 0, 1, 1, 1, 0, 3, 3])
    logits = torch.nn.functional.one_hot(answers, 7).float().unsqueeze(1)
    worst = ReliabilityReport.from_logits(logits, labels, CLASSES, None, average="logits").worst
    assert [(each.name, each.n, each.accuracy) for each in worst] == [
        ("cow", 3, 0.0),
        ("ant", 4, 0.75),
        ("bee", 2, 1.0),
    ]
    assert [each.confused_with for each in worst] == [{"dog": 2, "ant": 1}, {"bee": 1}, {}]


def test_without_a_validation_split_nothing_is_scaled():
    report = ReliabilityReport.from_logits(*random_case(), CLASSES, None, average="logits")
    assert (report.temperature, report.scaled) == (None, None)
    assert (report.abstentions, report.validation_images) == ([], 0)
    assert report.summary().startswith(
        "no temperature, as no images were held out for validation\narea under"
    )
    assert ReliabilityReport.from_json(report.to_json()) == report


def test_a_validation_split_without_errors_is_said_to_be_a_guess():
    labels = torch.arange(40) % 7
    logits = torch.nn.functional.one_hot(labels, 7).float().unsqueeze(1)
    calibration = Calibration.fit(logits, labels, average="logits")
    report = ReliabilityReport.from_logits(*random_case(), CLASSES, calibration, average="logits")
    assert report.flawless
    guess = "from 40 validation images, all classified correctly, so it is a guess; on these"
    assert f"{guess} {report.n} images: NLL" in report.summary()
    assert f"{guess} 40 images: NLL" in calibration.summary()
    assert ReliabilityReport.from_json(report.to_json()) == report
    confidence = (logits[:, 0] / calibration.temperature).softmax(1).amax(1)
    assert confidence.max() < 0.99  # not sure of everything
    other = ReliabilityReport.from_logits(
        *random_case(), CLASSES, Calibration.fit(*random_case(seed=1), average="logits"), average="logits"
    )
    assert not other.flawless
    few = Calibration.fit(*(part[:99] for part in random_case(seed=1)), average="logits")
    assert few.summary().startswith(
        f"temperature {few.temperature:.3f}, from 99 validation images, too few for "
    )
    report = ReliabilityReport.from_logits(*random_case(), CLASSES, few, average="logits")
    assert "from 99 validation images, too few for more than a guess; on these" in report.summary()
    assert "validation images; on these" in other.summary()


def test_a_summary_says_if_nothing_is_answered():
    logits, labels = random_case(seed=1)
    wrong = (logits.mean(dim=1).argmax(dim=1) + 1) % 7
    calibration = Calibration.fit(logits, wrong, average="logits")
    report = ReliabilityReport.from_logits(logits, labels, CLASSES, calibration, average="logits")
    assert report.abstentions[0].threshold > 1
    never = "no threshold of confidence keeps the share of wrong answers within 5 % on the validation images"
    assert report.summary().endswith(f"; {never}, so no image is answered")
    answering = ReliabilityReport.from_logits(
        logits, labels, CLASSES, Calibration.fit(logits, (wrong - 1) % 7, average="logits"), average="logits"
    )
    assert "at the threshold that keeps the share of wrong answers within 5 %" in answering.summary()


def test_json_round_trip_is_exact():
    report = ReliabilityReport.from_logits(
        *random_case(), CLASSES, Calibration.fit(*random_case(seed=1), average="logits"), average="logits"
    )
    assert ReliabilityReport.from_json(report.to_json()) == report
    with pytest.raises(ValueError, match=r"^temperature must be given, got nothing$"):
        ReliabilityReport.from_json('{"n": 3}')


def test_a_runs_reliability_is_kept_and_shown(finished_run, tmp_path, capsys):
    folder = RunFolder(shutil.copytree(finished_run, tmp_path / "run"))
    (folder.path / "reliability.json").unlink()
    assert main(["evaluate", str(folder.path)]) == 0
    shown = capsys.readouterr().out
    report = ReliabilityReport.from_json((folder.path / "reliability.json").read_text("utf-8"))
    assert report.summary() in shown
    evaluation, calibration = folder.load_evaluation(), folder.load_calibration()
    assert report.n == evaluation.n
    assert report.raw.metrics["nll"] == pytest.approx(evaluation.ensemble["nll"], rel=1e-5)
    assert report.raw.metrics["top1"] == evaluation.ensemble["top1"]
    assert report.temperature == calibration.temperature
    assert json.loads((folder.path / "reliability.json").read_text("utf-8"))["scaled"]["bins"][14].keys() == {
        "count", "confidence", "accuracy"
    }  # fmt: skip


def test_a_run_without_validation_has_a_reliability_report_too(settings_of, finished_run, tmp_path):
    folder = RunFolder(shutil.copytree(finished_run, tmp_path / "run"))
    folder.data_summary.unlink()  # which says that there was a validation split
    evaluate(folder, settings_of(validation=0.0))
    assert (
        ReliabilityReport.from_json((folder.path / "reliability.json").read_text("utf-8")).temperature is None
    )
