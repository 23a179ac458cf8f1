import math
from collections.abc import Callable
from itertools import combinations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from netfission.ensemble import mean_logits
from netfission.inference import (
    Average,
    disagreement,
    ensemble_log_probabilities,
    ensemble_probabilities,
    mutual_information,
    predictive_entropy,
)

AVERAGES: list[Average] = ["logits", "probabilities"]


def random_logits(
    shape: tuple[int, ...], seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=dtype)


def entropy(probabilities: Tensor, dim: int) -> Tensor:
    return -(probabilities * probabilities.log()).sum(dim)


any_logits = st.builds(
    random_logits,
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(2, 8)),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 10.0, 1e3, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 1, 5), (2, 3, 5, 4, 6)])
def test_averages_are_their_definitions(shape: tuple[int, ...]) -> None:
    logits = random_logits(shape)
    torch.testing.assert_close(ensemble_probabilities(logits), logits.mean(1).softmax(1))
    torch.testing.assert_close(ensemble_probabilities(logits, "probabilities"), logits.softmax(2).mean(1))


@settings(deadline=None, max_examples=60)
@given(logits=any_logits, weights=st.lists(st.floats(0.01, 9), min_size=5, max_size=5))
def test_a_mean_by_weights_is_its_definition(logits: Tensor, weights: list[float]) -> None:
    weights = weights[: logits.shape[1]]
    expected = torch.einsum("nec,e->nc", logits.double(), torch.tensor(weights).double()) / sum(weights)
    mean = mean_logits(logits, weights)
    assert mean.dtype == logits.dtype
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-5 * logits.abs().max().item())
    assert torch.equal(ensemble_log_probabilities(logits, tuple(weights)), mean.log_softmax(dim=1))


def test_equal_weights_are_no_weights_and_one_weight_is_one_exit() -> None:
    logits = random_logits((4, 3, 5))
    torch.testing.assert_close(mean_logits(logits, [2, 2, 2]), mean_logits(logits))
    assert torch.equal(mean_logits(logits, [0, 1, 0]), logits[:, 1])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 0.0, 0.0), (1.0, -1.0, 1.0), (1.0, math.nan, 1.0)])
def test_weights_that_no_mean_has_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"^average must be 3 weights, one of at least 0 per exit, not all 0, got"
    ):
        ensemble_log_probabilities(torch.zeros(1, 3, 2), weights)


@pytest.mark.parametrize("average", AVERAGES)
def test_log_probabilities_do_not_underflow(average: Average) -> None:
    logits = torch.tensor([[[0.0, -500.0], [0.0, -501.0]]])
    expected = {"logits": -500.5, "probabilities": -500 + math.log((1 + math.exp(-1)) / 2)}
    assert ensemble_probabilities(logits, average)[0, 1] == 0
    log_probability = ensemble_log_probabilities(logits, average)[0, 1].item()
    assert log_probability == pytest.approx(expected[average], rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(logits=any_logits, average=st.sampled_from(AVERAGES))
def test_probabilities_are_probabilities(logits: Tensor, average: Average) -> None:
    probabilities = ensemble_probabilities(logits, average)
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1
    torch.testing.assert_close(probabilities.sum(1), torch.ones_like(probabilities[:, 0]))


@settings(deadline=None, max_examples=100)
@given(logits=any_logits)
def test_uncertainties_keep_their_bounds(logits: Tensor) -> None:
    _, exits, classes = logits.shape
    shared = mutual_information(logits)
    total = predictive_entropy(logits, "probabilities")
    rounding = 1e-5
    assert shared.min() >= 0
    assert (shared <= total + rounding).all()
    assert shared.max() <= math.log(exits) + rounding
    for average in AVERAGES:
        of_ensemble = predictive_entropy(logits, average)
        assert of_ensemble.min() >= 0
        assert of_ensemble.max() <= math.log(classes) + rounding
    assert disagreement(logits).min() >= 0
    assert disagreement(logits).max() <= 1


@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 3, 5, 4, 6)])
def test_uncertainties_are_their_definitions(shape: tuple[int, ...]) -> None:
    logits = random_logits(shape)
    each = logits.softmax(2)
    mean = each.mean(1)
    torch.testing.assert_close(predictive_entropy(logits), entropy(logits.mean(1).softmax(1), dim=1))
    torch.testing.assert_close(predictive_entropy(logits, "probabilities"), entropy(mean, dim=1))
    # Independently of entropies: the mean divergence of the exits from their mean.
    divergence = (each * (each / mean.unsqueeze(1)).log()).sum(2).mean(1)
    torch.testing.assert_close(mutual_information(logits), divergence)


