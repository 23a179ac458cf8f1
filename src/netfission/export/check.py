"""Check that an exported file gives what the classifier gives, or measure how its accuracy changes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from netfission.classifier import AnswerLimits, Classifier, Predictor
from netfission.classifier.predictions import Predictions
from netfission.ensemble import disagreement, ensemble_log_probabilities
from netfission.evaluation.conformal import class_scores
from netfission.evaluation.metrics import classification_metrics
from netfission.evaluation.p_values import p_values
from netfission.export.formats import Runner
from netfission.export.predictor import INPUT
from netfission.utils.errors import invalid
from netfission.utils.text import decimal, percent

TOLERANCE = 1e-4  # of probabilities
NOT_FINITE = "the exported file is discarded: its probabilities are not finite"
_BATCH = 64

T = TypeVar("T")


@dataclass(frozen=True)
class AccuracyChange:
    """Accuracy and likelihood of an exported file beside the classifier's, on labelled images.

    Attributes:
        n: number of images.
        accuracy: of the classifier and of the file, in [0, 1].
        nll: negative log-likelihood of the classifier and of the file, in nats.
        difference: largest difference of a probability, of the ensemble or of an exit.

    Example:
        >>> print(AccuracyChange(100, (0.9, 0.89), (0.3, 0.31), 0.021))
        accuracy 90.00 → 89.00 %, NLL 0.3000 → 0.3100 on 100 images; largest difference of a probability 0.021
    """

    n: int
    accuracy: tuple[float, float]
    nll: tuple[float, float]
    difference: float

    def __str__(self) -> str:
        accuracy = " → ".join(percent(share) for share in self.accuracy)
        nll = " → ".join(decimal(nats, 4) for nats in self.nll)
        return (
            f"accuracy {accuracy} %, NLL {nll} on {self.n:,} images; largest difference of a probability "
            f"{self.difference:.2g}"
        )


def check_images(classifier: Classifier | Predictor, images: Tensor) -> None:
    """Raise ValueError unless `images` are the classifier's pixels, of one image or more."""
    shape = tuple(classifier.spec.shape)
    if not len(images) or tuple(images.shape[1:]) != shape or images.dtype != torch.uint8:
        raise invalid(
            "images",
            f"torch.uint8 of shape (n, {', '.join(map(str, shape))}) with n of at least 1",
            found=f"{images.dtype} of shape {tuple(images.shape)}",
        )


def check_outputs(
    run: Runner, classifier: Classifier, images: Tensor, limits: AnswerLimits | None = None
) -> float:
    """Check that a file gives what the classifier predicts.

    Args:
        run: runs the file.
        classifier: on the CPU.
        images: uint8 `(n, channels, height, width)`.
        limits: that the file's answers keep to; default none.

    Returns:
        The largest difference of a probability, of the ensemble or of an exit.

    Raises:
        RuntimeError: it is above 1e-4, or another output does not fit the probabilities.
    """
    limits = limits or AnswerLimits()
    answers = [
        (run(**{INPUT: pixels}), classifier.predict_within(pixels, limits))
        for pixels in check_batches(images, "checking")
    ]
    difference = largest_magnitude(
        [probability_differences(outputs, expected) for outputs, expected in answers]
    )
    check_difference(difference, len(images))
    for outputs, expected in answers:
        _check_other_outputs(outputs, expected)
        check_promises(outputs, expected, limits, classifier.temperature)
    return difference


def check_difference(difference: float, n: int, name: str = "probabilities") -> None:
    """Raise RuntimeError if probabilities on `n` images differ by more than 1e-4, or are not numbers."""
    _check_tolerance(f"{name} on {n} images", difference, TOLERANCE)


def measure_change(
    run: Runner, classifier: Classifier, batches: Iterable[tuple[Tensor, Tensor]]
) -> AccuracyChange:
    """Run a file and the classifier on labelled images.

    Args:
        run: runs the file.
        classifier: on the CPU.
        batches: pixels, uint8 `(batch, channels, height, width)`, and labels `(batch,)`.

    Raises:
        RuntimeError: the file gives probabilities that are not finite.
    """
    differences = []
    logits: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels = []
    for pixels, batch_labels in with_progress(batches, "measuring"):
        outputs, expected = run(**{INPUT: pixels}), classifier.predict(pixels)
        differences.append(probability_differences(outputs, expected))
        logits[0].append(expected.logits)
        logits[1].append(outputs["logits"])
        labels.append(batch_labels)
    difference = largest_magnitude(differences)
    if not difference <= 1:
        raise RuntimeError(NOT_FINITE)
    before, after = (
        classification_metrics(
            ensemble_log_probabilities(torch.cat(parts), classifier.spec.average), torch.cat(labels)
        )
        for parts in logits
    )
    return AccuracyChange(
        len(torch.cat(labels)), (before["top1"], after["top1"]), (before["nll"], after["nll"]), difference
    )


