import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from netfission.evaluation.risk_control import (
    answers_for_risk,
    binomial_tail,
    passing_threshold,
    thresholds_to_test,
)

shares = st.floats(0.001, 0.999)


@given(st.integers(1, 3000), shares, st.data())
def test_the_tail_is_that_of_scipy(n, risk, data):
    errors = data.draw(st.integers(0, n))
    assert binomial_tail(errors, n, risk) == pytest.approx(
        stats.binom.cdf(errors, n, risk), rel=1e-6, abs=1e-12
    )


def test_no_answers_say_nothing_of_the_error():
    assert binomial_tail(0, 0, 0.1) == 1


@given(shares, shares)
def test_so_many_answers_without_an_error_are_enough_and_one_fewer_is_not(risk, delta):
    needed = answers_for_risk(risk, delta)
    assert binomial_tail(0, needed, risk) <= delta * (1 + 1e-9)
    assert binomial_tail(0, needed - 1, risk) >= delta * (1 - 1e-9)


@pytest.mark.parametrize(
    ("risk", "delta", "n"), [(0.5, 0.125, 3), (0.99, 0.01, 1), (0.9, 0.001, 3), (0.1, 0.59049, 5)]
)
def test_if_delta_is_a_power_of_the_share_of_right_answers_its_exponent_is_enough(risk, delta, n):
    assert answers_for_risk(risk, delta) == n
    assert passing_threshold(torch.ones(n), torch.ones(n).bool(), [0.0], risk, delta) == 0


@given(st.lists(st.tuples(st.floats(0, 1, width=16), st.booleans()), min_size=1, max_size=60))
def test_every_threshold_down_to_the_chosen_one_has_a_clopper_pearson_bound_within_the_risk(pairs):
    confidence, correct = map(torch.tensor, zip(*pairs, strict=True))
    thresholds = [0.9, 0.6, 0.3, 0.0]
    chosen = passing_threshold(confidence, correct, thresholds, risk=0.4, delta=0.2)

    def bound(threshold):
        answered = confidence >= threshold
        n, errors = int(answered.sum()), int((answered & ~correct).sum())
        return 1.0 if errors == n else stats.beta(errors + 1, n - errors).ppf(1 - 0.2)

    assert all(bound(threshold) <= 0.4 + 1e-9 for threshold in thresholds if threshold >= chosen)
    following = [threshold for threshold in thresholds if threshold < chosen]
    assert not following or bound(following[0]) > 0.4 - 1e-9


@given(st.integers(1, 300), st.integers(1, 1000), st.integers(1, 500))
def test_thresholds_fall_to_one_that_answers_everything(m, n, first):
    confidence = torch.rand(m, generator=torch.Generator().manual_seed(m))
    thresholds = thresholds_to_test(confidence, n, first)
    assert thresholds == sorted(set(thresholds), reverse=True)
    assert thresholds[-1] == 0
    assert thresholds[0] <= confidence.max() + 1e-6


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan])
def test_what_is_no_share_is_refused(value):
    message = "^risk must be a share of wrong answers above 0 and below 1 to have a bound, got "
    with pytest.raises(ValueError, match=message):
        answers_for_risk(value, 0.1)
    with pytest.raises(ValueError, match=r"^delta must be a probability above 0 and below 1, got "):
        answers_for_risk(0.1, value)
