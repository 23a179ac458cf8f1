import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from netfission.evaluation.conformal import class_scores, images_for_coverage, score_quantile
from netfission.evaluation.risk_control import binomial_tail

shares = st.sampled_from([0.05, 0.5, 0.55, 0.8, 0.9, 0.95, 0.99])
deltas = st.sampled_from([0.01, 0.1, 0.5])


def draw(n, classes=6, seed=0, spread=2.0):
    """Log-probabilities of a network that is calibrated, and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    log_probabilities = torch.randn(n, classes, generator=generator).double().mul(spread).log_softmax(dim=1)
    return log_probabilities, log_probabilities.exp().multinomial(1, generator=generator)[:, 0]


def naive_score(probabilities, label, score):
    """The score of one class of one image, by its definition in words."""
    if score == "lac":
        return -math.log(probabilities[label])
    order = sorted(range(len(probabilities)), key=lambda index: -probabilities[index])
    rank = order.index(label)
    mass = sum(probabilities[index] for index in order[:rank])
    return mass + 0.01 * max(0, rank + 1 - 5) * (score == "raps")


@pytest.mark.parametrize("score", ["lac", "aps", "raps"])
def test_scores_are_those_of_their_definition(score):
    log_probabilities, _ = draw(30, classes=8)
    scores = class_scores(log_probabilities, score)
    for row, probabilities in zip(scores, log_probabilities.exp().tolist(), strict=True):
        assert row.tolist() == pytest.approx([naive_score(probabilities, k, score) for k in range(8)])


@given(st.lists(st.integers(0, 30), max_size=120), shares)
def test_the_quantile_is_the_smallest_score_with_enough_at_or_below_it(scores, coverage):
    quantile = score_quantile(scores, coverage)
    enough = round(100 * coverage) * (len(scores) + 1)  # in hundredths, which are exact
    if len(scores) < images_for_coverage(coverage):
        assert quantile == math.inf
    else:
        assert 100 * sum(score <= quantile for score in scores) >= enough
        assert 100 * sum(score < quantile for score in scores) < enough


@given(st.integers(1, 300), shares, deltas)
def test_with_delta_the_quantile_is_the_lowest_that_keeps_to_it(n, coverage, delta):
    quantile = score_quantile(torch.arange(1.0, n + 1), coverage, delta)
    if n < images_for_coverage(coverage, delta):
        assert quantile == math.inf
        return
    place = int(quantile)  # the coverage of this order statistic has a beta distribution
    assert stats.beta(place, n + 1 - place).cdf(coverage) <= delta + 1e-12
    assert place == 1 or stats.beta(place - 1, n + 2 - place).cdf(coverage) > delta - 1e-12


@given(shares, st.none() | deltas)
def test_one_image_fewer_allows_only_the_set_of_all_classes(coverage, delta):
    needed = images_for_coverage(coverage, delta)
    assert score_quantile(torch.zeros(needed), coverage, delta) == 0
    assert score_quantile(torch.zeros(needed - 1), coverage, delta) == math.inf


@pytest.mark.parametrize(
    ("coverage", "delta", "n"), [(0.1, 0.001, 3), (0.5, 0.125, 3), (0.8, 0.512, 3), (0.9, 0.59049, 5)]
)
def test_if_delta_is_the_power_of_the_coverage_the_quantile_is_the_highest_score(coverage, delta, n):
    assert images_for_coverage(coverage, delta) == n
    assert score_quantile(torch.arange(n), coverage, delta) == n - 1


def test_sets_are_those_of_mapie():
    pytest.importorskip("mapie", reason="mapie is not installed")
    from mapie.classification import SplitConformalClassifier
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        """A classifier whose features are its probabilities."""

        classes_ = np.arange(6)

        def fit(self, features, labels):
            return self

        def predict_proba(self, features):
            return features

        def predict(self, features):
            return features.argmax(axis=1)

        def __sklearn_is_fitted__(self):
            return True

    (calibration, labels), (test, _) = draw(200), draw(300, seed=1)
    for score in ("lac", "aps"):
        peer = SplitConformalClassifier(Given(), 0.9, score, prefit=True)
        peer.conformalize(calibration.exp().numpy(), labels.numpy())
        theirs = torch.from_numpy(peer.predict_set(test.exp().numpy())[1][:, :, 0])
        of_labels = class_scores(calibration, score).gather(1, labels[:, None])[:, 0]
        ours = class_scores(test, score) <= score_quantile(of_labels, 0.9)
        if score == "lac":
            assert torch.equal(ours, theirs)
        else:  # theirs has one more class, that at which the quantile is passed, so that it covers more
            assert ours.sum() < theirs.sum()
            assert not (ours & ~theirs).any()


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan])
def test_what_is_no_coverage_or_delta_is_refused(value):
    with pytest.raises(ValueError, match=r"^coverage must be a share of images above 0 and below 1, got "):
        score_quantile([1.0] * 50, value)
    with pytest.raises(ValueError, match=r"^delta must be a probability above 0 and below 1, got "):
        images_for_coverage(0.9, value)


def test_bad_scores_are_named():
    with pytest.raises(ValueError, match=r"^score must be one of lac, aps, raps, got 'lacs'; did you mean"):
        class_scores(torch.zeros(2, 2), "lacs")
    with pytest.raises(ValueError, match=r"^log_probabilities must be floats of shape \(n, classes\), got "):
        class_scores(torch.zeros(2, 2, 2), "lac")


def test_classes_of_equal_numbers_of_images_share_one_search_for_the_place(monkeypatch):
    searched = []

    def counted(errors, n, risk):
        searched.append(n)
        return binomial_tail(errors, n, risk)

    monkeypatch.setattr("netfission.evaluation.conformal.binomial_tail", counted)
    places = [score_quantile(torch.arange(331.0), 0.8125, delta=0.123) for _ in range(20)]
    assert set(places) == {places[0]} and 0 < len(searched) < 20
