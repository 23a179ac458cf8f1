"""Any number of labels per image.

An exit has one logit z per label, and each label is a question of its own: yes with probability σ(z). A pair
of logits (0, z) has the softmax (1 − σ(z), σ(z)). So the sigmoid forms of loss, average and uncertainty are
the softmax forms for these pairs, with labels as trailing dimension.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from netfission.config import Reduction, Teacher, TrainingConfig
from netfission.data.targets import LABELS
from netfission.ensemble import (
    Average,
    disagreement,
    ensemble_log_probabilities,
    fit_temperature,
    mutual_information,
    predictive_entropy,
)
from netfission.evaluation.label_metrics import (
    UNDECIDED,
    best_thresholds,
    multilabel_metrics,
    resampled_label_metrics,
)
from netfission.evaluation.resampling import Resampled
from netfission.losses import EnsembleDistillationLoss, distillation_loss, readable_values
from netfission.methods.base import Method
from netfission.tasks.base import NEAR, TOLERANCE, Sizes, Task
from netfission.tasks.calibration import TargetCalibration
from netfission.tasks.columns import Column, Columns
from netfission.tasks.evaluation import TargetEvaluation
from netfission.tasks.figures import FigureData, InspectedImages, Inspection
from netfission.tasks.label_early_exit import LabelEarlyExit
from netfission.tasks.label_figures import inspect_labels, precision_bars
from netfission.utils.errors import check_finite, describe, invalid
from netfission.utils.text import decimal, percent


def as_pairs(logits: Tensor) -> Tensor:
    """Return the logits of absence and presence of each label, `(batch, exits, 2, labels)`.

    Args:
        logits: of presence, `(batch, exits, labels)`, floating point.

    Raises:
        ValueError: the logits have another layout.

    Example:
        >>> as_pairs(torch.tensor([[[1.0, -2.0]]]))
        tensor([[[[ 0.,  0.],
                  [ 1., -2.]]]])
    """
    if logits.ndim != 3 or not logits.is_floating_point():
        raise invalid("logits", "floats of shape (batch, exits, labels)", found=describe(logits))
    return torch.stack([torch.zeros_like(logits), logits], dim=2)


class MultilabelDistillationLoss(nn.Module):
    """The loss that trains every exit on the labels and on the prediction of their ensemble.

    With exits' logits z_ik of label k, temperature T and teacher q_k = σ(mean_i z_ik / T), through which no
    gradient flows, the loss is

        sum_i mean_k BCE(z_ik, y_k) + weight * T^2 * sum_i mean_k KL(B(q_k) || B(σ(z_ik / T))),

    with Bernoulli distributions B: the ensemble distillation of Lee & Lee 2024 (arXiv 2408.02301) for each
    label, mean over labels; averaged over the batch.

    Args:
        temperature: T above, > 0; default 3.
        weight: factor on the distillation term, >= 0; default 1.
        teacher: see `netfission.losses.ensemble_distillation_loss`.
        reduction: over exits, `"sum"` or `"mean"`.

    Raises:
        ValueError: a setting is not valid, or logits or labels have another layout. Labels outside [0, 1] are
            found on a CPU only.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])  # two exits, two labels
        >>> loss = MultilabelDistillationLoss(weight=0.0)
        >>> loss(logits, torch.tensor([[1.0, 1.0]]))  # two times (log(1 + e^-2) + log 2) / 2
        tensor(0.8201)
    """

    def __init__(
        self,
        temperature: float = 3.0,
        weight: float = 1.0,
        teacher: Teacher = "logits",
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        self.of_pairs = EnsembleDistillationLoss(temperature, weight, teacher=teacher, reduction=reduction)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss.

        Args:
            logits: `(batch, exits, labels)`, floating point.
            labels: whether, or how probably, each image has each label: `(batch, labels)` in [0, 1].
        """
        pairs = as_pairs(logits)
        expected = (len(logits), logits.shape[2])
        if labels.shape != expected:
            raise invalid("labels", f"0 or 1 of shape {expected}", found=describe(labels))
        values = readable_values(labels)
        if values is not None and not ((values >= 0) & (values <= 1)).all():
            raise invalid("labels", "from 0 to 1", found="others, or NaN")
        labels = labels.to(torch.promote_types(pairs.dtype, torch.float32))
        loss: Tensor = self.of_pairs(pairs, torch.stack([1 - labels, labels], dim=1))
        return loss


