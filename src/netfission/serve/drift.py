"""The last images of a server, and whether they come from the distribution of the calibration images."""

import math
import threading
from collections import deque

import torch
from torch import Tensor

from netfission.ensemble import Average
from netfission.evaluation.drift import drift_p_value
from netfission.evaluation.p_values import Detector


class DriftWindow:
    """Keeps the scores of the last images. Threads may use it at once.

    Args:
        detector: scores the images; None if the calibration has no scores, and nothing is kept.
        size: number of images.

    Example:
        >>> detector = Detector.from_scores("energy", torch.linspace(-9.0, -8.0, 99))
        >>> window = DriftWindow(detector, size=50)
        >>> math.isnan(window.p_value())  # no image yet
        True
        >>> window.add(torch.zeros(60, 1, 2), average="logits")  # unlike all others
        >>> len(window), window.p_value() < 1e-6
        (50, True)
    """

    def __init__(self, detector: Detector | None, size: int) -> None:
        self._detector = detector
        self._scores: deque[float] = deque(maxlen=size)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._scores)

    def add(self, logits: Tensor, *, average: Average) -> None:
        """Keep the scores of images; those that are not numbers are left out.

        Args:
            logits: `(n, exits, classes)`, floating point, not divided by the temperature.
            average: what the ensemble averages.
        """
        if self._detector is not None:
            scores = self._detector.scores(logits, average=average)
            with self._lock:
                self._scores.extend(scores[~scores.isnan()].tolist())

    def p_value(self) -> float:
        """Return the p-value of `netfission.evaluation.drift.drift_p_value`; NaN without images."""
        with self._lock:
            scores = list(self._scores)
        if self._detector is None or not scores:
            return math.nan
        return drift_p_value(torch.tensor(scores, dtype=torch.float64), self._detector.calibration)
