"""One or several numbers per image.

An exit has a mean and a logarithm of the variance for each number. Numbers are scaled to mean 0 and standard
deviation 1 of the training images while training; measures and predictions are in their own units.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, get_args

import torch
from torch import Tensor, nn

from netfission.config import Reduction, TrainingConfig
from netfission.data import ImageData
from netfission.data.targets import NUMBERS
from netfission.ensemble import Average, weights_of
from netfission.evaluation.conformal import images_for_coverage, score_quantile
from netfission.evaluation.number_metrics import (
    NOMINAL,
    gaussian_nll,
    regression_metrics,
    resampled_regression_metrics,
)
from netfission.evaluation.resampling import Resampled
from netfission.losses import readable_values
from netfission.methods.base import Method
from netfission.tasks.base import TOLERANCE, Sizes, Task
from netfission.tasks.calibration import TargetCalibration
from netfission.tasks.columns import Column, Columns
from netfission.tasks.evaluation import TargetEvaluation
from netfission.tasks.figures import InspectedImages, Inspection
from netfission.tasks.gaussians import gaussian_divergence, mixture, moments
from netfission.tasks.number_early_exit import NumberEarlyExit
from netfission.tasks.number_figures import describe_intervals, inspect_numbers, normal_width
from netfission.utils.errors import check_choice, check_finite, describe, invalid
from netfission.utils.text import decimal, percent

_CLIP = 1.0  # norm of the gradient: the likelihood of a confident mistake is steep without end
_PRIOR = 2.0  # images whose error is as large as the network says, in the fit of the scale


class GaussianDistillationLoss(nn.Module):
    """The loss that trains every exit on the numbers and on the prediction of their ensemble.

    With exits' Gaussians N(μ_i, σ_i²) and the Gaussian N(μ, σ²) of the moments of their mixture, through
    which no gradient flows, see `mixture`, the loss is

        sum_i -log N(y; μ_i, σ_i²) + weight * sum_i KL(N(μ, σ²) || N(μ_i, σ_i²)),
        KL = log(σ_i / σ) + (σ² + (μ − μ_i)²) / (2 σ_i²) − 1/2,

    mean over numbers and the batch: ensemble distillation as in Lee & Lee 2024 (arXiv 2408.02301), with the
    likelihood and the ensemble of Lakshminarayanan et al. 2017 (arXiv 1612.01474). There is no temperature: a
    Gaussian has no other classes to soften it by.

    Args:
        names: of the numbers.
        scale: their `mean` and `std` by which they are scaled, a number each; default not scaled.
        weight: factor on the distillation term, >= 0; default 1.
        reduction: over exits, `"sum"` or `"mean"`.

    Raises:
        ValueError: a setting is not valid, or outputs or targets have another layout or are not of these
            numbers. Targets that are not finite are found on a CPU only.

    Example:
        >>> loss = GaussianDistillationLoss(["road"])
        >>> loss(torch.tensor([[[0.5, 0.0]]]), torch.tensor([[0.5]]))  # (log(2π) - 0.127) / 2
        tensor(0.8555)
    """

    shift: Tensor
    factor: Tensor

    def __init__(
        self,
        names: Sequence[str],
        scale: Mapping[str, list[float]] | None = None,
        weight: float = 1.0,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        if not 0 <= weight < math.inf:
            raise invalid("weight", "a finite number of at least 0", weight)
        check_choice("reduction", reduction, get_args(Reduction))
        self.weight = weight
        self.reduction = reduction
        shift, factor = _scale_of(names, scale)
        self.register_buffer("shift", shift.float(), persistent=False)
        self.register_buffer("factor", factor.float(), persistent=False)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss.

        Args:
            outputs: `(batch, exits, 2 · targets)`, see `moments`.
            targets: `(batch, targets)`, in their own units.
        """
        mean, variance = moments(outputs)
        if mean.shape[2] != len(self.shift):
            raise invalid("outputs", f"of {len(self.shift)} numbers", found=describe(outputs))
        expected = (len(mean), len(self.shift))
        if targets.shape != expected:
            raise invalid("targets", f"numbers of shape {expected}", found=describe(targets))
        values = readable_values(targets)
        if values is not None and not values.isfinite().all():
            raise invalid("targets", "finite", found="NaN or infinity")
        scaled = ((targets - self.shift) / self.factor).to(mean.dtype)
        loss = gaussian_nll(mean, variance, scaled.unsqueeze(1))
        if self.weight:
            center, spread, _ = (moment.unsqueeze(1) for moment in mixture(mean.detach(), variance.detach()))
            loss = loss + self.weight * gaussian_divergence(center, spread, mean, variance)
        total = loss.sum(dim=1).mean()
        return total / mean.shape[1] if self.reduction == "mean" else total


