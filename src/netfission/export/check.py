"""Whether a file gives what the classifier gives, and what it is worth where it need not."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from netfission.classifier import Classifier
from netfission.classifier.predictions import Predictions
from netfission.ensemble import disagreement, ensemble_log_probabilities
from netfission.evaluation.metrics import classification_metrics
from netfission.export.formats import Run
from netfission.export.predictor import INPUT

TOLERANCE = 1e-4  # of probabilities
_BATCH = 64

T = TypeVar("T")


@dataclass(frozen=True)
class Change:
    """What an exported file answers beside the classifier, on labelled images.

    Attributes:
        n: number of images.
        accuracy: of the classifier and of the file, in [0, 1].
        nll: likewise, in nats.
        difference: the largest of a probability, of the ensemble or of an exit.
    """

    n: int
    accuracy: tuple[float, float]
    nll: tuple[float, float]
    difference: float

    def __str__(self) -> str:
        accuracy = " → ".join(f"{100 * share:.2f}" for share in self.accuracy)
        nll = " → ".join(f"{nats:.4f}" for nats in self.nll)
        return (
            f"accuracy {accuracy} %, NLL {nll} on {self.n:,} images; largest difference of a probability "
            f"{self.difference:.2g}"
        )


def check_images(classifier: Classifier, images: Tensor) -> None:
    """ValueError unless there are images, and pixels as the classifier takes them."""
    shape = tuple(classifier.spec.shape)
    if not len(images) or tuple(images.shape[1:]) != shape or images.dtype != torch.uint8:
        raise ValueError(
            f"images={tuple(images.shape)} {images.dtype}: takes pixels, torch.uint8 (n, channels, height, "
            f"width) with {shape} at the end, of one image or more"
        )


def check(run: Run, classifier: Classifier, images: Tensor) -> float:
    """Refuse a file that answers otherwise than the classifier.

    Args:
        run: the file.
        classifier: on the CPU.
        images: uint8 `(n, channels, height, width)`.

    Returns:
        The largest difference of a probability, of the ensemble or of an exit.

    Raises:
        RuntimeError: that is above 1e-4, or another output is not what the probabilities make it.
    """
    answers = [(run(**{INPUT: pixels}), classifier.predict(pixels)) for pixels in batches(images, "checking")]
    worst = largest([probability_difference(found, expected) for found, expected in answers])
    check_difference(worst, len(images))
    for found, expected in answers:
        _check_others(found, expected)
    return worst


def check_difference(worst: float, n: int) -> None:
    """RuntimeError where probabilities differ by more than is allowed, or are none."""
    if not worst <= TOLERANCE:
        raise RuntimeError(
            f"the file is not kept: its probabilities on {n} images differ by {worst:.2g} from PyTorch's, "
            f"where {TOLERANCE:g} is allowed"
        )


def compare(run: Run, classifier: Classifier, batches: Iterable[tuple[Tensor, Tensor]]) -> Change:
    """Run a file and the classifier over labelled images.

    Args:
        run: the file.
        classifier: on the CPU.
        batches: pixels, uint8 `(batch, channels, height, width)`, and labels `(batch,)`.

    Raises:
        RuntimeError: the file gives numbers that are not finite.
    """
    differences = []
    logits: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels = []
    for pixels, own in shown(batches, "measuring"):
        found, expected = run(**{INPUT: pixels}), classifier.predict(pixels)
        differences.append(probability_difference(found, expected))
        logits[0].append(expected.logits)
        logits[1].append(found["logits"])
        labels.append(own)
    worst = largest(differences)
    if not worst <= 1:
        raise RuntimeError("the file is not kept: its probabilities are not finite")
    metrics = [
        classification_metrics(ensemble_log_probabilities(torch.cat(of_one)), torch.cat(labels))
        for of_one in logits
    ]
    return Change(
        len(torch.cat(labels)),
        (metrics[0]["top1"], metrics[1]["top1"]),
        (metrics[0]["nll"], metrics[1]["nll"]),
        worst,
    )


def probability_difference(found: dict[str, Tensor], expected: Predictions) -> Tensor:
    """The differences of probabilities, of the ensemble and of the exits; one dimension."""
    of_exits = found["exit_probabilities"] - expected.exit_probabilities
    return torch.cat([(found["probabilities"] - expected.probabilities).flatten(), of_exits.flatten()])


def largest(differences: Sequence[Tensor]) -> float:
    """The largest absolute value; NaN where there is any, which Python's max would pass over."""
    return torch.cat([difference.flatten() for difference in differences]).abs().max().item()


def _check_others(found: dict[str, Tensor], expected: Predictions) -> None:
    """RuntimeError unless the other outputs are those of the expected probabilities, up to rounding."""
    own = expected.probabilities.gather(1, found["classes"].unsqueeze(1)).squeeze(1)
    voted = expected.exit_probabilities.gather(2, found["votes"].unsqueeze(2)).squeeze(2)
    # Votes for near equals may fall either way, and the disagreement with them.
    differ = disagreement(
        torch.nn.functional.one_hot(found["votes"], expected.exit_probabilities.shape[2]).float()
    )
    allowed = {
        "classes": (expected.confidence - own, 2 * TOLERANCE),
        "votes": (expected.exit_probabilities.amax(dim=2) - voted, 2 * TOLERANCE),
        "disagreement": (found["disagreement"] - differ, 1e-6),
        "entropy": (found["entropy"] - expected.entropy, 1e-3),
        "mutual_information": (found["mutual_information"] - expected.mutual_information, 1e-3),
        "logits": (found["logits"] - expected.logits, 1e-3 * max(1, expected.logits.abs().max().item())),
    }
    for name, (difference, most) in allowed.items():
        worst = difference.abs().max().item()
        if not worst <= most:
            raise RuntimeError(
                f"the file is not kept: its {name} differ by {worst:.2g} from PyTorch's, where {most:.2g} is "
                "allowed"
            )


def batches(images: Tensor, what: str) -> Iterator[Tensor]:
    """Images batch by batch, behind a bar; the first is alone, so that batches of several sizes are seen."""
    return shown([batch for batch in (images[:1], *images[1:].split(_BATCH)) if len(batch)], what)


def shown(batches: Iterable[T], what: str) -> Iterator[T]:
    """Batches behind a bar, where standard error is a terminal."""
    return iter(tqdm(batches, desc=what, leave=False, disable=None))
