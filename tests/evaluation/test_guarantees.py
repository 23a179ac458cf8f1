import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from netfission.evaluation.calibration import Calibration
from netfission.evaluation.conformal import class_scores, images_for_coverage
from netfission.evaluation.guarantees import CalibrationScores, images_for_threshold
from netfission.evaluation.risk_control import answers_for_risk, thresholds_to_test

CLASSES = [f"class {number}" for number in range(10)]
DRAWS = 1000
COVERAGE, RISK, DELTA = 0.9, 0.15, 0.1


@pytest.fixture(scope="module")
def population():
    """Log-probabilities of an overconfident network, and labels drawn from milder ones."""
    generator = torch.Generator().manual_seed(0)
    log_probabilities = 6 * torch.randn(20_000, 10, generator=generator, dtype=torch.float64)
    labels = log_probabilities.softmax(dim=1).multinomial(1, generator=generator)[:, 0]
    return (1.5 * log_probabilities).log_softmax(dim=1), labels


def scored(population, rows):
    return CalibrationScores.from_log_probabilities(population[0][rows], population[1][rows])


def at_most(broken, share=DELTA):
    """Whether promises broken so often of `DRAWS` are within the share, by a binomial test at 0.1 %."""
    return stats.binomtest(broken, DRAWS, share, alternative="greater").pvalue > 0.001


@pytest.mark.parametrize(("score", "n"), [("lac", 100), ("lac", 500), ("aps", 100), ("raps", 100)])
def test_sets_keep_their_coverage_on_average_and_with_delta_in_all_but_a_share_of_draws(population, score, n):
    log_probabilities, labels = population
    of_labels = class_scores(log_probabilities, score).gather(1, labels[:, None])[:, 0]
    ordered = of_labels.sort().values
    generator = torch.Generator().manual_seed(n)
    means, bounded = [], []
    for _ in range(DRAWS):
        sample = scored_column(of_labels, torch.randint(20_000, (n,), generator=generator), score)
        for delta, coverages in ((None, means), (DELTA, bounded)):
            quantile = sample.quantiles(COVERAGE, score, CLASSES, delta=delta)[0]
            coverages.append(int(torch.searchsorted(ordered, quantile, right=True)) / 20_000)
    mean = sum(means) / DRAWS
    deviation = torch.tensor(means).std().item() / DRAWS**0.5
    assert COVERAGE - 3 * deviation < mean
    # Not by taking all classes. APS and RAPS have the same score for all labels that are ranked first.
    assert score != "lac" or mean < COVERAGE + 1 / n + 3 * deviation
    assert at_most(sum(coverage < COVERAGE for coverage in bounded))
    assert sum(coverage < COVERAGE for coverage in means) > 2 * DELTA * DRAWS or score != "lac"


def scored_column(of_labels, rows, score):
    """Only what `quantiles` reads, as 1,000 draws of all columns take long."""
    column = of_labels[rows].tolist()
    empty = dict.fromkeys(("lac", "aps", "raps"), column)
    return CalibrationScores([0] * len(rows), empty | {score: column}, column, [True] * len(rows))


