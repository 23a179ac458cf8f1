import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from netfission.evaluation.calibration import Calibration
from netfission.evaluation.guarantees import CalibrationScores
from netfission.evaluation.p_values import (
    Detector,
    detector_scores,
    images_for_false_alarms,
    p_values,
)

RATE, DELTA, DRAWS = 0.1, 0.1, 1000
rates = st.sampled_from([0.01, 0.05, 0.1, 0.3, 0.7, 0.9])


@pytest.fixture(scope="module")
def logits():
    """Logits of three exits for 20,000 images, of different magnitude."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(20_000, 1, 10, generator=generator)
    own = torch.randn(20_000, 3, 10, generator=generator)
    return (4 * common + own) * (0.3 + torch.rand(20_000, 1, 1, generator=generator))


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=40), st.integers(0, 9))
def test_a_p_value_is_the_rank_among_the_calibration_images(calibration, score):
    own = p_values(torch.tensor([float(score)]), torch.tensor(sorted(map(float, calibration))))
    assert own.item() == (1 + sum(other >= score for other in calibration)) / (len(calibration) + 1)


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=150), rates, st.none() | st.sampled_from([0.1, 0.5]))
def test_an_image_is_marked_if_its_p_value_is_at_most_the_rate_or_with_delta_less(scores, rate, delta):
    calibration = torch.tensor(scores).double()
    detector = Detector.from_scores("energy", calibration, accept_false_alarms=rate, delta=delta)
    new = torch.arange(-1.0, 32.0).double()
    own, marked = p_values(new, detector.calibration), new > detector.alarm_above
    if delta is None:
        steps = round(100 * rate) * (len(scores) + 1)  # in hundredths, which are exact
        ranks = (own * (len(scores) + 1)).round().long()
        assert torch.equal(marked, 100 * ranks <= steps)
    elif len(scores) < images_for_false_alarms(rate, delta):
        assert not marked.any()
    else:
        k = round(max(own[marked], default=torch.tensor(0.0)).item() * (len(scores) + 1))
        # The rate of an order statistic of continuous scores has a beta distribution; ties mark fewer.
        assert stats.beta(len(scores) + 1 - max(k, 1), max(k, 1)).cdf(1 - rate) <= delta + 1e-12


@pytest.mark.parametrize(("score", "n"), [("energy", 100), ("energy", 500), ("mutual-information", 100)])
def test_false_alarms_keep_their_rate_on_average_and_with_delta_in_all_but_a_share_of_draws(logits, score, n):
    scores = detector_scores(logits, average="logits")[score]
    ordered = scores.sort().values
    generator = torch.Generator().manual_seed(n)
    rates_seen = {None: [], DELTA: []}
    for _ in range(DRAWS):
        sample = scores[torch.randint(20_000, (n,), generator=generator)]
        for delta, seen in rates_seen.items():
            above = Detector.from_scores(score, sample, accept_false_alarms=RATE, delta=delta).alarm_above
            seen.append(1 - int(torch.searchsorted(ordered, above, right=True)) / 20_000)
    mean = sum(rates_seen[None]) / DRAWS
    deviation = torch.tensor(rates_seen[None]).std().item() / DRAWS**0.5
    assert RATE - 1 / n - 3 * deviation < mean < RATE + 3 * deviation  # not by marking nothing
    broken = sum(rate > RATE for rate in rates_seen[DELTA])
    assert stats.binomtest(broken, DRAWS, DELTA, alternative="greater").pvalue > 0.001
    assert sum(rate > RATE for rate in rates_seen[None]) > 2 * DELTA * DRAWS  # a mean is no bound


def test_images_that_the_network_has_not_learned_are_marked(logits):
    calibration = Calibration.fit(logits[:500], torch.zeros(500).long(), average="logits")
    detector = calibration.scores.detector("energy", accept_false_alarms=0.05)
    flat = torch.zeros(20, 3, 10)
    assert detector.marks(flat, average="logits").all()
    assert detector.p_values(flat, average="logits").max() <= 0.05
    unusual = detector.marks(logits[500:], average="logits").double().mean().item()
    assert unusual == pytest.approx(0.05, abs=0.03)


def test_the_temperature_that_is_fitted_on_the_images_plays_no_part(logits):
    for factor in (1.0, 5.0):
        calibration = Calibration.fit(factor * logits[:200], torch.zeros(200).long(), average="logits")
        detector = calibration.scores.detector("entropy")
        own = detector.p_values(factor * logits[:200], average="logits")
        torch.testing.assert_close(own.sort().values, torch.arange(2, 202).double() / 201)


@pytest.mark.parametrize("score", ["energy", "entropy", "maximum-probability", "mutual-information"])
def test_an_answer_that_is_not_a_number_is_marked(logits, score):
    calibration = Calibration.fit(logits[:200], torch.zeros(200).long(), average="logits")
    detector = calibration.scores.detector(score, accept_false_alarms=0.05)
    nan = torch.full((1, 3, 10), math.nan)
    assert detector.marks(nan, average="logits").item()
    assert detector.p_values(nan, average="logits").item() == 1 / 201


def test_bad_rates_and_too_few_images_are_refused(logits):
    scores = Calibration.fit(logits[:30], torch.zeros(30).long(), average="logits").scores
    scores.detector("energy", accept_false_alarms=0.04)
    message = (
        "^accept_false_alarms must be at least 0.04 with 30 calibration images, got 0.01; 99 images are "
        "enough$"
    )
    with pytest.raises(ValueError, match=message):
        scores.detector("energy", accept_false_alarms=0.01)
    with pytest.raises(ValueError, match=r"at least 0\.08 with 30 .* got 0\.05; 45 images are enough$"):
        scores.detector("energy", accept_false_alarms=0.05, delta=0.1)
    for rate in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"^accept_false_alarms must be a share of images above 0 and"):
            scores.detector("energy", accept_false_alarms=rate)
    with pytest.raises(ValueError, match=r"^delta must be a probability above 0 and below 1, got 1\.0$"):
        scores.detector("energy", accept_false_alarms=0.5, delta=1.0)
    of_one_exit = Calibration.fit(logits[:30, :1], torch.zeros(30).long(), average="logits").scores
    with pytest.raises(ValueError, match=r"^detector must be one of maximum-probability, entropy, energy,"):
        of_one_exit.detector("mutual-information")


def test_scores_are_kept_in_the_order_of_the_other_columns(logits):
    labels = torch.arange(40)
    scores = CalibrationScores.from_log_probabilities(
        logits[:40].mean(dim=1).log_softmax(dim=1).repeat(1, 4), labels, {"energy": labels.double()}
    )
    assert scores.labels == scores.uncertainty["energy"] != labels.tolist()


def test_p_values_of_many_images_need_no_table_of_all_pairs():
    calibration = torch.arange(500_000.0)
    found = p_values(torch.cat([calibration, torch.tensor([math.nan, math.inf, -math.inf])]), calibration)
    assert found[[0, 499_999, 500_000, 500_001, 500_002]].mul(500_001).round().tolist() == [
        500_001, 2, 1, 1, 500_001,
    ]  # fmt: skip
