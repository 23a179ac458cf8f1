import math
from itertools import product

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from scipy.optimize import minimize_scalar
from torch import Tensor

from netfission.inference import (
    bounded_loss,
    bounded_thresholds,
    cascade_logits,
    choose_thresholds,
    thresholds,
)
from netfission.inference.bounded_loss import images_for_loss, loses_at_most
from netfission.inference.cascade import RULES, step_by_step

COSTS = [0.5, 0.2, 0.3, 0.4]
RUNS = 2000


def examples(n: int, exits: int, seed: int, classes: int = 10, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Easy and hard examples, of which the exits have much in common: logits and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    logits = 1.2 * torch.randn(n, 1, classes, generator=generator)
    logits = logits + 0.7 * torch.randn(n, exits, classes, generator=generator)
    logits[torch.arange(n), :, labels] += 6 * torch.rand(n, 1, generator=generator)
    return scale * logits, labels


def worth(
    logits: Tensor, labels: Tensor, chosen: tuple[float, ...], rule: str, order=None
) -> tuple[float, float]:
    """Accuracy and mean cost of a cascade with these thresholds."""
    output = cascade_logits(logits, chosen, rule=rule, order=order)
    total = torch.tensor(COSTS, dtype=torch.float64).cumsum(0)
    right = (output.logits.argmax(1) == labels).double().mean().item()
    return right, total[output.exits_used - 1].mean().item()


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    exits=st.integers(1, 4),
    rule=st.sampled_from(RULES),
    target=st.one_of(
        st.builds(dict, max_accuracy_drop=st.sampled_from([0.0, 0.2, 2.0, 10.0, 100.0])),
        st.builds(dict, max_cost=st.floats(0.5, 2.0)),
    ),
)
def test_targets_are_met_where_they_were_chosen(seed, exits, rule, target) -> None:
    logits, labels = examples(100, exits, seed)
    order = torch.randperm(exits, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = choose_thresholds(logits, labels, COSTS[:exits], order=order, rule=rule, **target)
    accuracy, cost = worth(logits, labels, chosen.thresholds, rule, order)
    assert (chosen.accuracy, chosen.cost) == (pytest.approx(accuracy), pytest.approx(cost))
    full = (logits.mean(1).argmax(1) == labels).double().mean().item()
    if "max_accuracy_drop" in target:
        assert accuracy >= full - target["max_accuracy_drop"] / 100 - 1e-9
    else:
        assert cost <= target["max_cost"] + 1e-8


def exhaustively(
    logits: Tensor, labels: Tensor, rule: str, max_accuracy_drop=None, max_cost=None
) -> tuple[float, float]:
    """The best expected accuracy and cost, by trying all thresholds that differ, one after another."""
    exits = logits.shape[1]
    _, scores = step_by_step(logits, None, rule)
    mean = logits.mean(1).double()
    fitted = minimize_scalar(  # see `fit_temperature`
        lambda power: (
            torch.nn.functional.cross_entropy(mean * 2**power, labels, reduction="sum").item()
            + 2 * (2**power - power * math.log(2))
        ),
        bounds=(-5, 5),
        method="bounded",
        options={"xatol": 1e-6},
    )
    probabilities = ((mean * 2**fitted.x).softmax(1) * 2**20).round() / 2**20  # sums without rounding
    rows = torch.arange(len(labels))
    found = []
    for some in product(*([0.0, *column.tolist()] for column in scores.unbind(1))):
        output = cascade_logits(logits, some, rule=rule)
        answers = output.logits.argmax(1)
        expected = probabilities[rows, answers].mean().item()
        right, cost = worth(logits, labels, some, rule)
        found.append((expected, right, cost))
    never = max(zip(found, range(len(found)), strict=True), key=lambda pair: pair[0][2])[0]
    full_right, full_expected = (mean.argmax(1) == labels).double().mean(), probabilities.max(1).values.mean()
    assert never[2] == pytest.approx(sum(COSTS[:exits]))
    if max_cost is not None:
        allowed = [(-expected, cost) for expected, _, cost in found if cost <= max_cost + 1e-9]
        best = min(allowed)
        return -best[0], best[1]
    # Where rounding decides whether a target is met, there is nothing to compare.
    assume(all(abs(full_expected - expected - max_accuracy_drop / 100) > 1e-4 for expected, _, _ in found))
    allowed = [
        (cost, -expected)
        for expected, right, cost in found
        if full_right - right <= max_accuracy_drop / 100 + 1e-9
        and full_expected - expected <= max_accuracy_drop / 100
    ]
    best = min(allowed)
    return -best[1], best[0]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    exits=st.integers(2, 3),
    rule=st.sampled_from(RULES),
    target=st.sampled_from(
        [{"max_accuracy_drop": 5.0}, {"max_accuracy_drop": 15.0}, {"max_cost": 0.6}, {"max_cost": 0.8}]
    ),
)
def test_nothing_else_is_better(seed, exits, rule, target) -> None:
    logits, labels = examples(11, exits, seed, classes=3)
    chosen = choose_thresholds(logits, labels, COSTS[:exits], rule=rule, **target)
    expected, cost = exhaustively(logits, labels, rule, **target)
    assert chosen.cost == pytest.approx(cost)
    if "max_cost" in target:
        assert chosen.expected_accuracy == pytest.approx(expected, abs=1e-4)


