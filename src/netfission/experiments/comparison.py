"""Contenders side by side: their figures over seeds, paired differences, and their costs."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student

from netfission.evaluation import Evaluation
from netfission.experiments.costs import BATCH_SIZES, ContenderCost, Costs
from netfission.files import write_whole
from netfission.tables import aligned

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Figures:
    """Values of one figure, one a seed.

    Attributes:
        values: by seed.
    """

    values: dict[int, float]

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return mean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over the seeds; None of a single one."""
        return stdev(self.values.values()) if self.n > 1 else None

    @property
    def margin(self) -> float | None:
        """Half the width of the 95 % confidence interval of the mean (Student's t); None of a single seed."""
        if self.deviation is None:
            return None
        quantile: float = student.ppf((1 + CONFIDENCE) / 2, self.n - 1)
        return quantile * self.deviation / sqrt(self.n)

    def minus(self, other: "Figures") -> "Figures":
        """Differences seed by seed, of the seeds that both have."""
        both = self.values.keys() & other.values.keys()
        return Figures({seed: self.values[seed] - other.values[seed] for seed in sorted(both)})


@dataclass(frozen=True)
class Column:
    """A figure of merit, as a table shows it."""

    title: str
    scale: float
    digits: int

    def cell(self, figures: Figures) -> str:
        """Mean ± standard deviation."""
        spread = figures.deviation
        shown = f"{self.scale * figures.mean:.{self.digits}f}"
        return shown if spread is None else f"{shown} ± {self.scale * spread:.{self.digits}f}"

    def difference(self, figures: Figures) -> str:
        """Mean difference with its confidence interval."""
        if not figures.n:
            return ""
        middle = f"{self.scale * figures.mean:+.{self.digits}f}"
        if figures.margin is None:
            return middle
        ends = (self.scale * (figures.mean + sign * figures.margin) for sign in (-1, 1))
        return middle + " [" + ", ".join(f"{end:+.{self.digits}f}" for end in ends) + "]"


