"""What a report shows of numbers."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from netfission.tasks.figures import (
    Coverage,
    Example,
    FigureData,
    InspectedImages,
    Inspection,
    Panel,
    Scatter,
    picture,
)
from netfission.utils.text import minus, percent

_EXAMPLES = 6
_FIGURES = 8  # of single numbers, the first ones
_LEVELS = [level / 20 for level in range(1, 20)]


def inspect_numbers(
    images: InspectedImages,
    names: Sequence[str],
    mean: Tensor,
    stds: Mapping[str, Tensor],
    truth: Tensor,
    intervals: Tensor,
    described: str,
) -> Inspection:
    """Return predicted against true numbers, the coverage of intervals, and the most surprising images.

    Args:
        images: of the test split.
        names: of the numbers.
        mean: of the ensemble, `(n, targets)`.
        stds: title → its standard deviation, `(n, targets)`; the last ones are those of answers.
        truth: `(n, targets)`.
        intervals: ends, `(n, targets, 2)`.
        described: what the intervals are, in words.
    """
    *_, std = stds.values()
    left_out = f" Of {len(names):,} numbers, the first {_FIGURES} are drawn." if len(names) > _FIGURES else ""
    figures: list[FigureData] = [
        Scatter(
            f"predicted-{number + 1}",
            f"{name}: predicted against true",
            f"Each dot is one of {len(truth):,} test images, with {described}. On the dashed line, both are "
            f"equal.{left_out}",
            truth[:, number].tolist(),
            mean[:, number].tolist(),
            intervals[:, number, 0].tolist(),
            intervals[:, number, 1].tolist(),
            name,
        )
        for number, name in enumerate(names[:_FIGURES])
    ]
    figures.append(
        Coverage(
            "coverage",
            "Calibration of intervals",
            "Share of the numbers in the central interval of the predicted Gaussian, by the probability that "
            f"it states (n = {len(truth):,}). Below the dashed line, the network is overconfident.",
            _LEVELS,
            {title: _observed(mean, own, truth) for title, own in stds.items()},
        )
    )
    surprise = ((truth - mean).abs() / std).amax(dim=1)
    return Inspection(
        figures,
        examples=[
            _example(images, row, names, mean[row], std[row], truth[row])
            for row in surprise.argsort(descending=True)[:_EXAMPLES].tolist()
        ],
        rule=f"The test images with the largest error in standard deviations, of {len(truth):,}.",
    )


def _observed(mean: Tensor, std: Tensor, truth: Tensor) -> list[float]:
    errors = ((truth - mean).abs() / std).flatten()
    return [(errors <= normal_width(level)).double().mean().item() for level in _LEVELS]


def normal_width(coverage: float) -> float:
    """Return half the width of the central interval of a Gaussian, in standard deviations.

    Example:
        >>> round(normal_width(0.9), 3)
        1.645
    """
    return math.sqrt(2) * torch.erfinv(torch.tensor(coverage, dtype=torch.float64)).item()


def _example(
    images: InspectedImages, row: int, names: Sequence[str], mean: Tensor, std: Tensor, truth: Tensor
) -> Example:
    pixels, _, _ = images.one(row)
    error = ((truth - mean).abs() / std).max().item()
    lines = [
        f"{name}: {_short(value)}; predicted {_short(center)} ± {_short(spread)}"
        for name, value, center, spread in zip(
            names, truth.tolist(), mean.tolist(), std.tolist(), strict=True
        )
    ]
    return Example(f"{error:.1f} standard deviations off", lines, [Panel("", picture(pixels[0]))])


def _short(value: float) -> str:
    return minus(f"{value:.4g}")


def describe_intervals(coverage: float, conformal: bool) -> str:
    """Return in words what the intervals of a figure are.

    Example:
        >>> describe_intervals(0.9, conformal=True)
        'its conformal interval of 90 %'
    """
    kind = "its conformal interval" if conformal else "the central interval of its Gaussian"
    return f"{kind} of {percent(coverage, 0)} %"