def test_each_threshold_is_refined_from_a_coarse_grid(monkeypatch) -> None:
    logits, labels = examples(400, 2, 0)
    fine = choose_thresholds(logits, labels, COSTS[:2], max_accuracy_drop=1.0)
    monkeypatch.setattr(thresholds, "_GRID", 2)
    assert choose_thresholds(logits, labels, COSTS[:2], max_accuracy_drop=1.0) == fine


def test_what_was_asked_for_holds_for_other_examples_too() -> None:
    """Counting right answers alone would lose a full point here, five times what was asked for."""
    lost = []
    for seed in range(6):
        chosen = choose_thresholds(*examples(1000, 4, seed, classes=50), COSTS, max_accuracy_drop=0.2)
        logits, labels = examples(20_000, 4, 100 + seed, classes=50)
        full = (logits.mean(1).argmax(1) == labels).double().mean().item()
        lost.append(full - worth(logits, labels, chosen.thresholds, "margin")[0])
    assert sum(lost) / len(lost) < 0.006


def test_expected_accuracy_does_not_trust_the_scale_of_logits() -> None:
    chosen = [choose_thresholds(*examples(2000, 3, 0, scale=k), COSTS[:3], max_cost=1.0) for k in (0.2, 1, 5)]
    expected = [each.expected_accuracy for each in chosen]
    assert expected == pytest.approx([expected[0]] * 3, abs=3e-3)
    assert expected[0] == pytest.approx(chosen[0].accuracy, abs=0.05)


def test_the_order_of_examples_does_not_matter() -> None:
    logits, labels = examples(300, 3, 0)
    mixed = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for target in ({"max_accuracy_drop": 1.0}, {"max_cost": 0.7}):
        first, second = (
            choose_thresholds(logits[rows], labels[rows], COSTS[:3], **target)
            for rows in (slice(None), mixed)
        )
        assert first.thresholds == second.thresholds