def probability_differences(outputs: dict[str, Tensor], expected: Predictions) -> Tensor:
    """Return the differences of all probabilities, of the ensemble and of the exits, in one dimension."""
    ensemble = outputs["probabilities"] - expected.probabilities
    exits = outputs["exit_probabilities"] - expected.exit_probabilities
    return torch.cat([ensemble.flatten(), exits.flatten()])


def largest_magnitude(differences: Sequence[Tensor]) -> float:
    """Return the largest absolute value; NaN if there is a NaN, which Python's `max` would skip.

    Example:
        >>> largest_magnitude([torch.tensor([1.0, -3.0]), torch.tensor([[2.0]])])
        3.0
    """
    return torch.cat([difference.flatten() for difference in differences]).abs().max().item()


def _check_other_outputs(outputs: dict[str, Tensor], expected: Predictions) -> None:
    """Raise RuntimeError unless the other outputs fit the expected probabilities, up to rounding."""
    class_probabilities = expected.probabilities.gather(1, outputs["classes"].unsqueeze(1)).squeeze(1)
    vote_probabilities = expected.exit_probabilities.gather(2, outputs["votes"].unsqueeze(2)).squeeze(2)
    # Votes for classes of nearly equal probability may differ, and the disagreement with them.
    votes = F.one_hot(outputs["votes"], expected.exit_probabilities.shape[2])
    checks = {
        "classes": (expected.confidence - class_probabilities, 2 * TOLERANCE),
        "votes": (expected.exit_probabilities.amax(dim=2) - vote_probabilities, 2 * TOLERANCE),
        "disagreement": (outputs["disagreement"] - disagreement(votes.float()), 1e-6),
        "entropy": (outputs["entropy"] - expected.entropy, 1e-3),
        "mutual_information": (outputs["mutual_information"] - expected.mutual_information, 1e-3),
        "logits": (outputs["logits"] - expected.logits, 1e-3 * max(1, expected.logits.abs().max().item())),
    }
    for name, (differences, tolerance) in checks.items():
        _check_tolerance(name, differences.abs().max().item(), tolerance)


def check_promises(
    outputs: dict[str, Tensor], expected: Predictions, limits: AnswerLimits, temperature: float
) -> None:
    """Raise RuntimeError unless sets, bounds and marks are the expected ones.

    Those whose score is a threshold may differ by rounding. The images that are checked often come from the
    calibration, whose scores the thresholds are.
    """
    logits = expected.logits.double() * temperature
    log_probabilities = ensemble_log_probabilities(logits, expected.average)
    if expected.sets is not None:
        quantiles = torch.tensor(limits.quantiles, dtype=torch.float64)
        margin = class_scores(log_probabilities, limits.score) - quantiles
        _check_decisions("sets", outputs["set"] != expected.sets, margin)
    if expected.abstains is not None and limits.threshold is not None:
        confidence = expected.confidence if limits.delta is None else log_probabilities.amax(dim=1).exp()
        differs = outputs["abstain"] != expected.abstains
        _check_decisions("abstentions", differs, confidence - limits.threshold)
    if limits.detector is not None:
        uncertainty = limits.detector.scores(logits, average=expected.average)
        least, most = (p_values(uncertainty + shift, limits.detector.calibration) for shift in (1e-3, -1e-3))
        wrong = (outputs["p_value"] < least.float()) | (outputs["p_value"] > most.float())
        _check_decisions("p-values", wrong, torch.ones(len(wrong)))
        if expected.out_of_distribution is not None:
            differs = outputs["out_of_distribution"] != expected.out_of_distribution
            _check_decisions("marks", differs, uncertainty - limits.detector.alarm_above)


def _check_decisions(name: str, differs: Tensor, margin: Tensor) -> None:
    """Raise RuntimeError if decisions differ that are not within rounding of their threshold."""
    wrong = int((differs & ~(margin.abs() <= 1e-3)).sum())
    if wrong:
        raise RuntimeError(
            f"the exported file is discarded: {wrong} of {differs.numel()} of its {name} differ from "
            "PyTorch's"
        )


def _check_tolerance(name: str, difference: float, tolerance: float) -> None:
    if not difference <= tolerance:  # NaN is refused, too
        raise RuntimeError(
            f"the exported file is discarded: its {name} differ by {difference:.2g} from PyTorch's; the "
            f"tolerance is {tolerance:.2g}"
        )


def check_batches(images: Tensor, description: str) -> Iterator[Tensor]:
    """Yield images in batches with a progress bar; the first has one image, so that batch sizes differ."""
    batches = (images[:1], *images[1:].split(_BATCH))
    return with_progress([batch for batch in batches if len(batch)], description)


def with_progress(batches: Iterable[T], description: str) -> Iterator[T]:
    """Yield batches with a progress bar if standard error is a terminal."""
    return iter(tqdm(batches, desc=description, leave=False, disable=None))