def _scale_of(names: Sequence[str], scale: Mapping[str, list[float]] | None) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the numbers, float64; 0 and 1 without a scale."""
    scale = scale or {"mean": [0.0] * len(names), "std": [1.0] * len(names)}
    # By Python's numbers, as a graph that is traced for a file compares no tensors.
    shift, factor = scale.get("mean", []), scale.get("std", [])
    are_positive = all(0 < value < math.inf for value in factor)
    if not (len(shift) == len(factor) == len(names) and all(map(math.isfinite, shift)) and are_positive):
        expected = f"a mean and a positive std for each of {len(names)} numbers"
        raise invalid("scale", expected, dict(scale))
    return torch.tensor(shift, dtype=torch.float64), torch.tensor(factor, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class NumberCalibration(TargetCalibration):
    """What was learned from validation images, beside what every calibration holds.

    Attributes:
        scales: for each number, the factor on its standard deviation that makes the images most likely, with
            a prior of two images whose error is as large as the network says (Levi et al. 2022, arXiv
            1905.11659).
        errors: for each number, the absolute errors of the mean in standard deviations, sorted; none if the
            network depends on the images.
    """

    scales: list[float]
    errors: list[list[float]]

    def summary(self) -> str:
        """Return the scales, and half the width of intervals of 90 % if there are some, in one line."""
        parts = [f"standard deviations times {', '.join(f'{scale:.3f}' for scale in self.scales)}"]
        if self.has_widths(NOMINAL):
            widths = ", ".join(f"{width:.3f}" for width in self.widths(NOMINAL))
            parts.append(f"intervals of {percent(NOMINAL, 0)} % ± {widths} of them as trained")
        return f"{'; '.join(parts)}; by {self.images}"

    def has_widths(self, coverage: float) -> bool:
        """Return whether there are intervals of a coverage: enough images, on which nothing depends."""
        return not self.dependence and self.n >= images_for_coverage(coverage)

    def widths(self, coverage: float) -> list[float]:
        """Return half the width of intervals in standard deviations, for each number.

        The intervals are those of split conformal prediction with errors over the predicted standard
        deviation (Lei et al. 2018, arXiv 1604.04173, section 5.2): of n images, the
        ceil((n + 1) · coverage)-th smallest. If another image is drawn as these were, its number is in the
        interval with a probability of at least `coverage`; with several numbers, each of them alone.

        Args:
            coverage: in (0, 1).

        Raises:
            ValueError: the coverage is out of range, too large for the number of images, or the network
                depends on them.

        Example:
            >>> errors = [[0.1 * number for number in range(1, 20)]]
            >>> calibration = NumberCalibration(n=19, average="logits", scales=[1.0], errors=errors)
            >>> [round(width, 1) for width in calibration.widths(0.9)]
            [1.8]
        """
        if not self.has_widths(coverage):
            if self.dependence:
                raise invalid("coverage", "left out for this network", coverage, hint=self.dependence)
            expected = f"at most {_largest_coverage(self.n)}, for {self.n} {self.fitted_on}"
            raise invalid("coverage", expected, coverage)
        return [score_quantile(errors, coverage) for errors in self.errors]


def _largest_coverage(n: int) -> float:
    """Return n / (n + 1), rounded down to two digits more than n has."""
    power = 10 ** (2 + len(str(n)))
    return float(n * power // (n + 1) / power)


@dataclass(frozen=True)
class NumberPredictions:
    """Predictions for a batch of images, in the units of the numbers.

    Attributes:
        names: of the numbers.
        mean: of the ensemble, `(n, targets)`.
        std: the total uncertainty: standard deviation of the ensemble, `(n, targets)`, times the scale of the
            calibration if there is one.
        disagreement: the part of `std` from disagreement: standard deviation of the exits' means,
            `(n, targets)`, times the same scale.
        exit_means: of each exit, `(n, exits, targets)`.
        coverage: least share of the images whose number is in its interval; None without intervals.
        intervals: lower and upper ends, `(n, targets, 2)`; None without a coverage.
    """

    names: Sequence[str]
    mean: Tensor
    std: Tensor
    disagreement: Tensor
    exit_means: Tensor
    coverage: float | None = None
    intervals: Tensor | None = None

    def records(self) -> list[dict[str, Any]]:
        """Return what is written of each image."""
        records: list[dict[str, Any]] = [
            {
                name: dict(zip(self.names, values.tolist(), strict=True))
                for name, values in (("mean", mean), ("std", std), ("disagreement", differ))
            }
            for mean, std, differ in zip(self.mean, self.std, self.disagreement, strict=True)
        ]
        if self.intervals is not None:
            for record, ends in zip(records, self.intervals.tolist(), strict=True):
                record["low"] = dict(zip(self.names, (low for low, _ in ends), strict=True))
                record["high"] = dict(zip(self.names, (high for _, high in ends), strict=True))
                record["coverage"] = self.coverage
        return records


def _ratio(weights: Sequence[float]) -> str:
    return " : ".join(f"{weight:g}" for weight in weights)


class Regression(Task):
    """One or several numbers per image, see the module.

    Example:
        >>> task = Regression(["road"], {"mean": [0.3], "std": [0.1]})
        >>> task.predict(torch.zeros(1, 2, 2), average="logits").mean
        tensor([[0.3000]], dtype=torch.float64)
    """

    name = "regression"
    targets = NUMBERS
    progress_title = "absolute error, standard deviations"
    progress_factor = 1.0
    remark = (
        "Errors are in the units of the numbers; those of several numbers are means over them. Coverage: "
        "share of the numbers in intervals of 90 %, those of the Gaussian, or calibrated the conformal ones, "
        "with their mean width."
    )
    headline = "mae"
    columns: ClassVar[Columns] = {
        "mae": Column("MAE", 1, 4),
        "rmse": Column("RMSE", 1, 4),
        "nll": Column("NLL", 1, 3),
        "crps": Column("CRPS", 1, 4),
        # Neither a high nor a low one is better: it should be that of the intervals.
        "coverage": Column("coverage %", 100, 2, paired=False),
        "disagreement": Column("disagreement", 1, 4, paired=False, brief=False),
    }
    exported: ClassVar[Mapping[str, str]] = {
        "mean": "(batch, numbers), float32: of the ensemble, in the units of the targets",
        "std": "(batch, numbers), float32: standard deviation of the ensemble, calibrated",
        "disagreement": "(batch, numbers), float32: standard deviation of the exits' means",
        "exit_means": "(batch, exits, numbers), float32: of each exit",
        "intervals": "(batch, numbers, 2), float32: lower and upper end",
    }
    exported_early = ("mean", "std")
    unused = (*Task.unused, "temperature", "teacher")
    options = frozenset({"coverage"})
    evaluation_kind = TargetEvaluation
    calibration_kind = NumberCalibration

    @classmethod
    def from_data(cls, data: ImageData, *, balance: bool = False) -> Self:
        """Return the task of a data set, with the scale of its training images."""
        values = data.train.labels.double()
        std, mean = torch.std_mean(values, dim=0, correction=0)
        return cls(data.classes, {"mean": mean.tolist(), "std": std.tolist()})

    @classmethod
    def training(cls, training: TrainingConfig) -> TrainingConfig:
        """Return the settings with gradients clipped to a norm of 1 unless they say otherwise."""
        return replace(training, clip=_CLIP) if training.clip is None else training

    @property
    def headline_note(self) -> str:
        """Over how many numbers, which may be of different units, the headline is a mean."""
        return f"mean of {len(self.names)} numbers" if len(self.names) > 1 else ""

    @property
    def outputs(self) -> int:
        """The number of outputs of an exit: a mean and a logarithm of the variance for each number."""
        return 2 * len(self.names)

    def loss(self, method: Method, training: TrainingConfig) -> nn.Module:
        """Return the Gaussian form of ensemble distillation, with the method's reduction and weight."""
        return GaussianDistillationLoss(
            self.names,
            self.scale,
            method.distillation_weight(training),
            training.reduction or method.reduction,
        )

    def distil(self, outputs: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return the divergence of the exits' Gaussians from that of another network, mean over numbers.

        It is sum_i KL(N(μ, σ²) || N(μ_i, σ_i²)), see `GaussianDistillationLoss`, which has no temperature.
        """
        mean, variance = moments(outputs)
        return gaussian_divergence(*moments(teacher.detach()), mean, variance).sum(dim=1).mean()

    def progress(self, outputs: Tensor, targets: Tensor, average: Average) -> tuple[Tensor, Tensor]:
        """Return the absolute error in standard deviations of the training images, and the NLL, scaled so."""
        shift, factor = (part.to(outputs.device, torch.float32) for part in _scale_of(self.names, self.scale))
        scaled = (targets - shift) / factor
        mean, variance = moments(outputs)
        center, spread, _ = mixture(mean, variance, weights_of(average))
        errors = torch.cat([mean, center.unsqueeze(1)], dim=1) - scaled.unsqueeze(1)
        return errors.abs().mean(dim=2).sum(dim=0), gaussian_nll(center, spread, scaled).mean(dim=1).sum()

    def shown(self, score: float) -> str:
        """Return an absolute error in standard deviations."""
        return decimal(score, 3)

    @classmethod
    def averaged(cls, average: Average) -> str:
        """Return that the exits' Gaussians are mixed, whatever other tasks average."""
        weights = weights_of(average)
        return "Gaussians" if weights is None else f"Gaussians, weighted {_ratio(weights)}"

    def rule(self, average: Average) -> str:
        """Return in words how the exits make one prediction: by the mixture, not by a mean."""
        weights = weights_of(average)
        rule = "mixture of the exits' Gaussians"
        return rule if weights is None else f"{rule}, weighted {_ratio(weights)}"

    def total_uncertainty(self, outputs: Tensor, *, average: Average, sizes: Sizes = ()) -> Tensor:
        """Return the standard deviation over that of the training images, mean over the numbers."""
        return self.uncertainty_scores(outputs, average=average)["standard deviation"]

    def uncertainty_scores(self, outputs: Tensor, *, average: Average) -> dict[str, Tensor]:
        """Return the standard deviation, and its part from disagreement, over that of the training images.

        Both are means over the numbers.
        """
        found = self.predict(outputs.double(), average=average)
        _, factor = _scale_of(self.names, self.scale)
        scores = {"standard deviation": found.std, "disagreement": found.disagreement}
        return {
            name: (values / factor.to(values.device)).mean(dim=1)
            for name, values in scores.items()
            if name != "disagreement" or outputs.shape[1] > 1
        }

    def inspect(self, images: InspectedImages, *, average: Average, calibration: Any = None) -> Inspection:
        """Return predicted against true numbers, the coverage of intervals, and surprising images."""
        outputs, truth = (torch.cat(parts) for parts in zip(*images.batches(), strict=True))
        conformal = calibration is not None and calibration.has_widths(NOMINAL)
        raw = self.predict(outputs, average=average)
        answers = self.predict(
            outputs, average=average, calibration=calibration, coverage=NOMINAL if conformal else None
        )
        stds = {"as trained": raw.std}
        if calibration is not None:
            stds["calibrated"] = answers.std
        intervals = answers.intervals
        if intervals is None:
            half = normal_width(NOMINAL) * answers.std
            intervals = torch.stack([answers.mean - half, answers.mean + half], dim=2)
        described = describe_intervals(NOMINAL, conformal)
        return inspect_numbers(images, self.names, answers.mean, stds, truth, intervals, described)

    def calibrate(
        self, outputs: Tensor, targets: Tensor, *, average: Average, dependence: str = ""
    ) -> NumberCalibration:
        """Fit the scale of the standard deviations, and keep the errors for intervals."""
        predictions = self.predict(outputs, average=average)
        errors = (targets - predictions.mean).abs() / predictions.std
        scales = ((errors.square().sum(dim=0) + _PRIOR) / (len(errors) + _PRIOR)).sqrt()
        kept = [] if dependence else [column.tolist() for column in errors.sort(dim=0).values.T]
        return NumberCalibration(
            n=len(targets),
            average=average,
            dependence=dependence,
            uncertainty=self.sorted_uncertainty(outputs, average=average, dependence=dependence),
            scales=scales.tolist(),
            errors=kept,
        )

    def evaluate(
        self, outputs: Tensor, targets: Tensor, *, average: Average, calibration: Any = None
    ) -> TargetEvaluation:
        """Measure every exit and the ensemble, with intervals if there is a calibration."""
        check_finite("outputs", outputs)
        exits = [self.predict(part.unsqueeze(1), average="logits") for part in outputs.unbind(dim=1)]
        ensemble = self.predict(outputs, average=average)
        calibrated = None
        if calibration is not None:
            std = ensemble.std * ensemble.std.new_tensor(calibration.scales)
            calibrated = regression_metrics(ensemble.mean, std.square(), targets)
            del calibrated["coverage"]  # of the Gaussian, whereas a calibration is for conformal intervals
            if calibration.has_widths(NOMINAL):
                half = ensemble.std * ensemble.std.new_tensor(calibration.widths(NOMINAL))
                inside = (targets - ensemble.mean).abs() <= half
                calibrated["coverage"] = inside.double().mean().item()
                calibrated["width"] = 2 * half.mean().item()
        return TargetEvaluation(
            len(targets),
            average,
            [regression_metrics(part.mean, part.std.square(), targets) for part in exits],
            regression_metrics(ensemble.mean, ensemble.std.square(), targets),
            {
                name: regression_metrics(
                    ensemble.mean[:, [number]], ensemble.std[:, [number]].square(), targets[:, [number]]
                )
                for number, name in enumerate(self.names)
            },
            {"std": ensemble.std.mean().item(), "disagreement": ensemble.disagreement.mean().item()},
            calibrated,
            rule=self.rule(average),
        )

    def resampled(
        self, outputs: Tensor, targets: Tensor, *, average: Average, calibration: Any = None
    ) -> Resampled:
        """Return the errors of the ensemble on sets of images, see `Task.resampled`."""
        found = self.predict(outputs, average=average, calibration=calibration)
        return resampled_regression_metrics(found.mean, found.std.square(), targets)

    def early_exit(self) -> NumberEarlyExit:
        """Return the mixture of Gaussians, and the precision of a prediction."""
        return NumberEarlyExit(*_scale_of(self.names, self.scale))

    def rounding(self, values: Mapping[str, Tensor], calibration: Any = None) -> dict[str, Tensor]:
        """Return how much values may differ by rounding: in shares of each number's standard deviation."""
        _, factor = _scale_of(self.names, self.scale)
        tolerance = TOLERANCE * factor.float()
        wide = tolerance.unsqueeze(1)  # of the ends of intervals
        return {name: wide if name == "intervals" else tolerance for name in values}

    def predict(
        self,
        outputs: Tensor,
        *,
        average: Average,
        calibration: Any = None,
        coverage: float | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> NumberPredictions:
        """Predict the numbers of images.

        Raises:
            ValueError: a coverage is given without a calibration, outputs are not finite or not of these
                numbers, or see `NumberCalibration.widths`.
        """
        check_finite("outputs", outputs)
        shift, factor = (part.to(outputs.device) for part in _scale_of(self.names, self.scale))
        # A file computes them in float32: ONNX Runtime has no softplus in float64.
        mean, variance = moments(outputs if torch.compiler.is_compiling() else outputs.double())
        if mean.shape[2] != len(self.names):
            raise invalid("outputs", f"of {len(self.names)} numbers", found=describe(outputs))
        center, spread, between = mixture(mean, variance, weights_of(average))
        std, differ = spread.sqrt() * factor, between.sqrt() * factor
        center = center * factor + shift
        intervals = None
        if coverage is not None:
            if calibration is None:
                hint = "train with validation above 0"
                raise invalid("coverage", "left out for a network without calibration", coverage, hint=hint)
            half = std * std.new_tensor(calibration.widths(coverage))
            intervals = torch.stack([center - half, center + half], dim=2)
        if calibration is not None:
            scales = std.new_tensor(calibration.scales)
            std, differ = std * scales, differ * scales
        return NumberPredictions(self.names, center, std, differ, mean * factor + shift, coverage, intervals)