def test_one_exit_leaves_nothing_to_choose() -> None:
    logits, labels = examples(50, 1, 0)
    chosen = choose_thresholds(logits, labels, COSTS[:1], max_accuracy_drop=0.2)
    assert (chosen.thresholds, chosen.cost) == ((), COSTS[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "^max_accuracy_drop must be from 0 to 100 .*, unless max_cost is given, got None$"),
        (
            {"max_accuracy_drop": 0.2, "max_cost": 0.6},
            r"^max_cost must be None if max_accuracy_drop is given, got 0\.6$",
        ),
        (
            {"max_accuracy_drop": -0.1},
            r"^max_accuracy_drop must be from 0 to 100 percentage points, .*, got -0\.1$",
        ),
        (
            {"max_accuracy_drop": math.nan},
            r"^max_accuracy_drop must be from 0 to 100 percentage points, .*, got nan$",
        ),
        ({"max_cost": 0.4}, r"^max_cost must be at least 0\.5, the cost of the first exit, got 0\.4$"),
        ({"max_cost": math.nan}, r"^max_cost must be at least 0\.5, .*, got nan$"),
        (
            {"max_accuracy_drop": 0.2, "costs": [0.5, 0.2]},
            r"^costs must be 3 positive numbers, one per exit, got \[0\.5, 0\.2\]$",
        ),
        (
            {"max_accuracy_drop": 0.2, "costs": [0.5, 0.2, 0.0]},
            r"^costs must be 3 positive numbers, .*, got \[0\.5, 0\.2, 0\.0\]$",
        ),
        (
            {"max_accuracy_drop": 0.2, "order": [0, 1]},
            r"^order must be every exit from 0 to 2 once, got \[0, 1\]$",
        ),
        (
            {"max_accuracy_drop": 0.2, "rule": "agree"},
            "^rule must be one of margin, confidence, agreement, got 'agree'; did you mean agreement",
        ),
        (
            {"max_accuracy_drop": 0.2, "labels": torch.zeros(4, dtype=torch.int64)},
            r"^labels must be integers of shape \(20,\), as logits, got int64 of shape \(4,\)$",
        ),
        (
            {"max_accuracy_drop": 0.2, "labels": torch.full((20,), 50)},
            r"^labels must be from 0 to \d+, as logits have \d+ classes, got 50 to 50$",
        ),
        (
            {"max_accuracy_drop": 0.2, "labels": torch.full((20,), -1)},
            "^labels must be from 0 to .*, got -1 to -1$",
        ),
        (
            {"max_accuracy_drop": 0.2, "labels": torch.zeros(20)},
            r"^labels must be integers of shape \(20,\), as logits, got float32 of shape \(20,\)$",
        ),
        (
            {"max_accuracy_drop": 0.2, "costs": 3.0},
            r"^costs must be 3 positive numbers, one per exit, got 3\.0$",
        ),
        (
            {"max_accuracy_drop": 0.2, "logits": torch.zeros(20, 3)},
            r"^logits must be floats of shape \(batch, exits, .*, got float32 of shape \(20, 3\)$",
        ),
        (
            {"max_accuracy_drop": 0.2, "logits": torch.full((20, 3, 5), math.nan)},
            "^logits must be finite, .*, got 20 of 20 with NaN",
        ),
        (
            {"max_accuracy_drop": 0.2, "logits": torch.zeros(0, 3, 5), "labels": torch.zeros(0)},
            "^logits must be finite, of at least one example, got none$",
        ),
    ],
)
def test_arguments_that_are_not_what_it_takes(arguments, message) -> None:
    logits, labels = examples(20, 3, 0)
    with pytest.raises(ValueError, match=message) as caught:
        choose_thresholds(**({"logits": logits, "labels": labels, "costs": COSTS[:3]} | arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("lost", "won"), [(0.01, 0.0), (0.03, 0.02), (0.3, 0.25), (0.5, 0.0)])
def test_losses_above_the_bound_pass_the_test_in_at_most_delta_of_all_cases(lost, won):
    uniform = torch.rand(RUNS, 400, generator=torch.Generator().manual_seed(0))
    losses = (uniform < lost).double() - (uniform > 1 - won).double()
    for delta in (0.05, 0.2):
        wrong = sum(loses_at_most(values, lost - won, delta) for values in losses)
        assert wrong <= RUNS * delta + 3 * math.sqrt(RUNS * delta * (1 - delta))


def test_what_loses_less_passes_the_more_often_the_more_examples_there_are():
    uniform = torch.rand(300, 1600, generator=torch.Generator().manual_seed(0))
    losses = (uniform < 0.02).double() - (uniform > 0.99).double()  # 1 % on average
    shares = [sum(loses_at_most(row[:n], 0.02, 0.1) for row in losses) / 300 for n in (200, 800, 1600)]
    assert shares == sorted(shares) and shares[0] < 0.2 and shares[2] > 0.35


def test_where_not_all_combinations_are_tried_each_threshold_moves_among_its_own_values():
    generator = torch.Generator().manual_seed(26)
    labels = torch.randint(3, (70,), generator=generator)
    noise = torch.randn(70, 5, 3, generator=generator)
    logits = 2 * noise + 1.5 * torch.nn.functional.one_hot(labels, 3)[:, None]
    choice = choose_thresholds(logits, labels, [1.0, 0.5, 2.0, 1.0, 1.0], max_cost=2.2)
    assert choice.cost <= 2.2 and all(0 <= threshold <= 1 for threshold in choice.thresholds)


@pytest.mark.parametrize(("most", "delta"), [(0.01, 0.1), (0.002, 0.05), (0.5, 0.3)])
def test_without_a_loss_so_many_examples_are_needed(most, delta):
    needed = images_for_loss(most, delta)
    assert loses_at_most(torch.zeros(needed + 1), most, delta)
    assert not loses_at_most(torch.zeros(needed - 1), most, delta)


@pytest.mark.parametrize("rule", ["margin", "agreement"])
def test_the_bound_holds_on_other_examples_and_saves_cost(rule):
    logits, labels = examples(12_000, 3, seed=1)
    order = [1, 0, 2]
    full = (logits.mean(1).argmax(1) == labels).double()
    total = torch.tensor(COSTS[:3]).cumsum(0)
    kept = 0
    for seed in range(3):
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:2400]
        settings = {"order": order, "rule": rule, "max_accuracy_drop": 2.0}
        arguments = logits[chosen], labels[chosen], COSTS[:3]
        choice = bounded_thresholds(*arguments, delta=0.1, **settings)
        output = cascade_logits(logits, choice.thresholds, order=order, rule=rule)
        drop = full - (output.logits.argmax(1) == labels).double()
        kept += drop.mean().item() <= 0.02
        assert choice.cost == pytest.approx(total[output.exits_used - 1].mean().item(), abs=0.05)
        assert choose_thresholds(*arguments, **settings).cost <= choice.cost + 0.02 < total[-1] - 0.15
    assert kept == 3