COLUMNS = {
    "top1": Column("accuracy %", 100, 2),
    "nll": Column("NLL", 1, 3),
    "ece": Column("ECE %", 100, 2),
    "brier": Column("Brier", 1, 4),
    "disagreement": Column("disagreement %", 100, 2),
}


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to.

    Attributes:
        title: what is compared, on what.
        reference: the contender that the others are measured by.
        figures: contender → figure of merit → values.
        costs: of the contenders whose networks are there.
        deviations: contender → where it departs from the common training.
        failed: contender → seed → why its run failed.
    """

    title: str
    reference: str
    figures: dict[str, dict[str, Figures]]
    costs: Costs
    deviations: dict[str, tuple[str, ...]]
    failed: dict[str, dict[int, str]]

    def table(self) -> str:
        """The figures as aligned plain text."""
        blocks = [
            self.title,
            aligned(self._quality()),
            aligned(self._differences()),
            aligned(self._prices()),
            "Times are medians over the single network's, of "
            f"{self.costs.rounds} rounds side by side; deployed: both made fast by this project.",
        ]
        blocks += ["\n".join(self._remarks())] if self.deviations or self.failed else []
        return "\n\n".join(blocks)

    def _quality(self) -> list[list[str]]:
        head = ["mean ± standard deviation", "n", *(column.title for column in COLUMNS.values())]
        return [
            head,
            *(
                [name, str(own["top1"].n), *(column.cell(own[key]) for key, column in COLUMNS.items())]
                for name, own in self.figures.items()
            ),
        ]

    def _differences(self) -> list[list[str]]:
        kinds = {key: COLUMNS[key] for key in ("top1", "nll", "ece")}
        head = f"minus {self.reference}, seed by seed [95 %]"
        rows = [[head, *(column.title for column in kinds.values())]]
        base = self.figures.get(self.reference)
        for name, own in self.figures.items():
            if base is not None and name != self.reference:
                differences = {key: own[key].minus(base[key]) for key in kinds}
                rows.append([name, *(kinds[key].difference(each) for key, each in differences.items())])
        return rows

    def _prices(self) -> list[list[str]]:
        head = ["over the single network", "parameters", "non-zero", "MACs", "effective", "training MACs"]
        head += ["training step", *(f"time, batch {size}" for size in BATCH_SIZES)]
        head += [f"deployed, {size}" for size in BATCH_SIZES]
        return [
            head,
            *([name, *_prices(own, self.costs.single)] for name, own in self.costs.contenders.items()),
        ]

    def _remarks(self) -> list[str]:
        lines = [f"{name}: {'; '.join(own)}" for name, own in self.deviations.items()]
        return lines + [
            f"{name}, seed {seed}: failed ({reason})"
            for name, own in self.failed.items()
            for seed, reason in own.items()
        ]

    def record(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)

    def write(self, out: Path) -> list[Path]:
        """Keep table, figures and picture in a folder, each whole or not at all."""
        files: dict[str, str | bytes] = {
            "comparison.txt": self.table() + "\n",
            "comparison.json": json.dumps(self.record(), indent=1, ensure_ascii=False) + "\n",
            **self._pictures(),
        }
        for name, content in files.items():
            write_whole(out / name, content)
        return [out / name for name in files]

    def _pictures(self) -> dict[str, bytes]:
        figure = Figure(figsize=(11.5, 8.5), layout="constrained")
        size, unit = BATCH_SIZES[-1], self.costs.single.size.macs_dense
        costs = self.costs.contenders
        places = {
            "MACs (dense)": {name: own.size.macs_dense / unit for name, own in costs.items()},
            f"time at batch {size}": {name: own.inference[size].median for name, own in costs.items()},
        }
        for row, key in zip(figure.subplots(2, 2, sharey="row"), ("top1", "nll"), strict=True):
            for axes, (kind, own) in zip(row, places.items(), strict=True):
                self._draw(axes, own, key)
                axes.set_xlabel(f"{kind} ÷ single network's")
        figure.suptitle(f"{self.title}\nmean ± standard deviation over seeds", fontsize=10)
        pictures = {}
        for kind in ("png", "svg"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=130)
            pictures[f"comparison.{kind}"] = buffer.getvalue()
        return pictures

    def _draw(self, axes: Axes, places: Mapping[str, float], key: str) -> None:
        column = COLUMNS[key]
        for number, (name, place) in enumerate(places.items()):
            if name not in self.figures:
                continue
            own = self.figures[name][key]
            ours = name.startswith("fission")
            axes.errorbar(
                place,
                column.scale * own.mean,
                yerr=column.scale * (own.deviation or 0),
                fmt="o" if ours else "s",
                color="#0b6e99" if ours else "#666666",
                capsize=3,
            )
            point, beside = (place, column.scale * own.mean), (6, 5 if number % 2 else -11)
            axes.annotate(name, point, beside, textcoords="offset points", fontsize=8)
        axes.axvline(1, color="#444444", linestyle="--", linewidth=1)
        axes.set_ylabel(column.title + (" (higher is better)" if key == "top1" else " (lower is better)"))
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)


def figures_of(evaluations: Mapping[str, Mapping[int, Evaluation]]) -> dict[str, dict[str, Figures]]:
    """Contender → figure of merit of its ensemble → values by seed."""
    return {
        name: {
            key: Figures({seed: _value(evaluation, key) for seed, evaluation in of_seeds.items()})
            for key in COLUMNS
        }
        for name, of_seeds in evaluations.items()
    }


def _value(evaluation: Evaluation, key: str) -> float:
    return evaluation.disagreement if key == "disagreement" else evaluation.ensemble[key]


def _prices(own: ContenderCost, single: ContenderCost) -> list[str]:
    """A contender's costs over the single network's."""
    ours, its = asdict(own.size), asdict(single.size)
    counted = [ours[name] / its[name] for name in ours]
    cells = [f"{ratio:.2f}×" for ratio in (*counted, own.training_macs / single.training_macs)]
    cells += [f"{own.training.median:.2f}×"]
    for times in (own.inference, own.deployed):
        cells += [f"{times[size].median:.2f}×" if size in times else "–" for size in BATCH_SIZES]
    return cells
