"""The Gaussian form of loss, average and intervals, against torch.distributions and by properties."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence

from netfission.evaluation.number_metrics import gaussian_crps, gaussian_nll
from netfission.tasks.regression import (
    GaussianDistillationLoss,
    NumberCalibration,
    Regression,
    mixture,
    moments,
)


def random_outputs(seed, batch=4, exits=3, targets=2):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(batch, exits, 2 * targets, generator=generator, dtype=torch.float64)
    return outputs, torch.randn(batch, targets, generator=generator, dtype=torch.float64)


def gaussians(outputs):
    mean, variance = moments(outputs)
    return Normal(mean, variance.sqrt())


@given(seed=st.integers(0, 1000), exits=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_the_loss_is_likelihood_and_divergence_from_the_mixture(seed, exits):
    outputs, targets = random_outputs(seed, exits=exits)
    students = gaussians(outputs)
    center, spread, _ = mixture(*moments(outputs))
    teacher = Normal(center[:, None], spread.sqrt()[:, None])
    likelihood = -students.log_prob(targets[:, None]).sum(dim=1).mean()
    divergence = kl_divergence(teacher, students).sum(dim=1).mean()
    loss = GaussianDistillationLoss(["a", "b"], weight=0.7)(outputs, targets)
    torch.testing.assert_close(loss, likelihood + 0.7 * divergence)
    if exits == 1:
        torch.testing.assert_close(divergence, torch.zeros_like(divergence))


def test_no_gradient_flows_through_the_teacher():
    outputs, targets = random_outputs(0)
    outputs.requires_grad_()
    losses = [GaussianDistillationLoss(["a", "b"], weight=weight)(outputs, targets) for weight in (1.0, 0.0)]
    (losses[0] - losses[1]).backward()
    center, spread, _ = (part.detach()[:, None] for part in mixture(*moments(outputs)))
    again = outputs.detach().clone().requires_grad_()
    kl_divergence(Normal(center, spread.sqrt()), gaussians(again)).sum(dim=1).mean().backward()
    torch.testing.assert_close(outputs.grad, again.grad)


def test_the_scale_of_the_targets_changes_nothing():
    outputs, targets = random_outputs(2)
    plain = GaussianDistillationLoss(["a", "b"])(outputs, targets)
    scale = {"mean": [5.0, -2.0], "std": [10.0, 0.1]}
    moved = targets * torch.tensor(scale["std"]) + torch.tensor(scale["mean"])
    torch.testing.assert_close(GaussianDistillationLoss(["a", "b"], scale)(outputs, moved), plain)
    first, second = (Regression(["a", "b"], kind).predict(outputs, average="logits") for kind in ({}, scale))
    torch.testing.assert_close(second.std, first.std * torch.tensor(scale["std"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -1.0}, "^weight must be a finite number of at least 0, got -1.0$"),
        ({"reduction": "avg"}, "^reduction must be one of sum, mean, got 'avg'"),
        ({"scale": {"mean": [0.0]}}, "^scale must be a mean and a positive std for each of 1 numbers, got"),
        ({"scale": {"mean": [0.0], "std": [0.0]}}, "^scale must be a mean and a positive std"),
        ({"scale": {"mean": [math.nan], "std": [1.0]}}, "^scale must be a mean and a positive std"),
        ({"scale": {"mean": [0.0, 1.0], "std": [1.0, 1.0]}}, "^scale must be a mean and a positive std"),
    ],
)
def test_settings_of_the_loss_that_are_not_valid_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GaussianDistillationLoss(["a"], **changes)


def test_outputs_of_more_numbers_than_there_are_names_are_refused():
    for refused in (
        lambda outputs: GaussianDistillationLoss(["a"])(outputs, torch.zeros(1, 2)),
        lambda outputs: Regression(["a"]).predict(outputs, average="logits"),
    ):
        with pytest.raises(
            ValueError, match=r"^outputs must be of 1 numbers, got float32 of shape \(1, 2, 4"
        ):
            refused(torch.zeros(1, 2, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_refused(bad):
    task, outputs = Regression(["a"]), torch.zeros(3, 2, 2)
    outputs[1, 1, 0] = bad
    message = "^outputs must be finite, got NaN or infinity in 1 of 3 images$"
    for refused in (
        lambda: task.calibrate(outputs, torch.ones(3, 1), average="logits"),
        lambda: task.evaluate(outputs, torch.ones(3, 1), average="logits"),
        lambda: task.predict(outputs, average="logits"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_the_loss_works_under_vmap_and_compiles_in_one_graph():
    outputs, targets = random_outputs(0)
    loss = GaussianDistillationLoss(["a", "b"])
    singly = torch.func.vmap(lambda one, target: loss(one[None], target[None]))(outputs, targets)
    torch.testing.assert_close(singly.mean(), loss(outputs, targets))
    with pytest.raises(ValueError, match="targets must be finite"):
        torch.func.vmap(lambda one, target: loss(one[None], target[None]))(outputs, targets / 0)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(outputs, targets), loss(outputs, targets))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_targets_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="targets must be finite"):
        GaussianDistillationLoss(["a"])(torch.zeros(1, 2, 2), torch.tensor([[bad]]))


@given(seed=st.integers(0, 1000), weights=st.lists(st.integers(0, 3), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_the_ensemble_has_the_moments_of_the_mixture(seed, weights):
    weights[0] += 1
    mean, variance = moments(random_outputs(seed)[0])
    shares = torch.tensor(weights, dtype=torch.float64).expand(4, 2, 3)
    components = Normal(mean.movedim(1, 2), variance.sqrt().movedim(1, 2))
    reference = MixtureSameFamily(Categorical(shares), components)
    center, spread, between = mixture(mean, variance, weights)
    torch.testing.assert_close(center, reference.mean)
    torch.testing.assert_close(spread, reference.variance)
    assert (between <= spread).all()


@pytest.mark.parametrize("target", [-1.0, 0.3, 4.0])
def test_the_closed_form_of_crps_is_the_integral_that_defines_it(target):
    grid = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    distribution = Normal(torch.tensor(0.5, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64))
    integral = torch.trapezoid((distribution.cdf(grid) - (grid >= target).double()).square(), grid)
    closed = gaussian_crps(distribution.mean, distribution.variance, torch.tensor(target))
    assert closed.item() == pytest.approx(integral.item(), abs=1e-3)


def test_a_prediction_without_uncertainty_has_the_absolute_error_as_crps():
    crps = gaussian_crps(torch.zeros(4), torch.tensor([1e-12, 0, 0, 0]), torch.tensor([0.8, 0.8, -0.8, 0]))
    assert crps.tolist() == pytest.approx([0.8, 0.8, 0.8, 0], abs=1e-5)


def test_the_variance_is_bounded_and_keeps_a_gradient():
    raw = torch.tensor([-1000.0, -20.0, 0.0, 20.0, 1000.0])
    outputs = torch.stack([torch.zeros(5), raw], dim=1)[:, None].requires_grad_()
    _, variance = moments(outputs)
    assert math.exp(-10.01) <= variance.min() and variance.max() <= math.exp(2.01)
    variance.log()[1].sum().backward()
    assert outputs.grad[1, 0, 1] > 0


@pytest.mark.parametrize("n", [19, 50])
def test_intervals_cover_as_often_as_they_promise(n):
    """Over many draws of calibration and test images, whatever the errors look like."""
    generator = torch.Generator().manual_seed(n)
    task, inside = Regression(["a"]), []
    for _ in range(400):
        outputs = torch.randn(n + 10, 2, 2, generator=generator)
        targets = 3 * torch.randn(n + 10, 1, generator=generator) ** 3
        calibration = task.calibrate(outputs[:n], targets[:n], average="logits")
        found = task.predict(outputs[n:], average="logits", calibration=calibration, coverage=0.8)
        low, high = found.intervals.unbind(dim=2)
        inside.append(((low <= targets[n:]) & (targets[n:] <= high)).double().mean())
    exact = math.ceil((n + 1) * 0.8) / (n + 1)
    assert torch.stack(inside).mean().item() == pytest.approx(exact, abs=0.02)


def test_the_scale_of_the_deviations_makes_the_images_likelier():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.zeros(500, 1, 2)
    targets = 3 * torch.randn(500, 1, generator=generator)
    task = Regression(["a"])
    calibration = task.calibrate(outputs, targets, average="logits")
    assert calibration.scales[0] == pytest.approx(3, rel=0.2)
    evaluation = task.evaluate(outputs, targets, average="logits", calibration=calibration)
    assert evaluation.calibrated["nll"] < evaluation.ensemble["nll"]
    assert NumberCalibration.from_json(calibration.to_json()) == calibration
    raw = task.predict(outputs, average="logits")
    scaled = task.predict(outputs, average="logits", calibration=calibration)
    torch.testing.assert_close(scaled.std, raw.std * calibration.scales[0])
    torch.testing.assert_close(scaled.mean, raw.mean)


def test_disagreement_is_scaled_as_the_deviation_that_it_is_a_part_of():
    outputs, _ = random_outputs(0, targets=1)
    task = Regression(["a"])
    calibration = NumberCalibration(n=9, average="logits", scales=[0.1], errors=[[1.0] * 9])
    raw, scaled = (task.predict(outputs, average="logits", calibration=kind) for kind in (None, calibration))
    torch.testing.assert_close(scaled.disagreement / scaled.std, raw.disagreement / raw.std)
    assert (scaled.disagreement <= scaled.std).all()


@pytest.mark.parametrize(("n", "dependence"), [(8, ""), (9, ""), (9, "chosen on them")])
def test_calibrated_coverage_is_that_of_conformal_intervals_alone(n, dependence):
    outputs, targets = random_outputs(0, batch=n, targets=1)
    task = Regression(["a"])
    calibration = task.calibrate(outputs, targets, average="logits", dependence=dependence)
    evaluation = task.evaluate(outputs, targets, average="logits", calibration=calibration)
    measured = {"coverage", "width"} & evaluation.calibrated.keys()
    assert measured == ({"coverage", "width"} if n == 9 and not dependence else set())
    assert "coverage" in evaluation.ensemble


@given(n=st.integers(1, 3000))
@settings(max_examples=50, deadline=None)
def test_the_largest_coverage_that_is_named_can_be_kept(n):
    errors = [float(number) for number in range(n)]
    calibration = NumberCalibration(n=n, average="logits", scales=[1.0], errors=[errors])
    with pytest.raises(ValueError, match="coverage must be at most") as caught:
        calibration.widths(0.9999)
    named = float(re.search(r"at most ([\d.]+),", str(caught.value)).group(1))
    assert calibration.widths(named) == [errors[-1]] and named < 0.9999
    assert calibration.widths(1e-12) == [0.0]


def test_a_coverage_that_cannot_be_kept_is_refused():
    task, outputs = Regression(["a"]), torch.zeros(8, 1, 2)
    with pytest.raises(ValueError, match="coverage must be left out for a network without calibration"):
        task.predict(outputs, average="logits", coverage=0.9)
    few = task.calibrate(outputs, torch.zeros(8, 1), average="logits")
    with pytest.raises(ValueError, match=r"at most 0\.888, for 8 validation images, got 0\.9"):
        task.predict(outputs, average="logits", calibration=few, coverage=0.9)
    chosen = task.calibrate(outputs, torch.zeros(8, 1), average="logits", dependence="patience chose it")
    with pytest.raises(ValueError, match="patience chose it"):
        task.predict(outputs, average="logits", calibration=chosen, coverage=0.5)


def test_the_likelihood_is_that_of_the_normal_distribution():
    mean, variance, target = torch.tensor([0.3]), torch.tensor([2.0]), torch.tensor([1.0])
    torch.testing.assert_close(
        gaussian_nll(mean, variance, target), -Normal(mean, variance.sqrt()).log_prob(target)
    )