@dataclass(frozen=True, kw_only=True)
class LabelCalibration(TargetCalibration):
    """What was learned from validation images, beside what every calibration holds.

    Attributes:
        temperature: what logits are divided by, see `netfission.ensemble.fit_temperature`.
        thresholds: for each label the probability from which it is predicted, see `best_thresholds`.
    """

    temperature: float
    thresholds: list[float]

    def summary(self) -> str:
        """Return temperature and thresholds in one line."""
        thresholds = ", ".join(decimal(threshold, 3) for threshold in self.thresholds)
        return f"temperature {self.temperature:.3f}, thresholds {thresholds}, by {self.images}"


@dataclass(frozen=True)
class LabelPredictions:
    """Predictions for a batch of images.

    Attributes:
        names: of the labels.
        logits: `(n, exits, labels)`, divided by the temperature.
        thresholds: of the labels.
        average: what the ensemble averages.

    Example:
        >>> logits = torch.tensor([[[2.0, -1.0]]])
        >>> predictions = LabelPredictions(["car", "tree"], logits, [0.5, 0.5], "logits")
        >>> predictions.records()[0]["labels"], predictions.probabilities
        (['car'], tensor([[0.8808, 0.2689]]))
    """

    names: Sequence[str]
    logits: Tensor
    thresholds: Sequence[float]
    average: Average

    @property
    def probabilities(self) -> Tensor:
        """The ensemble's probability of each label, `(n, labels)`."""
        return ensemble_log_probabilities(as_pairs(self.logits), self.average)[:, 1].exp()

    @property
    def exit_probabilities(self) -> Tensor:
        """The probability of each exit for each label, `(n, exits, labels)`."""
        return self.logits.sigmoid()

    @property
    def labels(self) -> Tensor:
        """Whether each label is predicted, `(n, labels)`, bool."""
        probabilities = self.probabilities
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64, device=probabilities.device)
        return probabilities >= thresholds

    @property
    def entropy(self) -> Tensor:
        """The total uncertainty: entropy of a label's probability in nats, mean over labels, `(n,)`."""
        return predictive_entropy(as_pairs(self.logits), self.average).mean(dim=1)

    @property
    def mutual_information(self) -> Tensor:
        """The uncertainty from disagreement, of label and exit in nats, mean over labels, `(n,)`."""
        return mutual_information(as_pairs(self.logits)).mean(dim=1)

    @property
    def disagreement(self) -> Tensor:
        """The share of pairs of exits that differ at a probability of 1/2, mean over labels, `(n,)`."""
        return disagreement(as_pairs(self.logits)).mean(dim=1)

    def records(self) -> list[dict[str, Any]]:
        """Return what is written of each image."""
        columns = zip(
            self.probabilities.tolist(),
            self.labels.tolist(),
            self.disagreement.tolist(),
            self.entropy.tolist(),
            self.mutual_information.tolist(),
            strict=True,
        )
        return [
            {
                "labels": [name for name, has in zip(self.names, present, strict=True) if has],
                "probabilities": dict(zip(self.names, probabilities, strict=True)),
                "disagreement": differ,
                "entropy": entropy,
                "mutual_information": information,
            }
            for probabilities, present, differ, entropy, information in columns
        ]


