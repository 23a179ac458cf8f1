"""Statistics over seeds, and how tables show them."""

from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

from scipy.stats import t as student

from netfission.utils.text import decimal

CONFIDENCE = 0.95


@dataclass(frozen=True)
class SeedValues:
    """Values of one metric, one per seed.

    Attributes:
        values: seed → value.

    Example:
        >>> accuracy = SeedValues({0: 0.90, 1: 0.92, 2: 0.91})
        >>> print(f"{accuracy.mean:.2f} ± {accuracy.deviation:.2f}, n = {accuracy.n}")
        0.91 ± 0.01, n = 3
    """

    values: dict[int, float]

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return mean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single seed."""
        return stdev(self.values.values()) if self.n > 1 else None

    @property
    def margin(self) -> float | None:
        """Half the width of the mean's 95 % confidence interval (Student's t); None for a single seed."""
        if self.deviation is None:
            return None
        quantile: float = student.ppf((1 + CONFIDENCE) / 2, self.n - 1)
        return quantile * self.deviation / sqrt(self.n)

    def minus(self, other: "SeedValues") -> "SeedValues":
        """Return the paired differences, for the seeds that both have.

        Example:
            >>> SeedValues({0: 0.5, 1: 0.75}).minus(SeedValues({1: 0.5, 2: 0.1}))
            SeedValues(values={1: 0.25})
        """
        both = self.values.keys() & other.values.keys()
        return SeedValues({seed: self.values[seed] - other.values[seed] for seed in sorted(both)})


@dataclass(frozen=True)
class Column:
    """How a table shows a metric.

    Attributes:
        title: head of the column.
        scale: factor from the metric's value to the number shown, such as 100 for per cent.
        digits: digits after the decimal point.

    Example:
        >>> accuracy = Column("accuracy %", 100, 2)
        >>> accuracy.cell(SeedValues({0: 0.90, 1: 0.92}))
        '91.00 ± 1.41'
        >>> accuracy.difference(SeedValues({0: 0.01, 1: 0.02, 2: 0.03}))
        '+2.00 [-0.48, +4.48]'
    """

    title: str
    scale: float
    digits: int

    def cell(self, values: SeedValues) -> str:
        """Return the mean ± standard deviation as text; a dash if there are no seeds."""
        if not values.n:
            return "–"
        middle = decimal(self.scale * values.mean, self.digits)
        spread = values.deviation
        return middle if spread is None else f"{middle} ± {decimal(self.scale * spread, self.digits)}"

    def difference(self, values: SeedValues) -> str:
        """Return a mean difference with its confidence interval as text; empty if there are no seeds."""
        if not values.n:
            return ""
        middle = decimal(self.scale * values.mean, self.digits, "+")
        if values.margin is None:
            return middle
        ends = (self.scale * (values.mean + sign * values.margin) for sign in (-1, 1))
        return middle + " [" + ", ".join(decimal(end, self.digits, "+") for end in ends) + "]"


COLUMNS = {
    "top1": Column("accuracy %", 100, 2),
    "nll": Column("NLL", 1, 3),
    "ece": Column("ECE %", 100, 2),
    "brier": Column("Brier", 1, 4),
    "disagreement": Column("disagreement %", 100, 2),
    # Of the same logits averaged by the other rule, which is not the method's own.
    "other_nll": Column("NLL, other rule", 1, 3),
    "other_ece": Column("ECE %, other rule", 100, 2),
}
MAIN_COLUMNS = {key: COLUMNS[key] for key in ("top1", "nll", "ece")}
OTHER_COLUMNS = {key: COLUMNS[key] for key in ("other_nll", "other_ece")}
