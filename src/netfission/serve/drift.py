"""The last images of a server, and whether they come from the distribution of the calibration images."""

import math
import threading
import warnings
from collections import deque

import torch
from torch import Tensor

from netfission.evaluation.drift import drift_p_value
from netfission.utils.text import count_noun

_TIMES_MORE = 10  # calibration images than images in a window, at least
_MOST_IMAGES = 500  # in a window whose size is not given


class DriftWindow:
    """Keeps the scores of the last images. Threads may use it at once.

    Args:
        calibration: scores of the calibration images, `(n,)`; None if there are none, and nothing is kept.
        size: number of images. Default: a tenth of the calibration images, from 1 to 500. More than a tenth
            give small p-values without a drift: one calibration is compared with batch after batch.

    Warns:
        UserWarning: there are more.

    Example:
        >>> window = DriftWindow(torch.linspace(-9.0, -8.0, 500))
        >>> math.isnan(window.p_value())  # no image yet
        True
        >>> window.add(torch.zeros(60))  # unlike all others
        >>> len(window), window.p_value() < 1e-6
        (50, True)
    """

    def __init__(self, calibration: Tensor | None, size: int | None = None) -> None:
        self._calibration = calibration
        images = 0 if calibration is None else len(calibration)
        if size is not None and calibration is not None and size * _TIMES_MORE > images:
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

    @property
    def keeps(self) -> bool:
        """Whether scores are kept."""
        return self._calibration is not None

    def add(self, scores: Tensor) -> None:
        """Keep the scores of images; those that are not numbers are left out.

        Args:
            scores: `(n,)`, floating point, of the kind of those of the calibration.
        """
        if self.keeps:
            with self._lock:
                self._scores.extend(scores[~scores.isnan()].tolist())

    def p_value(self) -> float:
        """Return the p-value of `netfission.evaluation.drift.drift_p_value`; NaN without images."""
        with self._lock:
            scores = list(self._scores)
        if self._calibration is None or not scores:
            return math.nan
        return drift_p_value(torch.tensor(scores, dtype=torch.float64), self._calibration)
