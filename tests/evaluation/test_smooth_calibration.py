import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netfission.evaluation import classification_metrics
from netfission.evaluation.smooth_calibration import smooth_calibration_error

# What relplot 1.0.3 of the paper's authors returns, of the values that `case` makes:
#   python -c "from relplot import smECE; print(smECE(*map(numpy.array, case(seed, n, power))))"
# It searches in steps of 1/1024 and smooths on 1,001 points.
OF_RELPLOT = [
    (0, 2000, 1.0, 0.021948503650737493),
    (1, 2000, 2.0, 0.1754029247598735),
    (2, 300, 0.5, 0.12480367787977374),
    (3, 20000, 1.3, 0.07298926285037771),
    (4, 50, 4.0, 0.2610506952377913),
    (5, 10, 1.0, 0.14557436094130824),
]


def case(seed: int, n: int, power: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidences, evenly spread over [0.2, 1], and answers that are right with their power."""
    generator = np.random.default_rng(seed)
    confidence = 0.2 + 0.8 * generator.random(n)
    correct = generator.random(n) < confidence**power
    return torch.tensor(confidence), torch.tensor(correct).double()


def by_definition(confidence: torch.Tensor, correct: torch.Tensor, bandwidth: float) -> float:
    """The integral of the absolute mean residual, by a Gaussian kernel with mirror images beyond 0 and 1."""
    places = np.linspace(0, 1, 4001)[:, None]
    images = [sign * confidence.numpy() + shift for shift in (-4, -2, 0, 2, 4) for sign in (1, -1)]
    kernel = sum(np.exp(-(((places - image) / bandwidth) ** 2) / 2) for image in images)
    smoothed = kernel @ (confidence - correct).numpy() / (bandwidth * math.sqrt(2 * math.pi) * len(correct))
    return float(np.trapezoid(np.abs(smoothed), places[:, 0]))


@pytest.mark.parametrize(("seed", "n", "power", "expected"), OF_RELPLOT)
def test_is_what_its_authors_compute(seed, n, power, expected):
    assert smooth_calibration_error(*case(seed, n, power)) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("confidence", "found"),
    [([], "none"), ([0.5, math.nan], "nan"), ([0.5, -0.1], "-0.1"), ([1.1], "1.1"), ([math.inf], "inf")],
)
def test_what_is_no_probability_is_refused(confidence, found):
    values = torch.tensor(confidence, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"^confidence must be .*probabilit.*, got {found}$"):
        smooth_calibration_error(values, torch.ones(len(values)))


def test_a_probability_just_above_1_by_rounding_counts_as_1():
    assert smooth_calibration_error(torch.tensor([1 + 1e-6]), torch.tensor([1.0])) < 1e-5


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40).filter(
        lambda pairs: sum(abs(confidence - right) for confidence, right in pairs) > 0.5
    )
)
@settings(max_examples=25, deadline=None)
def test_the_error_at_the_bandwidth_of_its_size_is_the_error(pairs):
    confidence, correct = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    found = smooth_calibration_error(confidence, correct)
    assert 0 <= found <= 1
    below, above = max(found - 2e-4, 2e-3), found + 2e-4
    if found > 4e-3:  # which the integral above resolves
        assert by_definition(confidence, correct, below) >= below - 1e-4
        assert by_definition(confidence, correct, above) <= above + 1e-4
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    assert smooth_calibration_error(confidence[order], correct[order]) == pytest.approx(found, abs=2e-6)


@pytest.mark.parametrize("confidence", [0.0, 0.3, 1.0])
def test_one_confidence_is_off_by_its_distance_from_the_accuracy(confidence):
    values = torch.full((8,), confidence, dtype=torch.float64)
    correct = torch.tensor([1.0] * 6 + [0.0] * 2)
    assert smooth_calibration_error(values, correct) == pytest.approx(abs(confidence - 0.75), abs=1e-5)


def test_no_jump_where_confidences_leave_a_bin():
    # Half right at just above 0.6, a border of the 15 bins, half wrong at just below; the mean is calibrated.
    correct = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])

    def errors(distance: float) -> tuple[float, float]:
        confidence = torch.where(correct == 1, 0.6 + distance, 0.6 - distance).double()
        log_probabilities = torch.stack([confidence, 1 - confidence], dim=1).log()
        metrics = classification_metrics(log_probabilities, 1 - correct.long())
        return metrics["ece"], metrics["smooth_ece"]

    (binned, smooth), (binned_after, smooth_after) = errors(-1e-5), errors(1e-5)
    assert max(binned, binned_after) > 0.4
    assert smooth < 0.01 and smooth_after < 0.01


def test_perfect_answers_have_no_error():
    assert smooth_calibration_error(torch.ones(5), torch.ones(5)) == pytest.approx(0, abs=1e-6)
    assert smooth_calibration_error(torch.ones(5), torch.zeros(5)) == pytest.approx(1, abs=1e-6)
