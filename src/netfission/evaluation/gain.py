"""What an ensemble gains over the single network that it was made of, and what it costs."""

import json
from dataclasses import asdict, dataclass
from math import hypot, sqrt
from typing import Any

from netfission.evaluation.calibration import FEW_IMAGES
from netfission.profiling.timing import Quartiles
from netfission.utils.text import align_columns, count_noun, decimal, percent


@dataclass(frozen=True)
class NetworkFigures:
    """The figures of one network.

    Attributes:
        predictions: number of predictions that are averaged.
        metrics: `classification_metrics` on the test split, calibrated.
        parameters: stored.
        macs: dense multiply-accumulates per image.
        seconds: of its training; None if it was trained elsewhere.
        weights: SHA-256 of its weights, see `netfission.classifier.folder.state_sha256`.
        temperature: by which its logits were divided.
        calibrated_on: the images that the temperature was fitted on, and their number, in words.
        guess: why the temperature is a guess, in words, see `netfission.evaluation.calibration.why_guess`.
    """

    predictions: int
    metrics: dict[str, float]
    parameters: int
    macs: int
    seconds: float | None = None
    weights: str = ""
    temperature: float = 1.0
    calibrated_on: str = ""
    guess: str = ""


@dataclass(frozen=True)
class Gain:
    """A single network, the ensemble made of it, and their figures on the same test images.

    Attributes:
        n: number of test images.
        single: figures of the single network.
        ensemble: figures of the ensemble.
        time: batch size → time of inference of the ensemble over the single network's, both deployed; empty
            if it could not be measured.
        environment: versions, device and threads of the measured times.

    Example:
        >>> metrics = {"top1": 0.8, "nll": 0.7, "ece": 0.05}
        >>> single = NetworkFigures(1, metrics, parameters=1000, macs=20_000, seconds=60.0)
        >>> better = {"top1": 0.85, "nll": 0.5, "ece": 0.02}
        >>> ensemble = NetworkFigures(5, better, parameters=1100, macs=20_400, seconds=45.0)
        >>> gain = Gain(10_000, single, ensemble, {32: Quartiles(1.0, 1.1, 1.2)}, {})
        >>> print(gain.summary())
        better than the single network: accuracy +5.00 points (standard error below 0.54), NLL -0.2000, \
ECE -3.00 points
        cost relative to the single network: MACs 1.02×, parameters 1.10×, inference time 1.10× for 32 \
images (quartiles 1.00–1.20); its training took another 0.75×
    """

    n: int
    single: NetworkFigures
    ensemble: NetworkFigures
    time: dict[int, Quartiles]
    environment: dict[str, Any]

    def to_json(self) -> str:
        """Return the figures as JSON text, every digit kept."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def table(self) -> str:
        """Return the figures as aligned plain text, one line per network, and the images that they are of."""
        rows = [
            ["", "accuracy %", "NLL", "ECE %", "MACs, M", "parameters, M", "training time"],
            ["single network", *self._cells(self.single)],
            [f"ensemble of {self.ensemble.predictions}", *self._cells(self.ensemble)],
        ]
        images = f"on {count_noun(self.n, 'test image')}, calibrated on {self._calibrated_on()}"
        note = "± is the standard error; NLL and ECE are better if lower"
        return f"{align_columns(rows)}\n{images}; {note}"

    def summary(self) -> str:
        """Return what got better, what got worse and what is not clear, a line for each, and the cost.

        An accuracy that changed by less than two standard errors is not clear, and of fewer than 100 test
        images nothing is. The standard error is that of networks which err independently. On the same images
        it is usually smaller, as both err on the hard ones. It is counted with two more answers of either
        kind (Agresti & Coull 1998), so that it is never 0.
        """
        single, ensemble = self.single, self.ensemble
        times = (
            f"{time.median:.2f}× for {count_noun(size, 'image')} "
            f"(quartiles {time.lower:.2f}–{time.upper:.2f})"
            for size, time in self.time.items()
        )
        cost = [
            f"MACs {ensemble.macs / single.macs:.2f}×",
            f"parameters {ensemble.parameters / single.parameters:.2f}×",
            f"inference time {' and '.join(times) or 'not measured'}",
        ]
        training = ""
        if ensemble.seconds is not None and single.seconds:
            training = f"; its training took another {ensemble.seconds / single.seconds:.2f}×"
        changes = [f"{title}: {', '.join(changed)}" for title, changed in self._changes().items() if changed]
        return "\n".join([*changes, f"cost relative to the single network: {', '.join(cost)}{training}"])

    def _changes(self) -> dict[str, list[str]]:
        """Return what is better, worse, not clear and as before, in words."""
        better, worse = "better than the single network", "worse than the single network"
        unclear, same = f"not clear from {count_noun(self.n, 'test image')}", "as the single network"
        changes: dict[str, list[str]] = {better: [], worse: [], unclear: [], same: []}
        before, after = self.single.metrics, self.ensemble.metrics
        accuracy = after["top1"] - before["top1"]
        error = hypot(*(self._error(network) for network in (self.single, self.ensemble)))
        kind = (
            unclear if abs(accuracy) < 2 * error or self.n < FEW_IMAGES else better if accuracy > 0 else worse
        )
        changes[kind].append(
            f"accuracy {100 * accuracy:+.2f} points (standard error below {100 * error:.2f})"
        )
        for name, change in (
            ("nll", f"NLL {after['nll'] - before['nll']:+.4f}"),
            ("ece", f"ECE {100 * (after['ece'] - before['ece']):+.2f} points"),
        ):
            kind = same if after[name] == before[name] else better if after[name] < before[name] else worse
            changes[unclear if self.n < FEW_IMAGES else kind].append(change)
        return changes

    def _error(self, network: NetworkFigures) -> float:
        """Return the standard error of an accuracy, with two more correct and two more wrong answers."""
        n = self.n + 4
        share = (network.metrics["top1"] * self.n + 2) / n
        return sqrt(share * (1 - share) / n)

    def _calibrated_on(self) -> str:
        single, ensemble = (
            f"{network.calibrated_on} ({network.guess})" if network.guess else network.calibrated_on
            for network in (self.single, self.ensemble)
        )
        return (
            single
            if single == ensemble
            else f"{single} for the single network and {ensemble} for the ensemble"
        )

    def _cells(self, network: NetworkFigures) -> list[str]:
        metrics = network.metrics
        return [
            f"{percent(metrics['top1'])} ± {percent(self._error(network))}",
            decimal(metrics["nll"], 4),
            percent(metrics["ece"]),
            f"{network.macs / 1e6:,.2f}",
            f"{network.parameters / 1e6:,.3f}",
            "–" if network.seconds is None else duration(network.seconds),
        ]


def duration(seconds: float) -> str:
    """Write a time in the two largest units that it has.

    Example:
        >>> duration(0.4), duration(75.2), duration(7325.0)
        ('0 s', '1 min 15 s', '2 h 2 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
