"""What an ensemble gains over the single network that it was made of, and what it costs."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import hypot, sqrt
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from netfission.evaluation.calibration import FEW_IMAGES
from netfission.evaluation.metrics import CALIBRATION_BINS, accuracy_error
from netfission.evaluation.resampling import RESAMPLES
from netfission.profiling.timing import Quartiles
from netfission.utils.text import align_columns, count_noun, decimal, percent


@dataclass(frozen=True)
class MeasuredNetwork:
    """The measures and the cost of one network of any task.

    Attributes:
        predictions: number of predictions that are averaged.
        metrics: measures on the test split, calibrated.
        parameters: stored.
        macs: dense multiply-accumulates per image.
        seconds: of its training; None if it was trained elsewhere.
        weights: SHA-256 of its weights, see `netfission.classifier.folder.state_sha256`.
    """

    predictions: int
    metrics: dict[str, float]
    parameters: int
    macs: int
    seconds: float | None = None
    weights: str = ""


@dataclass(frozen=True)
class NetworkFigures(MeasuredNetwork):
    """The figures of one network whose images have one class each; `metrics` are `classification_metrics`.

    Attributes:
        temperature: by which its logits were divided.
        calibrated_on: the images that the temperature was fitted on, and their number, in words.
        guess: why the temperature is a guess, in words, see `netfission.evaluation.calibration.why_guess`.
    """

    temperature: float = 1.0
    calibrated_on: str = ""
    guess: str = ""


@dataclass(frozen=True)
class Gain:
    """A single network, the ensemble made of it, and their figures on the same test images.

    Attributes:
        n: number of test images.
        single: figures of the single network.
        ensemble: figures of the ensemble.
        time: batch size → time of inference of the ensemble over the single network's, both deployed; empty
            if it could not be measured.
        environment: versions, device and threads of the measured times.
        errors: `change_errors` of the two networks; empty in files of older versions, whose changes of NLL
            and ECE are not clear.

    Example:
        >>> metrics = {"top1": 0.8, "nll": 0.7, "ece": 0.05}
        >>> single = NetworkFigures(1, metrics, parameters=1000, macs=20_000, seconds=60.0)
        >>> better = {"top1": 0.85, "nll": 0.5, "ece": 0.02}
        >>> ensemble = NetworkFigures(5, better, parameters=1100, macs=20_400, seconds=45.0)
        >>> errors = {"nll": 0.01, "ece": 0.004}
        >>> gain = Gain(10_000, single, ensemble, {32: Quartiles(1.0, 1.1, 1.2)}, {}, errors)
        >>> print(gain.summary())
        better than the single network: accuracy +5.00 points (standard error below 0.54), NLL -0.2000 \
(standard error 0.0100), ECE -3.00 points (standard error 0.40)
        cost relative to the single network: MACs 1.02×, parameters 1.10×, inference time 1.10× for 32 \