@pytest.mark.parametrize("n", [100, pytest.param(500, marks=pytest.mark.thorough)])
def test_answers_keep_their_risk_in_all_but_a_share_of_draws(population, n):
    log_probabilities, labels = population
    confidence, answers = log_probabilities.exp().max(dim=1)
    correct = answers == labels
    assert (~correct).double().mean() > RISK  # so that answering everything would break the promise
    order = confidence.argsort(descending=True)
    wrong = (~correct)[order].cumsum(0)
    falling = -confidence[order]
    generator = torch.Generator().manual_seed(n)
    broken = empirical = answered = 0
    for _ in range(DRAWS):
        rows = torch.randint(20_000, (n,), generator=generator)
        sample = CalibrationScores(
            [0] * n,
            dict.fromkeys(("lac", "aps", "raps"), [0.0] * n),
            confidence[rows].tolist(),
            correct[rows].tolist(),
        )
        threshold = sample.threshold(RISK, DELTA)
        count = int(torch.searchsorted(falling, -threshold, right=True))
        broken += count > 0 and wrong[count - 1].item() > RISK * count
        answered += count > 0
        ranked = confidence[rows].sort(descending=True)
        errors = (~correct[rows][ranked.indices]).cumsum(0) / torch.arange(1, n + 1)
        lowest = -ranked.values[errors <= RISK][-1].item() if (errors <= RISK).any() else -2.0
        count = int(torch.searchsorted(falling, lowest, right=True))
        empirical += count > 0 and wrong[count - 1].item() > RISK * count
    assert at_most(broken)
    assert answered > 0.3 * DRAWS  # not by answering nothing
    assert empirical > 2 * DELTA * DRAWS  # the threshold without a bound breaks it


def test_class_wise_sets_cover_a_class_that_is_difficult(population):
    log_probabilities, labels = population
    difficult = labels == 3
    log_probabilities = log_probabilities.clone()
    log_probabilities[difficult, 3] -= 4
    log_probabilities = log_probabilities.log_softmax(dim=1)
    scores = scored((log_probabilities, labels), torch.arange(0, 20_000, 4))
    test = torch.arange(1, 20_000, 4)
    covered = {}
    for class_wise in (False, True):
        quantiles = torch.tensor(scores.quantiles(COVERAGE, "lac", CLASSES, class_wise=class_wise))
        sets = class_scores(log_probabilities[test], "lac") <= quantiles
        hits = sets.gather(1, labels[test, None])[:, 0].double()
        covered[class_wise] = [hits[labels[test] == number].mean().item() for number in range(10)]
    assert covered[False][3] < 0.7
    assert min(covered[True]) > COVERAGE - 0.05


def test_a_class_without_enough_images_is_in_every_set_and_is_named(population):
    labels = population[1]
    rows = torch.cat([(labels == number).nonzero()[: 0 if number == 2 else 12, 0] for number in range(10)])
    rows = torch.cat([rows, (labels == 2).nonzero()[:8, 0]])
    message = (
        "^1 of 10 classes are in every prediction set, as they have fewer than 9 calibration images each"
    )
    with pytest.warns(UserWarning, match=f"{message}: class 2$"):
        quantiles = scored(population, rows).quantiles(0.9, "lac", CLASSES, class_wise=True)
    assert [quantile == float("inf") for quantile in quantiles] == [number == 2 for number in range(10)]
    with pytest.warns(UserWarning, match="10 of 20 classes are in every prediction set"):
        scored(population, torch.arange(1000)).quantiles(
            0.9, "lac", [*CLASSES, *(f"missing {number}" for number in range(10))], class_wise=True
        )


def test_too_few_images_are_refused_with_the_number_that_would_do(population):
    eight = scored(population, torch.arange(8))
    message = "^coverage must be at most 0.88 with 8 calibration images, got 0.9; 9 images are enough$"
    with pytest.raises(ValueError, match=message):
        eight.quantiles(0.9, "lac", CLASSES)
    scored(population, torch.arange(9)).quantiles(0.9, "lac", CLASSES)
    with pytest.raises(ValueError, match=r"at most 0\.74 with 8 .* got 0\.9; 22 images are enough$"):
        eight.quantiles(0.9, "lac", CLASSES, delta=0.1)
    message = (
        "^coverage must be at most 0.66 class by class with 2 calibration images of the largest class, "
        "got 0.9; 9 images of each class are enough$"
    )
    with pytest.raises(ValueError, match=message):
        eight.quantiles(0.9, "lac", CLASSES, class_wise=True)
    message = (
        "^risk must be at least 0.06 with 55 calibration images, got 0.05; 56 images without an error are "
        "enough$"
    )
    with pytest.raises(ValueError, match=message):
        scored(population, torch.arange(55)).threshold(0.05, 0.1)
    scored(population, torch.arange(56)).threshold(0.05, 0.1)


