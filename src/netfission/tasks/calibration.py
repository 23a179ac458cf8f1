"""What every task but classification keeps of what it learned from images that were held out."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Self

from netfission.ensemble import Average
from netfission.evaluation.calibration import VALIDATION, count_images
from netfission.utils.checksums import parse_json
from netfission.utils.typed import typed


@dataclass(frozen=True, kw_only=True)
class TargetCalibration:
    """What was learned from validation images.

    Attributes:
        n: number of these images.
        average: what the ensemble averages.
        fitted_on: the images, in words.
        dependence: how the network depends on them, in words; empty if it does not.
        weights: SHA-256 of the network's weights.
        overlap: which of these images are test images of the run, in words; empty if none is.
        uncertainty: of each image, see `netfission.tasks.Task.total_uncertainty`, sorted; none if the network
            depends on them, and in files of an earlier version.

    Example:
        >>> calibration = TargetCalibration(n=20, average="logits")
        >>> TargetCalibration.from_json(calibration.to_json()) == calibration
        True
    """

    n: int
    average: Average
    fitted_on: str = VALIDATION
    dependence: str = ""
    weights: str = ""
    overlap: str = ""
    uncertainty: list[float] = field(default_factory=list)

    @property
    def images(self) -> str:
        """The images in words, with their number."""
        return count_images(self.n, self.fitted_on)

    def summary(self) -> str:
        """Return what was learned from which images, in one line."""
        return self.images

    @property
    def digest(self) -> str:
        """SHA-256 of the figures, as hexadecimal digits; exported files hold it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the figures as JSON text, every digit kept."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; ValueError if it is something else."""
        return typed(cls, parse_json(text))