def test_if_nothing_passes_every_exit_runs(monkeypatch):
    logits, labels = examples(500, 3, seed=0)
    monkeypatch.setattr(bounded_loss, "loses_at_most", lambda *_: False)
    choice = bounded_thresholds(logits, labels, COSTS[:3], max_accuracy_drop=2, delta=0.1)
    assert choice.thresholds == (1.0, 1.0)
    assert choice.cost == pytest.approx(sum(COSTS[:3]))
    assert cascade_logits(logits, choice.thresholds).exits_used.eq(3).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta": 0.0}, r"^delta must be a probability above 0 and below 1, got 0\.0$"),
        ({"delta": 1.0}, "^delta must be a probability above 0 and below 1"),
        ({"max_accuracy_drop": 0.0}, "^max_accuracy_drop must be above 0 and below 100 percentage points"),
        ({"max_accuracy_drop": 100.0}, "^max_accuracy_drop must be above 0 and below 100"),
        (
            {"max_accuracy_drop": 0.2},
            r"^max_accuracy_drop must be at least 4\.67 points with 100 images and delta=0\.1, got 0\.2; "
            r"2,306 images may be enough$",
        ),
    ],
)
def test_a_promise_that_cannot_be_made_is_refused(settings, message):
    logits, labels = examples(100, 2, seed=0)
    with pytest.raises(ValueError, match=message):
        bounded_thresholds(logits, labels, COSTS[:2], **{"max_accuracy_drop": 50.0, "delta": 0.1, **settings})