@given(st.integers(1, 3000), st.none() | st.sampled_from([0.01, 0.1, 0.5]))
def test_the_coverage_and_risk_that_an_error_names_are_possible(n, delta):
    scores = scored((torch.zeros(n, 2, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)), slice(None))

    def named(call, pattern):
        with pytest.raises(ValueError, match=pattern) as error:
            call()
        return float(re.search(pattern, str(error.value))[1])

    pattern = "at most ([0-9.e-]+) with"
    coverage = named(lambda: scores.quantiles(1 - 1e-6, "lac", ["a"], delta=delta), pattern)
    assert images_for_coverage(coverage, delta) <= n
    if delta is not None and n > 1:
        risk = named(lambda: scores.threshold(1e-6, delta), "at least ([0-9.]+) with")
        assert images_for_threshold(risk, delta) <= n


@pytest.mark.parametrize(("risk", "delta"), [(0.05, 0.1), (0.2, 0.05)])
def test_as_many_images_without_an_error_as_are_needed_are_all_answered(risk, delta):
    needed = images_for_threshold(risk, delta)
    for seed in range(20):
        confidence = torch.rand(needed, generator=torch.Generator().manual_seed(seed)).tolist()
        columns = dict.fromkeys(("lac", "aps", "raps"), [0.0] * needed)
        scores = CalibrationScores([0] * needed, columns, confidence, [True] * needed)
        assert scores.threshold(risk, delta) == 0


def test_the_images_that_place_the_thresholds_are_not_tested_on(population):
    scores = scored(population, torch.arange(200))
    threshold = scores.threshold(RISK, DELTA)
    flipped = [not correct for correct in scores.correct]
    assert replace(scores, correct=flipped[:40] + scores.correct[40:]).threshold(RISK, DELTA) == threshold
    assert replace(scores, correct=scores.correct[:40] + flipped[40:]).threshold(RISK, DELTA) != threshold
    placed = torch.tensor(scores.confidence[:40], dtype=torch.float64)
    assert threshold in thresholds_to_test(placed, 160, 2 * answers_for_risk(RISK, DELTA))


def test_if_every_answer_is_wrong_none_is_given(population):
    log_probabilities, labels = population
    wrong = (log_probabilities.argmax(dim=1) != labels).nonzero()[:200, 0]
    assert scored(population, wrong).threshold(0.05, 0.1) == 2


def test_the_order_of_images_is_drawn_so_that_folders_sorted_by_class_are_no_matter(population):
    labels = population[1]
    rows = labels.argsort(stable=True)[::10]
    columns = scored(population, rows)
    assert sorted(columns.labels) == labels[rows].tolist() != columns.labels
    assert len(set(columns.labels[:100])) == 10


def test_scores_are_kept_with_the_calibration_unless_the_network_was_chosen_on_its_images(population):
    logits, labels = population[0][:300, None], population[1][:300]
    calibration = Calibration.fit(logits, labels, average="logits")
    again = Calibration.from_json(calibration.to_json())
    assert again == calibration
    assert again.scores.threshold(0.3, 0.1) == calibration.scores.threshold(0.3, 0.1)
    chosen = Calibration.fit(logits, labels, average="logits", dependence="chosen on them")
    assert chosen == replace(calibration, scores=None, dependence="chosen on them")
    before = {name: value for name, value in asdict(chosen).items() if name not in ("scores", "dependence")}
    earlier = Calibration.from_json(json.dumps(before))  # a file of an earlier version
    assert earlier == replace(chosen, dependence="")


def test_columns_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"^scores must be 2 values for each of lac, aps, raps, got others$"):
        CalibrationScores([0, 1], {"lac": [0.1], "aps": [0.1], "raps": [0.1]}, [0.9, 0.8], [True, False])
