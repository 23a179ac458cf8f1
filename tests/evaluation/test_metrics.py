import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from netfission.evaluation import classification_metrics


def random_case(
    n: int, classes: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator, dtype=dtype)
    return logits.log_softmax(1), torch.randint(classes, (n,), generator=generator)


def numpy_metrics(log_probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    log_p = log_probabilities.double().numpy()
    y = labels.numpy()
    p = np.exp(log_p)
    order = np.argsort(-p, axis=1)
    correct = order[:, 0] == y
    confidence = p.max(axis=1)
    bins = np.clip(np.digitize(confidence, np.linspace(0, 1, 16)), 1, 15)
    ece = 0.0
    for index in range(1, 16):
        inside = bins == index
        if inside.any():
            ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    falling = np.argsort(-confidence, kind="stable")
    shared = np.array([correct[confidence == level].mean() for level in confidence])  # equal to float32
    adaptive = sum(
        len(rows) / len(y) * abs(shared[rows].mean() - confidence[rows].mean())
        for rows in np.array_split(falling, 15)
        if len(rows)
    )
    class_wise = 0.0
    for k in range(p.shape[1]):
        bins = np.clip(np.digitize(p[:, k], np.linspace(0, 1, 16)), 1, 15)
        for index in set(bins):
            inside = bins == index
            class_wise += inside.mean() * abs((y[inside] == k).mean() - p[inside, k].mean()) / p.shape[1]
    answered_and_wrong = np.concatenate([[0], np.cumsum(1 - shared[falling])]) / len(y)
    expected = {
        "top1": correct.mean(),
        "top5": (order[:, :5] == y[:, None]).any(axis=1).mean(),
        "nll": -log_p[np.arange(len(y)), y].mean(),
        "ece": ece,
        "brier": np.mean(np.sum((p - np.eye(p.shape[1])[y]) ** 2, axis=1)),
        "adaptive_ece": adaptive,
        "class_wise_ece": class_wise,
        "augrc": np.trapezoid(answered_and_wrong, dx=1 / len(y)),
    }
    if p.shape[1] <= 5:
        del expected["top5"]
    return expected


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 200),
    classes=st.integers(2, 12),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.3, 3.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_agrees_with_numpy(n: int, classes: int, seed: int, scale: float, dtype: torch.dtype) -> None:
    log_probabilities, labels = random_case(n, classes, seed, scale, dtype)
    metrics = classification_metrics(log_probabilities, labels)
    expected = numpy_metrics(log_probabilities, labels)
    smooth = metrics.pop("smooth_ece")  # see test_smooth_calibration.py
    assert type(smooth) is float
    assert list(metrics) == list(expected)
    assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert all(type(value) is float for value in metrics.values())


def test_certain_and_right() -> None:
    labels = torch.arange(8)
    log_probabilities = (1e3 * torch.eye(8)).log_softmax(1)
    assert classification_metrics(log_probabilities, labels) == pytest.approx(
        {"top1": 1.0, "top5": 1.0}
        | dict.fromkeys(
            ("nll", "ece", "brier", "adaptive_ece", "class_wise_ece", "smooth_ece", "augrc"), 0.0
        ),
        abs=1e-6,
    )


def test_certain_and_wrong() -> None:
    log_probabilities = (1e3 * torch.eye(8)).log_softmax(1)
    metrics = classification_metrics(log_probabilities, (torch.arange(8) + 1) % 8)
    assert metrics["top1"] == 0
    assert metrics["nll"] == pytest.approx(1e3)
    assert metrics["ece"] == pytest.approx(1)
    assert metrics["brier"] == pytest.approx(2)
    assert metrics["adaptive_ece"] == pytest.approx(1)
    assert metrics["class_wise_ece"] == pytest.approx(2 / 8)  # of each class two of eight probabilities
    assert metrics["augrc"] == 0.5


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=60))
def test_augrc_is_what_its_paper_says_of_auroc_and_accuracy(examples: list[tuple[int, bool]]) -> None:
    """Traub et al. 2024, equation 9: (1 − AUROC) a (1 − a) + (1 − a)² / 2; equal confidences count half."""
    confidence = torch.tensor([0.55 + 0.08 * level for level, _ in examples], dtype=torch.float64)
    correct = torch.tensor([right for _, right in examples])
    log_probabilities = torch.stack([confidence, 1 - confidence], dim=1).log()
    found = classification_metrics(log_probabilities, (~correct).long())["augrc"]
    pairs = confidence[correct][:, None] - confidence[~correct]
    below = ((pairs < 0).double() + (pairs == 0).double() / 2).sum() / len(examples) ** 2
    assert found == pytest.approx(below.item() + (1 - correct.double().mean().item()) ** 2 / 2)


