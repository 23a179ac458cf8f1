"""One class per image.

Targets are class indices. The loss is the softmax form of ensemble distillation (Lee & Lee 2024, arXiv
2408.02301), see `netfission.losses.ensemble_distillation_loss`; exits are averaged by
`netfission.ensemble.ensemble_probabilities`, the total uncertainty is the entropy of that prediction, and the
part from disagreement the mutual information of class and exit.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from netfission.config import DataConfig, TrainingConfig
from netfission.data.matched import MatchedImages, Part, load_matched
from netfission.data.targets import CLASSES
from netfission.ensemble import Average, ensemble_log_probabilities
from netfission.evaluation import Evaluation, evaluate_logits
from netfission.evaluation.calibration import Calibration
from netfission.evaluation.other_data import OtherEvaluation
from netfission.evaluation.out_of_distribution import uncertainty_scores
from netfission.evaluation.reliability import ReliabilityReport
from netfission.methods.base import Method
from netfission.tasks.base import TargetPredictions, Task
from netfission.tasks.columns import Column, Columns
from netfission.utils.text import percent


class Classification(Task):
    """One class per image, see the module.

    Example:
        >>> task = Classification(["cat", "dog"])
        >>> correct, nll = task.progress(torch.tensor([[[2.0, 0.0]]]), torch.tensor([0]), "logits")
        >>> correct, nll
        (tensor([1, 1]), tensor(0.1269))
    """

    name = "classification"
    targets = CLASSES
    headline = "top1"
    columns: ClassVar[Columns] = {
        "top1": Column("accuracy %", 100, 2, higher_is_better=True),
        "nll": Column("NLL", 1, 3),
        "ece": Column("ECE %", 100, 2),
        "brier": Column("Brier", 1, 4, paired=False, brief=False),
        "disagreement": Column("disagreement %", 100, 2, paired=False, brief=False),
        # Of the same logits averaged by the other rule, which is not the method's own.
        "other_nll": Column("NLL, other rule", 1, 3, paired=False),
        "other_ece": Column("ECE %, other rule", 100, 2, paired=False),
    }
    columns_remark = "other rule: the other of logits and probabilities"
    methods = None
    unused = ("void",)
    evaluation_kind = Evaluation
    other_evaluation_kind = OtherEvaluation
    calibration_kind = Calibration

    def load_other(
        self,
        name: str,
        shape: Sequence[int],
        config: DataConfig,
        *,
        part: Part | None = None,
        preferred: Sequence[Part] = ("test",),
    ) -> MatchedImages:
        """Load images of another data set, see `netfission.data.matched.load_matched`."""
        return load_matched(name, self.names, shape, part=part, preferred=preferred, corrupt=config.corrupt)

    def loss(self, method: Method, training: TrainingConfig) -> nn.Module:
        """Return the method's own loss."""
        return method.loss(training)

    def progress(self, outputs: Tensor, targets: Tensor, average: Average) -> tuple[Tensor, Tensor]:
        """Return the number of images that each exit and the ensemble classify correctly, and the NLL.

        Args:
            outputs: logits `(batch, exits, classes)`.
            targets: `(batch,)`, or soft `(batch, classes)`.
            average: what the ensemble averages.
        """
        if targets.ndim > 1:
            targets = targets.argmax(dim=1)
        ensemble = ensemble_log_probabilities(outputs, average)
        votes = torch.cat([outputs.argmax(dim=2), ensemble.argmax(dim=1, keepdim=True)], dim=1)
        correct = (votes == targets[:, None]).sum(dim=0)
        return correct, -ensemble.gather(1, targets[:, None]).sum()

    @classmethod
    def compared(cls, evaluation: Evaluation) -> dict[str, float | None]:
        """Return the measures of `columns`; those by the other rule are None for a single prediction."""
        other = evaluation.other_average
        if other is None or len(evaluation.exits) == 1:
            other = {}
        return {
            **{name: evaluation.ensemble[name] for name in ("top1", "nll", "ece", "brier")},
            "disagreement": evaluation.disagreement,
            "other_nll": other.get("nll"),
            "other_ece": other.get("ece"),
        }

    def blank_targets(self, images: Tensor) -> Tensor:
        """Return the first class for each image, `(batch,)` int64."""
        return torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def shown(self, score: float) -> str:
        """Return an accuracy in %."""
        return f"{percent(score, 1)} %"

    def in_short(self, measures: Mapping[str, float]) -> str:
        """Return the accuracy in %."""
        return f"{percent(measures[self.headline])} %"

    def calibrate(
        self, outputs: Tensor, targets: Tensor, *, average: Average, dependence: str = ""
    ) -> Calibration:
        """Fit a temperature and the scores of sets and bounds."""
        return Calibration.fit(outputs, targets, average=average, dependence=dependence)

    def evaluate(
        self, outputs: Tensor, targets: Tensor, *, average: Average, calibration: Any = None
    ) -> Evaluation:
        """Measure accuracy, likelihood and calibration; `reliability` measures what the calibration gives."""
        return evaluate_logits(outputs, targets, average=average)

    def other_evaluation(self, images: MatchedImages, evaluation: Any, reliability: Any) -> OtherEvaluation:
        """Return the figures on another data set, with their reliability."""
        about = (images.name, images.part, images.classes, images.left_out)
        return OtherEvaluation(*about, evaluation, reliability)

    def reliability(
        self, outputs: Tensor, targets: Tensor, *, average: Average, calibration: Any = None
    ) -> ReliabilityReport:
        """Return calibration, selective prediction and confusions."""
        calibration = cast(Calibration | None, calibration)
        return ReliabilityReport.from_logits(outputs, targets, self.names, calibration, average=average)

    def uncertainty_scores(self, outputs: Tensor, *, average: Average) -> dict[str, Tensor]:
        """Return the scores of `netfission.evaluation.out_of_distribution.uncertainty_scores`."""
        return uncertainty_scores(outputs, 1.0, average=average)

    def predict(
        self,
        outputs: Tensor,
        *,
        average: Average,
        calibration: Any = None,
        coverage: float | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> TargetPredictions:
        """Not here: `netfission.Classifier` predicts classes, with sets, bounds and marks."""
        raise NotImplementedError("see netfission.Classifier")
