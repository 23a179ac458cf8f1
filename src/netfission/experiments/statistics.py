"""Statistics over seeds, and how tables show them."""

from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

from scipy.special import stdtrit

from netfission.tasks.columns import Column
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
        quantile: float = stdtrit(self.n - 1, (1 + CONFIDENCE) / 2)
        return quantile * self.deviation / sqrt(self.n)

    def minus(self, other: "SeedValues") -> "SeedValues":
        """Return the paired differences, for the seeds that both have.

        Example:
            >>> SeedValues({0: 0.5, 1: 0.75}).minus(SeedValues({1: 0.5, 2: 0.1}))
            SeedValues(values={1: 0.25})
        """
        both = self.values.keys() & other.values.keys()
        return SeedValues({seed: self.values[seed] - other.values[seed] for seed in sorted(both)})

    def cell(self, column: Column) -> str:
        """Return the mean ± standard deviation as text; a dash if there are no seeds.

        Example:
            >>> SeedValues({0: 0.90, 1: 0.92}).cell(Column("accuracy %", 100, 2))
            '91.00 ± 1.41'
        """
        if not self.n:
            return "–"
        middle = decimal(column.scale * self.mean, column.digits)
        spread = self.deviation
        return middle if spread is None else f"{middle} ± {decimal(column.scale * spread, column.digits)}"

    def difference(self, column: Column) -> str:
        """Return a mean difference with its confidence interval as text; empty if there are no seeds.

        Example:
            >>> SeedValues({0: 0.01, 1: 0.02, 2: 0.03}).difference(Column("accuracy %", 100, 2))
            '+2.00 [-0.48, +4.48]'
        """
        if not self.n:
            return ""
        middle = decimal(column.scale * self.mean, column.digits, "+")
        if self.margin is None:
            return middle
        ends = (column.scale * (self.mean + sign * self.margin) for sign in (-1, 1))
        return middle + " [" + ", ".join(decimal(end, column.digits, "+") for end in ends) + "]"
