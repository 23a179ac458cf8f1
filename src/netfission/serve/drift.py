"""The last images of a server, and whether they come from the distribution of the calibration images."""

import math
import threading
import warnings
from collections import deque

import torch
from torch import Tensor

from netfission.ensemble import Average
from netfission.evaluation.drift import drift_p_value
from netfission.evaluation.p_values import Detector
from netfission.utils.text import count_noun

_TIMES_MORE = 10  # calibration images than images in a window, at least
_MOST_IMAGES = 500  # in a window whose size is not given


class DriftWindow:
    """Keeps the scores of the last images. Threads may use it at once.

    Args:
        detector: scores the images; None if the calibration has no scores, and nothing is kept.
        size: number of images. Default: a tenth of the calibration images, from 1 to 500. More than a tenth
            give small p-values without a drift: one calibration is compared with batch after batch.

    Warns:
        UserWarning: there are more.

    Example:
        >>> detector = Detector.from_scores("energy", torch.linspace(-9.0, -8.0, 500))
        >>> window = DriftWindow(detector)
        >>> math.isnan(window.p_value())  # no image yet
        True
        >>> window.add(torch.zeros(60, 1, 2), average="logits")  # unlike all others
        >>> len(window), window.p_value() < 1e-6
        (50, True)
    """

    def __init__(self, detector: Detector | None, size: int | None = None) -> None:
        self._detector = detector
        images = 0 if detector is None else len(detector.calibration)
        if size is not None and detector is not None and size * _TIMES_MORE > images:
            found = count_noun(images, "calibration image")
            warnings.warn(
                f"a drift window of {size:,} is more than a tenth of {found}: "
                "small p-values may be frequent without a drift",
                stacklevel=2,
            )
        size = size or max(1, min(_MOST_IMAGES, images // _TIMES_MORE))
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