def test_disagreement_counts_pairs() -> None:
    logits = random_logits((20, 4, 3))
    predictions = logits.argmax(2).tolist()
    expected = [sum(a != b for a, b in combinations(row, 2)) / 6 for row in predictions]
    assert disagreement(logits).tolist() == pytest.approx(expected)


def test_disagreement_at_its_ends() -> None:
    everyone_apart = torch.eye(3).unsqueeze(0)
    assert disagreement(everyone_apart).tolist() == [1.0]
    assert disagreement(everyone_apart[:, [1, 1, 1]]).tolist() == [0.0]
    assert disagreement(everyone_apart[:, :1]).tolist() == [0.0]
    dense = random_logits((2, 3, 5, 4, 6))
    assert disagreement(dense).shape == (2, 4, 6)
    torch.testing.assert_close(disagreement(dense)[:, 1, 2], disagreement(dense[..., 1, 2]))


def test_certain_exits_that_contradict_each_other() -> None:
    logits = torch.tensor([[[1e4, 0.0], [0.0, 1e4]]])
    assert mutual_information(logits).item() == pytest.approx(math.log(2))
    assert predictive_entropy(logits[:, :1]).item() == 0


@pytest.mark.parametrize("average", AVERAGES)
def test_half_precision_is_computed_in_float32(average: Average) -> None:
    narrow = random_logits((4, 3, 100), dtype=torch.float32).bfloat16()
    probabilities = ensemble_probabilities(narrow, average)
    assert probabilities.dtype == torch.float32
    assert torch.equal(probabilities, ensemble_probabilities(narrow.float(), average))


@pytest.mark.parametrize("average", AVERAGES)
def test_order_of_exits_does_not_matter(average: Average) -> None:
    logits = random_logits((4, 3, 5))
    torch.testing.assert_close(
        ensemble_probabilities(logits[:, [2, 0, 1]], average),
        ensemble_probabilities(logits, average),
    )


@pytest.mark.parametrize(
    "function",
    [
        ensemble_probabilities,
        ensemble_log_probabilities,
        disagreement,
        predictive_entropy,
        mutual_information,
    ],
)
def test_refuses_other_layouts(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(
        ValueError,
        match=r"^logits must be floats of shape \(batch, exits, .*, got float32 of shape \(4, 5\)$",
    ):
        function(torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"^logits must be floats .*, got int64 of shape"):
        function(torch.zeros(4, 3, 5, dtype=torch.int64))
    with pytest.raises(
        ValueError,
        match=r"^logits must be of two classes or more, got float32 of shape \(4, 3, 1\); give .* logits$",
    ):
        function(torch.zeros(4, 3, 1))


@pytest.mark.parametrize(
    "function", [ensemble_probabilities, disagreement, predictive_entropy, mutual_information]
)
def test_works_under_vmap(function: Callable[[Tensor], Tensor]) -> None:
    logits = random_logits((4, 3, 5))
    singly = torch.func.vmap(lambda one: function(one[None])[0])(logits)
    torch.testing.assert_close(singly, function(logits))


def test_refuses_unknown_averages() -> None:
    with pytest.raises(ValueError, match=r"^average must be one of logits, probabilities, got 'votes'"):
        ensemble_probabilities(torch.zeros(4, 3, 5), "votes")  # type: ignore[arg-type]
