import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from netfission.evaluation.drift import drift_p_value

sizes = st.integers(1, 60)


@settings(deadline=None)
@given(sizes, sizes, st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 3.0]))
def test_the_p_value_is_that_of_scipy(m, n, seed, shift):
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(m, generator=generator).double() + shift
    calibration = torch.randn(n, generator=generator).double()
    try:
        expected = stats.ks_2samp(batch.numpy(), calibration.numpy(), method="exact").pvalue
    except RuntimeWarning:  # it rounds 1 to a little more, and takes that for a failure
        expected = 1.0
    assert drift_p_value(batch, calibration) == pytest.approx(expected, abs=1e-9)


def test_samples_that_could_not_be_more_alike_have_a_p_value_of_1():
    assert drift_p_value(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2.0, 4.0, 6.0])) == pytest.approx(1.0)


def test_it_is_that_of_scipy_for_many_images_too():
    generator = torch.Generator().manual_seed(0)
    batch, calibration = torch.randn(500, generator=generator), torch.randn(5000, generator=generator) - 0.05
    expected = stats.ks_2samp(batch.numpy(), calibration.numpy(), method="exact").pvalue
    assert 0.001 < expected < 0.5
    assert drift_p_value(batch, calibration) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("m", "n", "shift"), [(3000, 5000, 3.0), (4000, 3000, 0.8), (2000, 2000, -1.0)])
def test_a_strong_drift_of_thousands_of_images_has_a_tiny_p_value(m, n, shift):
    generator = torch.Generator().manual_seed(0)
    batch, calibration = torch.randn(m, generator=generator) + shift, torch.randn(n, generator=generator)
    expected = stats.ks_2samp(batch.numpy(), calibration.numpy(), method="asymp")
    assert expected.statistic > 0.3
    assert drift_p_value(batch, calibration) < 1e-60


def test_a_small_p_value_has_all_its_digits():
    batch, calibration = torch.arange(40.0) + 100, torch.arange(60.0)
    expected = 2 / math.comb(100, 40)  # all of the one, then all of the other
    assert drift_p_value(batch, calibration) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("m", "n", "levels"),
    [
        pytest.param(20, 100, None, marks=pytest.mark.thorough),
        pytest.param(50, 30, None, marks=pytest.mark.thorough),
        (40, 100, 8),
        (20, 30, None),
    ],
)
def test_without_a_drift_it_is_at_most_a_level_in_no_larger_a_share_of_draws(m, n, levels):
    generator = torch.Generator().manual_seed(m + n)
    found = []
    for _ in range(400):
        scores = torch.rand(m + n, generator=generator).double()
        if levels:  # many equal scores
            scores = (levels * scores).floor()
        found.append(drift_p_value(scores[:m], scores[m:]))
    for level in (0.01, 0.05, 0.1, 0.5):
        false = sum(p <= level for p in found)
        assert stats.binomtest(false, 400, level, alternative="greater").pvalue > 0.001
    if not levels:
        assert sum(p <= 0.5 for p in found) > 120  # not by never being small


def test_a_drift_to_less_or_more_certain_images_is_found():
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randn(500, generator=generator)
    batch = torch.randn(100, generator=generator)
    for changed in (batch + 1, batch - 1, 3 * batch):
        assert drift_p_value(changed, calibration) < 0.001
    assert drift_p_value(batch, calibration) > 0.01
    assert drift_p_value(calibration, calibration) == 1
    assert drift_p_value(batch + 100, calibration) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (
            torch.zeros(0),
            r"^scores must be floats of shape \(n,\) with n of at least 1, got float32 of shape ",
        ),
        (torch.zeros(3, 2), r"^scores must be floats of shape \(n,\)"),
        (torch.tensor([1.0, math.nan]), "^scores must be numbers, got 1 NaN values$"),
    ],
)
def test_what_it_refuses(scores, message):
    with pytest.raises(ValueError, match=message):
        drift_p_value(scores, torch.zeros(3))