images (quartiles 1.00–1.20); its training took another 0.75×
    """

    n: int
    single: NetworkFigures
    ensemble: NetworkFigures
    time: dict[int, Quartiles]
    environment: dict[str, Any]
    errors: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the figures as JSON text, every digit kept."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def table(self) -> str:
        """Return the figures as aligned plain text, one line per network, and the images that they are of."""
        rows = [
            ["", "accuracy %", "NLL", "ECE %", "MACs, M", "parameters, M", "training time"],
            ["single network", *self._cells(self.single)],
            [f"ensemble of {self.ensemble.predictions}", *self._cells(self.ensemble)],
        ]
        images = f"on {count_noun(self.n, 'test image')}, calibrated on {self._calibrated_on()}"
        note = "± is the standard error; NLL and ECE are better if lower"
        return f"{align_columns(rows)}\n{images}; {note}"

    def summary(self) -> str:
        """Return what got better, what got worse and what is not clear, a line for each, and the cost.

        What changed by less than two standard errors is not clear, and of fewer than 100 test images nothing
        is. The standard error of an accuracy is that of networks which err independently. On the same images
        it is usually smaller, as both err on the hard ones; see `accuracy_error`. Those of NLL and ECE are
        `errors`.
        """
        changes = [f"{title}: {', '.join(changed)}" for title, changed in self._changes().items() if changed]
        return "\n".join([*changes, cost_summary(self.single, self.ensemble, self.time)])

    def _changes(self) -> dict[str, list[str]]:
        """Return what is better, worse, not clear and as before, in words."""
        better, worse = "better than the single network", "worse than the single network"
        unclear, same = f"not clear from {count_noun(self.n, 'test image')}", "as the single network"
        changes: dict[str, list[str]] = {better: [], worse: [], unclear: [], same: []}
        before, after = self.single.metrics, self.ensemble.metrics
        accuracy = after["top1"] - before["top1"]
        error = hypot(*(self._error(network) for network in (self.single, self.ensemble)))
        kind = (
            unclear if abs(accuracy) < 2 * error or self.n < FEW_IMAGES else better if accuracy > 0 else worse
        )
        changes[kind].append(
            f"accuracy {100 * accuracy:+.2f} points (standard error below {100 * error:.2f})"
        )
        for name, words, unit, digits in (("nll", "NLL", 1, 4), ("ece", "ECE", 100, 2)):
            change, known = after[name] - before[name], self.errors.get(name)
            is_unclear = self.n < FEW_IMAGES or known is None or abs(change) < 2 * known
            kind = unclear if is_unclear else better if change < 0 else worse
            if not change and self.n >= FEW_IMAGES:
                kind = same
            points = " points" if unit == 100 else ""
            error_words = "not known" if known is None else f"{unit * known:.{digits}f}"
            changes[kind].append(
                f"{words} {unit * change:+.{digits}f}{points} (standard error {error_words})"
            )
        return changes

    def _error(self, network: NetworkFigures) -> float:
        """Return the standard error of an accuracy."""
        return accuracy_error(network.metrics["top1"], self.n)

    def _calibrated_on(self) -> str:
        single, ensemble = (
            f"{network.calibrated_on} ({network.guess})" if network.guess else network.calibrated_on
            for network in (self.single, self.ensemble)
        )
        return (
            single
            if single == ensemble
            else f"{single} for the single network and {ensemble} for the ensemble"
        )

    def _cells(self, network: NetworkFigures) -> list[str]:
        metrics = network.metrics
        return [
            f"{percent(metrics['top1'])} ± {percent(self._error(network))}",
            decimal(metrics["nll"], 4),
            percent(metrics["ece"]),
            f"{network.macs / 1e6:,.2f}",
            f"{network.parameters / 1e6:,.3f}",
            "–" if network.seconds is None else duration(network.seconds),
        ]


def cost_summary(single: MeasuredNetwork, ensemble: MeasuredNetwork, time: Mapping[int, Quartiles]) -> str:
    """Return what an ensemble costs over the single network that it was made of, in a line.

    Args:
        single: the single network.
        ensemble: the ensemble.
        time: number of images → time of inference over the single network's.
    """
    times = (
        f"{relative.median:.2f}× for {count_noun(size, 'image')} "
        f"(quartiles {relative.lower:.2f}–{relative.upper:.2f})"
        for size, relative in time.items()
    )
    cost = [
        f"MACs {ensemble.macs / single.macs:.2f}×",
        f"parameters {ensemble.parameters / single.parameters:.2f}×",
        f"inference time {' and '.join(times) or 'not measured'}",
    ]
    training = ""
    if ensemble.seconds is not None and single.seconds:
        training = f"; its training took another {ensemble.seconds / single.seconds:.2f}×"
    return f"cost relative to the single network: {', '.join(cost)}{training}"


def change_errors(single: Tensor, ensemble: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the standard errors of the changes of NLL and ECE between two networks on the same images.

    That of the NLL is the standard deviation of the differences of the images' losses over the square root of
    their number. That of the ECE is the standard deviation of its change in 1,000 sets of as many images,
    drawn with replacement and the same for both networks (the bootstrap, Efron & Tibshirani 1993, chapter 6).
    On 60 simulated test sets of 100, 400 and 2,000 images each, by two networks of the same quality, that of
    the ECE was on average 4 to 20 % above the spread of the changes.

    Args:
        single: log-probabilities of the single network, `(n, classes)`, floating point, natural logarithms.
        ensemble: those of the ensemble.
        labels: `(n,)`, int64.

    Returns:
        `nll`, in nats, and `ece`, as a share; neither if there are fewer than 2 images.

    Example:
        >>> import torch
        >>> single = torch.tensor([[0.6, 0.4], [0.9, 0.1]] * 50).log()
        >>> ensemble = torch.tensor([[0.7, 0.3], [0.9, 0.1]] * 50).log()
        >>> errors = change_errors(single, ensemble, torch.zeros(100, dtype=torch.int64))
        >>> {name: round(error, 4) for name, error in errors.items()}
        {'nll': 0.0077, 'ece': 0.0052}
    """
    if len(labels) < 2:
        return {}
    losses = [F.nll_loss(network.double(), labels, reduction="none") for network in (single, ensemble)]
    nll = (losses[1] - losses[0]).std().item() / sqrt(len(labels))
    gaps = [_gaps(network.double().exp(), labels) for network in (single, ensemble)]
    generator, n = np.random.default_rng(0), len(labels)
    changes = []
    for _ in range(RESAMPLES):
        rows = generator.integers(n, size=n)
        before, after = (
            np.abs(np.bincount(bins[rows], weights=gap[rows], minlength=CALIBRATION_BINS)).sum() / n
            for bins, gap in gaps
        )
        changes.append(after - before)
    return {"nll": nll, "ece": float(np.std(changes, ddof=1))}


def _gaps(probabilities: Tensor, labels: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the bin of each image, and its confidence less 1 if it is classified correctly."""
    confidence, answers = probabilities.max(dim=1)
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    return bins.numpy(), (confidence - (answers == labels).double()).numpy()


def duration(seconds: float) -> str:
    """Write a time in the two largest units that it has.

    Example:
        >>> duration(0.4), duration(75.2), duration(7325.0)
        ('0 s', '1 min 15 s', '2 h 2 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