class Multilabel(Task):
    """Any number of labels per image, see the module.

    Example:
        >>> task = Multilabel(["car", "tree"])
        >>> logits, labels = torch.tensor([[[2.0, -2.0]]]), torch.tensor([[1.0, 0.0]])
        >>> task.evaluate(logits, labels, average="logits").ensemble["f1"]
        1.0
    """

    name = "multilabel"
    targets = LABELS
    progress_title = "labels right, %"
    remark = (
        "mAP and F1 are means over labels, NLL, ECE and Brier score over pairs of image and label. Labels "
        "are predicted from a probability of 1/2, calibrated from the thresholds of the labels."
    )
    headline = "map"
    columns: ClassVar[Columns] = {
        "map": Column("mAP %", 100, 2, higher_is_better=True),
        "f1": Column("F1 %", 100, 2, higher_is_better=True),
        "nll": Column("NLL", 1, 4),
        "ece": Column("ECE %", 100, 2),
        "brier": Column("Brier", 1, 4, paired=False, brief=False),
        "disagreement": Column("disagreement %", 100, 2, paired=False, brief=False),
    }
    exported: ClassVar[Mapping[str, str]] = {
        "probabilities": "(batch, labels), float32: of the ensemble, calibrated",
        "labels": "(batch, labels), bool: whether a label is predicted, by its threshold",
        "exit_probabilities": "(batch, exits, labels), float32: of each exit",
        "entropy": "(batch,), float32: of a label's probability, mean over labels, in nats",
        "mutual_information": "(batch,), float32: of label and exit, mean over labels, in nats",
        "disagreement": "(batch,), float32: share of the pairs of exits that differ, mean over labels",
    }
    exported_early = ("probabilities", "labels", "entropy")
    evaluation_kind = TargetEvaluation
    calibration_kind = LabelCalibration

    def loss(self, method: Method, training: TrainingConfig) -> nn.Module:
        """Return the sigmoid form of ensemble distillation, with the method's reduction and weight."""
        return MultilabelDistillationLoss(
            training.temperature,
            method.distillation_weight(training),
            training.teacher,
            training.reduction or method.reduction,
        )

    def distil(self, outputs: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return the divergence of the labels' probabilities from those of another network, mean over labels.

        With its logits t_k it is T^2 * sum_i mean_k KL(B(σ(t_k / T)) || B(σ(z_ik / T))), see
        `MultilabelDistillationLoss`.
        """
        return distillation_loss(as_pairs(outputs), as_pairs(teacher), temperature=temperature)

    def progress(self, outputs: Tensor, targets: Tensor, average: Average) -> tuple[Tensor, Tensor]:
        """Return the share of labels that are right at a threshold of 1/2, and the mean NLL of a label."""
        ensemble = ensemble_log_probabilities(as_pairs(outputs), average)
        present = torch.cat([outputs > 0, (ensemble[:, 1] > ensemble[:, 0]).unsqueeze(1)], dim=1)
        right = (present == (targets > UNDECIDED).unsqueeze(1)).float().mean(dim=2).sum(dim=0)
        nll = -(targets * ensemble[:, 1] + (1 - targets) * ensemble[:, 0]).mean(dim=1).sum()
        return right, nll

    def shown(self, score: float) -> str:
        """Return the share of right labels in %."""
        return f"{percent(score, 1)} %"

    def total_uncertainty(self, outputs: Tensor, *, average: Average, sizes: Sizes = ()) -> Tensor:
        """Return the entropy, mean over the labels."""
        return self.predict(outputs.double(), average=average).entropy

    def uncertainty_scores(self, outputs: Tensor, *, average: Average) -> dict[str, Tensor]:
        """Return entropy and mutual information, means over the labels."""
        found = self.predict(outputs.double(), average=average)
        scores = {"entropy": found.entropy, "mutual information": found.mutual_information}
        return scores if outputs.shape[1] > 1 else {"entropy": found.entropy}

    def figures(self, evaluation: TargetEvaluation) -> list[FigureData]:
        """Return the average precision of each label."""
        return [precision_bars(evaluation.by_target, evaluation.n)]

    def inspect(self, images: InspectedImages, *, average: Average, calibration: Any = None) -> Inspection:
        """Return precision and recall per label, the reliability, and the images with most wrong labels."""
        outputs, truth = (torch.cat(parts) for parts in zip(*images.batches(), strict=True))
        raw = self.predict(outputs, average=average)
        probabilities = {"reliability": raw.probabilities}
        answers = self.predict(outputs, average=average, calibration=calibration)
        if calibration is not None:
            probabilities["reliability-scaled"] = answers.probabilities
        return inspect_labels(images, self.names, answers.thresholds, probabilities, truth)

    def calibrate(
        self, outputs: Tensor, targets: Tensor, *, average: Average, dependence: str = ""
    ) -> LabelCalibration:
        """Fit one temperature for all labels, and a threshold for each."""
        check_finite("outputs", outputs)
        pairs = as_pairs(outputs.double())
        of_each = pairs.permute(0, 3, 1, 2).flatten(0, 1)  # (n · labels, exits, 2)
        temperature = fit_temperature(of_each, targets.long().flatten(), average)
        probabilities = ensemble_log_probabilities(pairs / temperature, average)[:, 1].exp()
        thresholds = best_thresholds(probabilities, targets)
        return LabelCalibration(
            n=len(targets),
            average=average,
            dependence=dependence,
            temperature=temperature,
            thresholds=thresholds,
            uncertainty=self.sorted_uncertainty(outputs, average=average, dependence=dependence),
        )

    def evaluate(
        self, outputs: Tensor, targets: Tensor, *, average: Average, calibration: Any = None
    ) -> TargetEvaluation:
        """Measure every exit and the ensemble at a threshold of 1/2, and with the calibration."""
        check_finite("outputs", outputs)
        undecided = torch.full((len(self.names),), UNDECIDED)
        pairs = as_pairs(outputs.double())
        log_probabilities = ensemble_log_probabilities(pairs, average)
        calibrated = None
        if calibration is not None:
            scaled = ensemble_log_probabilities(pairs / calibration.temperature, average)
            calibrated = multilabel_metrics(scaled, targets, scaled.new_tensor(calibration.thresholds))
        raw = LabelPredictions(self.names, outputs.double(), undecided.tolist(), average)
        return TargetEvaluation(
            len(targets),
            average,
            [
                multilabel_metrics(exit_logits.log_softmax(dim=1), targets, undecided)
                for exit_logits in pairs.unbind(dim=1)
            ],
            multilabel_metrics(log_probabilities, targets, undecided),
            {
                name: multilabel_metrics(
                    log_probabilities[:, :, [number]], targets[:, [number]], undecided[[number]]
                )
                for number, name in enumerate(self.names)
            },
            {
                "entropy": raw.entropy.mean().item(),
                "mutual_information": raw.mutual_information.mean().item(),
                "disagreement": raw.disagreement.double().mean().item(),
            },
            calibrated,
        )

    def resampled(
        self, outputs: Tensor, targets: Tensor, *, average: Average, calibration: Any = None
    ) -> Resampled:
        """Return the measures of the ensemble on sets of images, see `Task.resampled`."""
        predictions = self.predict(outputs, average=average, calibration=calibration)
        log_probabilities = ensemble_log_probabilities(as_pairs(predictions.logits), average)
        thresholds = log_probabilities.new_tensor(predictions.thresholds)
        return resampled_label_metrics(log_probabilities, targets, thresholds)

    def early_exit(self) -> LabelEarlyExit:
        """Return the mean of logits, and the certainty of labels."""
        return LabelEarlyExit()

    def rounding(self, values: Mapping[str, Tensor], calibration: Any = None) -> dict[str, Tensor]:
        """Return how much values may differ by rounding, see `Task.rounding`."""
        thresholds = [UNDECIDED] * len(self.names) if calibration is None else calibration.thresholds
        near = (values["probabilities"] - torch.tensor(thresholds)).abs() <= NEAR
        exits_near = ((values["exit_probabilities"] - UNDECIDED).abs() <= NEAR).any(dim=(1, 2))
        differ = torch.where(exits_near, 1.0, TOLERANCE)  # the disagreement of exits at 1/2
        return super().rounding(values) | {"labels": near, "disagreement": differ}

    def predict(
        self,
        outputs: Tensor,
        *,
        average: Average,
        calibration: Any = None,
        coverage: float | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> LabelPredictions:
        """Predict the labels of images.

        Raises:
            ValueError: a coverage is given, which labels do not have, or outputs are not finite.
        """
        if coverage is not None:
            raise invalid("coverage", f"left out with task={self.name}", coverage)
        check_finite("outputs", outputs)
        outputs = outputs.double()  # as the thresholds, which may be closer to 1 than float32 tells apart
        if calibration is None:
            return LabelPredictions(self.names, outputs, [UNDECIDED] * len(self.names), average)
        return LabelPredictions(
            self.names, outputs / calibration.temperature, calibration.thresholds, average
        )
