"""What an ensemble of another task than classification gains over the single network that it was made of."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from netfission.evaluation.calibration import FEW_IMAGES
from netfission.evaluation.gain import MeasuredNetwork, cost_summary, duration
from netfission.profiling.timing import Quartiles
from netfission.tasks.columns import Column, Columns
from netfission.tasks.registry import task_kind
from netfission.utils.text import align_columns, count_noun, decimal


@dataclass(frozen=True)
class TargetFigures(MeasuredNetwork):
    """The figures of one network.

    Attributes:
        calibration: SHA-256 of its calibration, see `TargetCalibration.digest`.
        calibrated_on: the images that it was fitted to, and their number, in words.
    """

    calibration: str = ""
    calibrated_on: str = ""


@dataclass(frozen=True)
class TargetGain:
    """A single network, the ensemble made of it, and their measures on the same test images.

    Attributes:
        task: name of the task, whose `columns` are shown.
        n: number of test images.
        single: figures of the single network.
        ensemble: figures of the ensemble.
        time: batch size → time of inference of the ensemble over the single network's, both deployed; empty
            if it could not be measured.
        environment: versions, device and threads of the measured times.
        errors: measure → standard error of its change, see `netfission.evaluation.resampling`; of those of
            which a change is better or worse.

    Example:
        >>> single = TargetFigures(1, {"mae": 0.5, "nll": 0.7}, parameters=1000, macs=20_000, seconds=60.0)
        >>> ensemble = TargetFigures(3, {"mae": 0.4, "nll": 0.69}, parameters=1100, macs=20_400, seconds=45.0)
        >>> errors = {"mae": 0.01, "nll": 0.02}
        >>> time = {32: Quartiles(1.0, 1.1, 1.2)}
        >>> gain = TargetGain("regression", 10_000, single, ensemble, time, {}, errors)
        >>> print(gain.summary())
        better than the single network: MAE -0.1000 (standard error 0.0100)
        not clear from 10,000 test images: NLL -0.010 (standard error 0.020)
        cost relative to the single network: MACs 1.02×, parameters 1.10×, inference time 1.10× for 32 \
images (quartiles 1.00–1.20); its training took another 0.75×
    """

    task: str
    n: int
    single: TargetFigures
    ensemble: TargetFigures
    time: dict[int, Quartiles]
    environment: dict[str, Any]
    errors: dict[str, float]

    @property
    def columns(self) -> Columns:
        """The measures that both networks have, the headline first."""
        columns = task_kind(self.task).columns
        both = self.single.metrics.keys() & self.ensemble.metrics.keys()
        return {name: column for name, column in columns.items() if name in both}

    def to_json(self) -> str:
        """Return the figures as JSON text, every digit kept."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def table(self) -> str:
        """Return the figures as aligned plain text, one line per network, and the images that they are of."""
        measures = [column.title for column in self.columns.values()]
        rows = [
            ["", *measures, "MACs, M", "parameters, M", "training time"],
            ["single network", *self._cells(self.single)],
            [f"ensemble of {self.ensemble.predictions}", *self._cells(self.ensemble)],
        ]
        lower = [_words(column) for column in self._judged.values() if not column.higher_is_better]
        images = f"on {count_noun(self.n, 'test image')}, calibrated on {self._calibrated_on()}"
        note = f"{', '.join(lower[:-1])} and {lower[-1]} are better if lower"
        return f"{align_columns(rows)}\n{images}; {note}\n{task_kind(self.task).remark}"

    def summary(self) -> str:
        """Return what got better, what got worse and what is not clear, a line for each, and the cost.

        What changed by less than two standard errors is not clear, and of fewer than 100 test images nothing
        is.
        """
        better, worse = "better than the single network", "worse than the single network"
        unclear, same = f"not clear from {count_noun(self.n, 'test image')}", "as the single network"
        changes: dict[str, list[str]] = {better: [], worse: [], unclear: [], same: []}
        for name, column in self._judged.items():
            change, error = self.ensemble.metrics[name] - self.single.metrics[name], self.errors[name]
            is_better = (change > 0) == column.higher_is_better
            kind = (
                unclear if abs(change) < 2 * error or self.n < FEW_IMAGES else better if is_better else worse
            )
            if not change and self.n >= FEW_IMAGES:
                kind = same
            changes[kind].append(_described(column, change, error))
        lines = [f"{title}: {', '.join(changed)}" for title, changed in changes.items() if changed]
        return "\n".join([*lines, cost_summary(self.single, self.ensemble, self.time)])

    @property
    def _judged(self) -> Columns:
        """The measures of which a change is better or worse."""
        return {name: column for name, column in self.columns.items() if name in self.errors}

    def _calibrated_on(self) -> str:
        single, ensemble = self.single.calibrated_on, self.ensemble.calibrated_on
        if single == ensemble:
            return single
        return f"{single} for the single network and {ensemble} for the ensemble"

    def _cells(self, network: TargetFigures) -> list[str]:
        measures = (
            decimal(column.scale * network.metrics[name], column.digits)
            for name, column in self.columns.items()
        )
        return [
            *measures,
            f"{network.macs / 1e6:,.2f}",
            f"{network.parameters / 1e6:,.3f}",
            "–" if network.seconds is None else duration(network.seconds),
        ]


def _words(column: Column) -> str:
    return column.title.removesuffix(" %")


def _described(column: Column, change: float, error: float) -> str:
    """Return a change and its standard error in words."""
    points = " points" if column.title.endswith(" %") else ""
    changed, digits = f"{column.scale * change:+.{column.digits}f}{points}", column.digits
    return f"{_words(column)} {changed} (standard error {column.scale * error:.{digits}f})"