def test_the_order_of_examples_does_not_matter_even_if_confidences_are_equal() -> None:
    log_probabilities = torch.tensor([[0.7, 0.3]] * 40, dtype=torch.float64).log()
    labels = torch.tensor([0] * 20 + [1] * 20)
    one, other = (classification_metrics(log_probabilities, each) for each in (labels, labels.flip(0)))
    assert one == pytest.approx(other)
    assert one["adaptive_ece"] == pytest.approx(0.2)


def test_full_certainty_shares_the_last_bin() -> None:
    # Right at 0.95, wrong at 1: in one bin |1/2 - 0.975|, in two (0.05 + 1) / 2.
    probabilities = torch.tensor([[0.95, 0.05], [1.0, 0.0]], dtype=torch.float64)
    ece = classification_metrics(probabilities.log(), torch.tensor([0, 1]))["ece"]
    assert ece == pytest.approx(0.475, abs=1e-6)


def test_probability_a_rounding_above_one() -> None:
    log_probabilities = torch.tensor([[1e-7, -20.0]] * 4)
    metrics = classification_metrics(log_probabilities, torch.zeros(4).long())
    assert metrics["ece"] == pytest.approx(0, abs=1e-6)


def test_impossible_label_has_infinite_nll() -> None:
    log_probabilities = torch.tensor([[0.0, -math.inf]])
    metrics = classification_metrics(log_probabilities, torch.tensor([1]))
    assert metrics["nll"] == math.inf
    assert metrics["brier"] == 2


def test_top5_needs_more_than_five_classes() -> None:
    assert "top5" not in classification_metrics(*random_case(10, 5))
    assert "top5" in classification_metrics(*random_case(10, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_passes(dtype: torch.dtype) -> None:
    log_probabilities, labels = random_case(50, 4)
    metrics = classification_metrics(log_probabilities.half(), labels)
    assert metrics == pytest.approx(classification_metrics(log_probabilities, labels), abs=1e-2)


@pytest.mark.parametrize(
    ("log_probabilities", "labels", "message"),
    [
        (
            torch.zeros(3),
            torch.zeros(3).long(),
            r"^log_probabilities must be floating point of shape \(n, .*, got float32 of shape \(3,\)$",
        ),
        (
            torch.zeros(3, 2).long(),
            torch.zeros(3).long(),
            "^log_probabilities must be floating point .*, got int64 of shape",
        ),
        (
            torch.zeros(0, 2),
            torch.zeros(0).long(),
            "^log_probabilities must be of at least one example, got none$",
        ),
        (
            torch.zeros(3, 1),
            torch.zeros(3).long(),
            r"^log_probabilities must be of two classes or more, got float32 of shape \(3, 1\)$",
        ),
        (
            torch.zeros(3, 2),
            torch.zeros(2).long(),
            r"^labels must be int64 of shape \(3,\), got int64 of shape \(2,\)$",
        ),
        (
            torch.zeros(3, 2),
            torch.zeros(3),
            r"^labels must be int64 of shape \(3,\), got float32 of shape \(3,\)$",
        ),
        (
            torch.zeros(3, 2),
            torch.tensor([0, 2, -1]),
            r"^labels must be class indices in \[0, 2\), got 2 of 3 outside, first 2$",
        ),
        (
            torch.zeros(3, 2),
            torch.zeros(3).long(),
            "^log_probabilities must be the output of log_softmax, got 3 of 3 rows .* not sum to 1$",
        ),
        (
            torch.tensor([[0.5, 0.5], [0.5, math.nan]]).log(),
            torch.zeros(2).long(),
            "log_softmax, got 1 of 2 rows",
        ),
    ],
)
def test_refuses_what_is_not_probabilities(log_probabilities: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        classification_metrics(log_probabilities, labels)
    assert "\n" not in str(caught.value)
