import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netfission.evaluation.selective import RiskCoverage

examples = st.lists(st.tuples(st.floats(0, 1, width=16), st.booleans()), min_size=1, max_size=40)


def curve(pairs):
    confidence, correct = zip(*pairs, strict=True)
    return RiskCoverage.from_confidence(torch.tensor(confidence), torch.tensor(correct))


@given(examples)
def test_each_point_is_what_answering_above_its_threshold_gives(pairs):
    traced = curve(pairs)
    for threshold, coverage, risk in zip(traced.thresholds, traced.coverage, traced.risk, strict=True):
        answered = [right for confidence, right in pairs if confidence >= threshold]
        assert coverage == pytest.approx(len(answered) / len(pairs))
        assert risk == pytest.approx(answered.count(False) / len(answered))
    assert traced.coverage[-1] == 1


@given(examples, st.floats(0, 1))
def test_a_threshold_keeps_to_the_risk_and_answers_as_much_as_possible(pairs, risk):
    threshold = curve(pairs).threshold(risk)
    answered = [right for confidence, right in pairs if confidence >= threshold]
    assert answered.count(False) <= risk * len(answered) + 1e-12
    for lower in {confidence for confidence, _ in pairs if confidence < threshold}:
        more = [right for confidence, right in pairs if confidence >= lower]
        assert more.count(False) > risk * len(more) - 1e-12


def test_the_area_is_the_mean_risk_over_coverages():
    traced = curve([(0.9, True), (0.8, False), (0.7, True), (0.6, False)])
    assert traced.area == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)


def test_examples_of_equal_confidence_have_no_order():
    pairs = [(0.5, True), (0.5, False)]
    assert curve(pairs).area == curve(pairs[::-1]).area == pytest.approx(0.5)


def test_a_long_curve_keeps_its_ends():
    confidence = torch.linspace(0, 1, 1001)
    traced = RiskCoverage.from_confidence(confidence, confidence > 0.3)
    assert len(traced.coverage) == 200
    assert traced.coverage[0] == pytest.approx(1 / 1001)
    assert traced.coverage[-1] == 1
    assert traced.threshold(0.0) > 0.3


def test_bad_arguments_are_named():
    with pytest.raises(
        ValueError, match=r"^confidence must be of shape \(n,\), with n ≥ 1, got float32 of shape \(0,\)$"
    ):
        RiskCoverage.from_confidence(torch.empty(0), torch.empty(0, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"^correct must be of shape \(2,\), as confidence, got bool of shape \(1,\)$"
    ):
        RiskCoverage.from_confidence(torch.zeros(2), torch.zeros(1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^risk must be a share of wrong answers from 0 to 1, got 1\.5$"):
        curve([(0.5, True)]).threshold(1.5)
