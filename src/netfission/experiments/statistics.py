"""SeedValues of merit over seeds, and how a table shows them."""

from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class SeedValues:
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

    def minus(self, other: "SeedValues") -> "SeedValues":
        """Differences seed by seed, of the seeds that both have."""
        both = self.values.keys() & other.values.keys()
        return SeedValues({seed: self.values[seed] - other.values[seed] for seed in sorted(both)})


@dataclass(frozen=True)
class Column:
    """A figure of merit, as a table shows it."""

    title: str
    scale: float
    digits: int

    def cell(self, figures: SeedValues) -> str:
        """Mean ± standard deviation."""
        spread = figures.deviation
        shown = f"{self.scale * figures.mean:.{self.digits}f}"
        return shown if spread is None else f"{shown} ± {self.scale * spread:.{self.digits}f}"

    def difference(self, figures: SeedValues) -> str:
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
