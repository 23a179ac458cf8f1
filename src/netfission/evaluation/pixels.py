"""Measure maps of class probabilities against masks, batch by batch."""

import torch
from torch import Tensor

from netfission.evaluation.metrics import CALIBRATION_BINS
from netfission.evaluation.resampling import Resampled
from netfission.utils.errors import check_positive_integer, describe, invalid

_LEVELS = 4096  # of confidence, by which right and wrong pixels are ordered
_COARSE = 256  # of these levels together, of which sums are kept for each image
_SURE = 20.0  # the logarithm of the odds of a confidence from which all count as equal


class PixelScores:
    """Sums over the pixels of all batches, from which `result` computes the measures of a set.

    No pixel is stored, so memory does not grow with the set. Void pixels count nowhere.

    Args:
        classes: number of classes, at least 2.
        ignore_index: the label of void pixels; default none.

    Raises:
        ValueError: there are fewer than two classes.

    Example:
        >>> scores = PixelScores(classes=2, ignore_index=255)
        >>> probabilities = torch.tensor([[[[0.8, 0.6, 0.9]], [[0.2, 0.4, 0.1]]]])  # one image, 1 × 3
        >>> scores.add(probabilities.log(), torch.tensor([[[0, 1, 255]]]))
        >>> measures = scores.result()
        >>> round(measures["mean_iou"], 3), round(measures["ece"], 3)
        (0.25, 0.4)
        >>> scores.class_iou().tolist()
        [0.5, 0.0]
    """

    def __init__(self, classes: int, ignore_index: int | None = None) -> None:
        check_positive_integer("classes", classes)
        if classes < 2:
            raise invalid("classes", "at least 2", classes)
        self.classes = classes
        self.ignore_index = ignore_index
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64)  # label × prediction
        self._nll = self._brier = 0.0
        self._gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64)
        self._ranked = torch.zeros(2, _LEVELS, dtype=torch.int64)  # wrong and right pixels per confidence

    @property
    def pixels(self) -> int:
        """Number of pixels that were counted."""
        return int(self._confusion.sum())

    @torch.no_grad()
    def add(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            log_probabilities: `(batch, classes, height, width)`, floating point, natural logarithms, as of
                `netfission.ensemble.ensemble_log_probabilities`.
            labels: `(batch, height, width)`, int64, in [0, classes) or void.

        Raises:
            ValueError: a shape or type differs, a label is out of range, or probabilities are not finite.
        """
        kept = self._check(log_probabilities, labels)
        if not kept.any():
            return
        # Over whole maps, as sums over classes are quick there; then of the pixels that count, in float64.
        log_probabilities = log_probabilities.to(torch.promote_types(log_probabilities.dtype, torch.float32))
        probabilities = log_probabilities.exp()
        sums = probabilities.sum(dim=1)[kept]
        if len(wrong := sums[~((sums - 1).abs() <= 1e-3)]):  # NaN, too
            found = f"probabilities that sum to {wrong[0].item():.4g}"
            raise invalid("log_probabilities", "the output of log_softmax in float32 or wider", found=found)
        squares = probabilities.square().sum(dim=1)[kept].double()
        largest, answers = (part[kept] for part in log_probabilities.max(dim=1))
        known = torch.where(kept, labels, 0).unsqueeze(1)
        of_label = log_probabilities.gather(1, known).squeeze(1)[kept].double()
        labels, largest = labels[kept], largest.double().exp()
        right = answers == labels
        pairs = labels * self.classes + answers
        self._confusion += pairs.bincount(minlength=self.classes**2).view_as(self._confusion).cpu()
        self._nll -= of_label.sum().item()
        # Σ (p − 1)² over the label and p² over the others
        self._brier += (squares - 2 * of_label.exp() + 1).sum().item()
        bins = (largest * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        self._gaps += bins.bincount(largest - right.double(), minlength=CALIBRATION_BINS).cpu()
        odds = torch.special.logit(largest, eps=1e-12).clamp(-_SURE, _SURE)
        level = ((odds + _SURE) / (2 * _SURE) * (_LEVELS - 1)).round().long()
        ranked = (right * _LEVELS + level).bincount(minlength=2 * _LEVELS)
        self._ranked += ranked.view_as(self._ranked).cpu()

    def class_iou(self) -> Tensor:
        """Return the intersection over union of each class, float64 `(classes,)`.

        It is TP / (TP + FP + FN) of all pixels; NaN for a class that is neither a label nor predicted.
        """
        both = self._confusion.diagonal().double()
        return both / (self._confusion.sum(0) + self._confusion.sum(1) - both)

    def result(self) -> dict[str, float]:
        """Return the measures of all pixels that were counted.

        - `mean_iou`: mean of `class_iou` over the classes that occur, in [0, 1].
        - `pixel_accuracy`: share of the pixels that are right.
        - `nll`: mean negative log-likelihood in nats.
        - `ece`: expected calibration error in [0, 1], with 15 bins of equal width (Guo et al. 2017).
        - `brier`: mean squared error summed over classes, in [0, 2].
        - `error_auroc`: probability that a wrong pixel is less confident than a right one (Hendrycks &
          Gimpel 2017); NaN if all are right or all are wrong.
        - `aurc`: mean error of the most confident pixels, over all shares of pixels (Geifman et al. 2019).

        Confidence is the largest probability. The last two tell apart levels of it, 4,096 from 0 to 1, evenly
        spaced in the logarithm of its odds; those below 1 / `classes` never occur. Pixels of one level count
        as the mean of them.

        Raises:
            ValueError: no pixel was counted.
        """
        if not self.pixels:
            raise invalid("masks", "of at least one pixel that is not void", found="none")
        wrong, right = self._ranked.double()
        return {
            "mean_iou": self.class_iou().nanmean().item(),
            "pixel_accuracy": self._confusion.diagonal().sum().item() / self.pixels,
            "nll": self._nll / self.pixels,
            "ece": self._gaps.abs().sum().item() / self.pixels,
            "brier": self._brier / self.pixels,
            "error_auroc": _auroc(wrong, right).item(),
            "aurc": _aurc(wrong, right).item(),
        }

    def sums(self) -> Tensor:
        """Return what `ResampledPixels` needs of the pixels that were counted, float64, one dimension."""
        confusion = self._confusion.double()
        ranked = self._ranked.view(2, _COARSE, -1).sum(dim=2)
        scalars = torch.tensor([self.pixels, self._nll, self._brier], dtype=torch.float64)
        of_classes = (confusion.diagonal(), confusion.sum(0), confusion.sum(1))
        return torch.cat([scalars, *of_classes, self._gaps, ranked.double().flatten()])

    def _check(self, log_probabilities: Tensor, labels: Tensor) -> Tensor:
        """Check the layout and the labels, and return which pixels are not void, `(batch, height, width)`."""
        if log_probabilities.ndim != 4 or not log_probabilities.is_floating_point():
            expected = "floats of shape (batch, classes, height, width)"
            raise invalid("log_probabilities", expected, found=describe(log_probabilities))
        batch, classes, *size = log_probabilities.shape
        if classes != self.classes:
            found = describe(log_probabilities)
            raise invalid("log_probabilities", f"of {self.classes} classes", found=found)
        if labels.dtype != torch.int64 or labels.shape != (batch, *size):
            raise invalid("labels", f"int64 of shape {(batch, *size)}", found=describe(labels))
        kept = torch.ones_like(labels, dtype=torch.bool)
        if self.ignore_index is not None:
            kept = labels != self.ignore_index
        outside = labels[kept & ((labels < 0) | (labels >= classes))]
        if len(outside):
            found = f"{int(outside[0])} ({len(outside)} pixels out of range)"
            raise invalid("labels", f"class numbers from 0 to {classes - 1}", found=found)
        return kept


class ResampledPixels:
    """Measures maps on sets of images that are drawn from those of all batches.

    Of each image sums are stored, 530 numbers and three for each class, and no pixel. `error_auroc`
    and `aurc` tell apart 256 levels of confidence, where `PixelScores` has 4,096.

    Args:
        classes: see `PixelScores`.
        ignore_index: see `PixelScores`.

    Example:
        >>> scores = ResampledPixels(classes=2, ignore_index=255)
        >>> probabilities = torch.tensor([[[[0.8, 0.6, 0.9]], [[0.2, 0.4, 0.1]]]])  # one image, 1 × 3
        >>> scores.add(probabilities.log(), torch.tensor([[[0, 1, 255]]]))
        >>> scores.result()(torch.ones(1, 1).double())["mean_iou"]
        tensor([0.2500], dtype=torch.float64)
    """

    def __init__(self, classes: int, ignore_index: int | None = None) -> None:
        self.classes = classes
        self.ignore_index = ignore_index
        self._sums: list[Tensor] = []

    def add(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Count a batch, see `PixelScores.add`."""
        for row in range(len(labels)):
            scores = PixelScores(self.classes, self.ignore_index)
            scores.add(log_probabilities[[row]], labels[[row]])
            self._sums.append(scores.sums())

    def result(self) -> Resampled:
        """Return the measures of `PixelScores.result` as a function of how often each image is in a set."""
        of_images = torch.stack(self._sums)
        sizes = [1, 1, 1, *[self.classes] * 3, CALIBRATION_BINS, 2 * _COARSE]

        def measure(weights: Tensor) -> dict[str, Tensor]:
            parts = (weights @ of_images).split(sizes, dim=1)
            pixels, nll, brier = (part.squeeze(1) for part in parts[:3])
            both, predicted, labelled, gaps, ranked = parts[3:]
            wrong, right = ranked.chunk(2, dim=1)
            return {
                "mean_iou": (both / (predicted + labelled - both)).nanmean(dim=1),
                "pixel_accuracy": both.sum(dim=1) / pixels,
                "nll": nll / pixels,
                "ece": gaps.abs().sum(dim=1) / pixels,
                "brier": brier / pixels,
                "error_auroc": _auroc(wrong, right),
                "aurc": _aurc(wrong, right),
            }

        return measure


def _auroc(wrong: Tensor, right: Tensor) -> Tensor:
    """Return the area by the numbers of wrong and right pixels at each level of confidence, rising.

    Both are `(..., levels)`, and the area is `(...)`.
    """
    below = wrong.cumsum(-1) - wrong / 2  # wrong pixels that are less confident, ties by half
    return (below * right).sum(-1) / (wrong.sum(-1) * right.sum(-1))


def _aurc(wrong: Tensor, right: Tensor) -> Tensor:
    """Return the area under risk and coverage by the same numbers."""
    wrong, both = wrong.flip(-1), (wrong + right).flip(-1)  # the most confident first
    before, errors = both.cumsum(-1) - both, wrong.cumsum(-1) - wrong
    # Within a level of b pixels, errors are spread evenly: after B others with E errors, the sum of the risks
    # (E + k w / b) / (B + k) over k = 1, …, b is w + (E − B w / b) (ψ(B + b + 1) − ψ(B + 1)).
    harmonic = torch.digamma(before + both + 1) - torch.digamma(before + 1)
    risks = wrong + (errors - before * wrong / both.clamp(min=1)) * harmonic
    return risks.sum(-1) / both.sum(-1)
