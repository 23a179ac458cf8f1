"""The measures of maps on photographs in their own sizes."""

import json
from dataclasses import asdict, dataclass

from netfission.tasks.evaluation import TargetEvaluation, shown_measure
from netfission.utils.text import count_noun


@dataclass(frozen=True)
class WindowEvaluation:
    """Measures on photographs in their own sizes: window by window, and scaled to the network's size.

    Attributes:
        window: height and width of a window.
        overlap: least share of a side that two windows have in common.
        windows: number of windows of all photographs.
        evaluation: of the exits and the ensemble, window by window.
        shape: height and width of the network's own size.
        scaled: measures of the ensemble on the same pixels if photographs are scaled to that size, and its
            probabilities to theirs.

    Example:
        >>> of_exits = TargetEvaluation(4, "logits", [{"nll": 0.5}], {"nll": 0.5}, {}, {})
        >>> found = WindowEvaluation([90, 120], 0.25, 36, of_exits, [45, 60], {"mean_iou": 0.5})
        >>> print(found.table().splitlines()[-1])
        scaled to 45×60: mIoU 50.00 %
    """

    window: list[int]
    overlap: float
    windows: int
    evaluation: TargetEvaluation
    shape: list[int]
    scaled: dict[str, float]

    def to_json(self) -> str:
        """Return the figures as JSON text, every digit kept."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def table(self, linear: int = 0) -> str:
        """Return the figures as aligned plain text.

        Args:
            linear: number of linear exits, which come last.
        """
        (height, width), windows = self.window, count_noun(self.windows, "window")
        measures = ", ".join(shown_measure(name, value) for name, value in self.scaled.items())
        return "\n".join(
            [
                self.evaluation.table(linear),
                f"photographs in their own sizes, {windows} of {height}×{width}, overlap {self.overlap:g}",
                f"scaled to {self.shape[0]}×{self.shape[1]}: {measures}",
            ]
        )
