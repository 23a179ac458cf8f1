"""Calibration error without bins: the residuals of the confidence, smoothed by a kernel (smooth ECE)."""

import torch
from torch import Tensor

from netfission.utils.errors import invalid

_CELLS = 4096  # of the grid on [0, 1] that residuals are rounded to; far finer than most kernels
_ROUNDING = 1e-5  # of probabilities in float32
_TOLERANCE = 1e-6  # of the bandwidth


def smooth_calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Return the smooth expected calibration error (Błasiok & Nakkiran 2024, arXiv 2309.12236).

    The residuals, confidence less correctness, are smoothed over the confidence by a Gaussian kernel that is
    reflected at 0 and 1; the error at a bandwidth is the integral of the absolute smoothed residual. It falls
    as the bandwidth grows. The smooth error is the one that equals its bandwidth (definition 2 of the paper),
    so that it has no parameter, and changes little if confidences do.

    Args:
        confidence: `(n,)`, floating point, probability of the class that is predicted.
        correct: `(n,)`, 1 for a correct answer and 0 for a wrong one, or a mean of both.

    Returns:
        The error, in [0, 1], computed in float64 on a grid of 4,096 cells.

    Raises:
        ValueError: there are no examples, or a confidence is outside [0, 1].

    Example:
        >>> confidence = torch.tensor([0.9] * 10)
        >>> round(smooth_calibration_error(confidence, torch.tensor([1.0] * 6 + [0.0] * 4)), 4)
        0.3
    """
    from scipy.optimize import brentq

    confidence = confidence.double().cpu()
    if not len(confidence):
        raise invalid("confidence", "at least one probability", found="none")
    outside = confidence[~((confidence >= 0) & (confidence <= 1 + _ROUNDING))]  # NaN, too
    if len(outside):
        raise invalid("confidence", "probabilities", float(outside[0]))
    spectrum = _residual_spectrum(confidence.clamp(max=1), correct.double().cpu())
    # The error is at most 1 at any bandwidth, and rounding may make it a little more.
    found: float = brentq(
        lambda bandwidth: _smoothed_error(spectrum, bandwidth) - bandwidth, 0, 2, xtol=_TOLERANCE
    )
    return min(found, 1.0)


def _residual_spectrum(confidence: Tensor, correct: Tensor) -> Tensor:
    """Return the Fourier coefficients of the residuals on a circle of length 2, mirrored at 0 and 1."""
    place = confidence * _CELLS
    left = place.long().clamp(max=_CELLS - 1)
    share = place - left  # of the point on the right, so that the mean confidence stays
    residual = (confidence - correct) / len(confidence)
    grid = torch.zeros(_CELLS + 1, dtype=torch.float64)
    grid.index_add_(0, left, (1 - share) * residual)
    grid.index_add_(0, left + 1, share * residual)
    circle = torch.cat([grid[:-1], grid[1:].flip(0)])  # from 0 to 1 and back
    circle[[0, _CELLS]] = 2 * grid[[0, -1]]  # their own mirror images
    spectrum: Tensor = torch.fft.rfft(circle)
    return spectrum


def _smoothed_error(spectrum: Tensor, bandwidth: float) -> float:
    """Return the integral over [0, 1] of the absolute residual, smoothed at a bandwidth."""
    frequency = torch.pi * torch.arange(len(spectrum), dtype=torch.float64)
    smoothed = torch.fft.irfft(spectrum * (-(frequency * bandwidth).square() / 2).exp(), 2 * _CELLS)
    half: Tensor = smoothed[: _CELLS + 1].abs()
    integral: Tensor = half.sum() - (half[0] + half[-1]) / 2
    return integral.item()
