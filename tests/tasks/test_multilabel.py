"""The sigmoid form of loss, average and calibration, against other libraries and by properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score

from netfission.evaluation.label_metrics import best_thresholds, multilabel_metrics
from netfission.tasks.multilabel import (
    LabelCalibration,
    LabelPredictions,
    Multilabel,
    MultilabelDistillationLoss,
    as_pairs,
)


def random_logits(seed, batch=4, exits=3, labels=5):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, exits, labels, generator=generator, dtype=torch.float64)
    return logits, torch.randint(2, (batch, labels), generator=generator).double()


@given(seed=st.integers(0, 1000), exits=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_without_distillation_it_is_binary_cross_entropy_in_value_and_gradient(seed, exits):
    logits, labels = random_logits(seed, exits=exits)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = MultilabelDistillationLoss(weight=0.0)(ours, labels)
    expected = exits * F.binary_cross_entropy_with_logits(theirs, labels[:, None].expand_as(theirs))
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_distillation_is_the_divergence_of_bernoulli_distributions():
    logits, labels = random_logits(0)
    whole, alone = (MultilabelDistillationLoss(2.0, weight)(logits, labels) for weight in (1.0, 0.0))
    teacher = torch.distributions.Bernoulli(logits=logits.mean(dim=1, keepdim=True).expand_as(logits) / 2)
    students = torch.distributions.Bernoulli(logits=logits / 2)
    divergence = torch.distributions.kl_divergence(teacher, students)
    torch.testing.assert_close(whole - alone, 4 * divergence.sum(dim=1).mean())


def test_one_exit_has_nothing_to_distil():
    logits, labels = random_logits(0, exits=1)
    losses = [MultilabelDistillationLoss(weight=weight)(logits, labels) for weight in (0.0, 1.0)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("labels", [torch.tensor([[0.0, float("nan")]]), torch.tensor([[0.0, 2.0]])])
def test_labels_that_are_no_probabilities_are_refused(labels):
    with pytest.raises(ValueError, match="labels must be from 0 to 1"):
        MultilabelDistillationLoss()(torch.zeros(1, 2, 2), labels)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="labels must be 0 or 1 of shape"):
        MultilabelDistillationLoss()(torch.zeros(1, 2, 2), torch.zeros(1, 3))


def test_metrics_are_those_of_scikit_learn():
    logits, labels = random_logits(3, batch=40, exits=1)
    labels[:, 2] = 0  # a label that does not occur
    probabilities = logits[:, 0].sigmoid()
    thresholds = torch.tensor([0.5, 0.3, 0.5, 0.7, 0.5], dtype=torch.float64)
    metrics = multilabel_metrics(as_pairs(logits)[:, 0].log_softmax(dim=1), labels, thresholds)
    occurring = [0, 1, 3, 4]
    truth, shown = labels[:, occurring].numpy(), probabilities[:, occurring].numpy()
    predicted = (probabilities >= thresholds)[:, occurring].numpy()
    assert metrics["map"] == pytest.approx(average_precision_score(truth, shown), abs=1e-6)
    assert metrics["f1"] == pytest.approx(f1_score(truth, predicted, average="macro"), abs=1e-6)
    assert metrics["nll"] == pytest.approx(F.binary_cross_entropy(probabilities, labels).item())
    assert metrics["brier"] == pytest.approx((probabilities - labels).square().mean().item())


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_no_other_threshold_has_a_higher_f1(seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (torch.rand(12, 1, generator=generator, dtype=torch.float64) * 8).round() / 8
    labels = torch.randint(2, (12, 1), generator=generator).double()
    labels[0] = 1

    def score(threshold):
        predicted = probabilities >= threshold
        return (2 * labels[predicted].sum() / (labels.sum() + predicted.sum())).item()

    (best,) = best_thresholds(probabilities, labels)
    assert score(best) == pytest.approx(max(score(step / 16) for step in range(17)))


def test_a_threshold_of_one_half_stays_if_no_other_is_better():
    probabilities = torch.tensor([[0.9], [0.8], [0.2]])
    assert best_thresholds(probabilities, torch.tensor([[1], [1], [0]])) == [0.5]
    assert best_thresholds(probabilities[:2], torch.tensor([[1], [1]])) == [0.5]  # the label of all images


def test_a_label_without_images_keeps_the_threshold_of_one_half():
    assert best_thresholds(torch.rand(5, 1), torch.zeros(5, 1)) == [0.5]


def test_calibration_makes_overconfident_labels_likelier():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 2, 3, generator=generator)
    labels = (torch.rand(400, 3, generator=generator) < logits.mean(dim=1).sigmoid()).float()
    task = Multilabel(["a", "b", "c"])
    calibration = task.calibrate(4 * logits, labels, average="logits")
    assert calibration.temperature == pytest.approx(4, rel=0.2)
    evaluation = task.evaluate(4 * logits, labels, average="logits", calibration=calibration)
    assert evaluation.calibrated["nll"] < evaluation.ensemble["nll"]
    assert LabelCalibration.from_json(calibration.to_json()) == calibration
    predictions = task.predict(4 * logits, average="logits", calibration=calibration)
    expected = (4 * logits.double().mean(dim=1) / calibration.temperature).sigmoid()
    torch.testing.assert_close(predictions.probabilities, expected)
    assert calibration.thresholds == pytest.approx(best_thresholds(expected, labels), abs=1e-5)
    thresholds = torch.tensor(calibration.thresholds, dtype=torch.float64)
    assert torch.equal(predictions.labels, expected >= thresholds)


def test_a_threshold_next_to_1_means_the_same_in_evaluation_and_prediction():
    task, logits = Multilabel(["a", "b"]), torch.tensor([25.0, 19.0, -3.0])[:, None, None].expand(3, 1, 2)
    labels = torch.tensor([[1, 1], [0, 0], [0, 0]])
    close = LabelCalibration(n=3, average="logits", temperature=1.0, thresholds=[1 - 2.8e-9, 0.5])
    predictions = task.predict(logits, average="logits", calibration=close)
    assert predictions.labels.tolist() == [[True, True], [False, True], [False, False]]
    evaluation = task.evaluate(logits, labels, average="logits", calibration=close)
    assert evaluation.calibrated["f1"] == pytest.approx((1 + 2 / 3) / 2)


def test_predictions_stay_on_their_device():
    # Meta tensors have no values, so whatever would mix them with those of a CPU raises.
    predictions = LabelPredictions(["a", "b"], torch.zeros(3, 2, 2, device="meta"), [0.5, 0.4], "logits")
    assert predictions.labels.device.type == "meta"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_refused(bad):
    task, outputs = Multilabel(["a", "b"]), torch.zeros(3, 2, 2)
    outputs[1, 0, 0] = bad
    message = "^outputs must be finite, got NaN or infinity in 1 of 3 images$"
    for refused in (
        lambda: task.calibrate(outputs, torch.ones(3, 2), average="logits"),
        lambda: task.evaluate(outputs, torch.ones(3, 2), average="logits"),
        lambda: task.predict(outputs, average="logits"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_the_loss_works_under_vmap_and_compiles_in_one_graph():
    logits, labels = random_logits(0)
    loss = MultilabelDistillationLoss()
    singly = torch.func.vmap(lambda one, label: loss(one[None], label[None]))(logits, labels)
    torch.testing.assert_close(singly.mean(), loss(logits, labels))
    with pytest.raises(ValueError, match="labels must be from 0 to 1"):
        torch.func.vmap(lambda one, label: loss(one[None], label[None]))(logits, labels + 0.5)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))


def test_a_label_that_is_named_as_another_row_of_the_table_has_a_row_of_its_own():
    logits, labels = random_logits(0, batch=6, labels=3)
    task = Multilabel(["ensemble", "exit 0", "calibrated"])
    calibration = task.calibrate(logits, labels, average="logits")
    evaluation = task.evaluate(logits, labels, average="logits", calibration=calibration)
    lines = evaluation.table().splitlines()[1:-1]
    names = ["exit 0", "exit 1", "exit 2", "ensemble", "calibrated", "ensemble", "exit 0", "calibrated"]
    assert [line[:10].strip() for line in lines] == names
    assert len(set(lines)) == len(lines)


def test_uncertainty_from_disagreement_is_a_part_of_the_whole():
    logits, _ = random_logits(1, batch=50)
    predictions = Multilabel(list("abcde")).predict(logits, average="probabilities")
    assert (predictions.mutual_information <= predictions.entropy + 1e-12).all()
    alike = Multilabel(list("abcde")).predict(logits[:, :1].repeat(1, 3, 1), average="probabilities")
    torch.testing.assert_close(alike.mutual_information, torch.zeros(50, dtype=torch.float64))
    assert not alike.disagreement.any()
