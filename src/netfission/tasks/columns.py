"""How a comparison of networks shows the measures of a task."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """How a table and a picture show a measure.

    Attributes:
        title: head of the column.
        scale: factor from the measure's value to the number shown, such as 100 for per cent.
        digits: digits after the decimal point.
        higher_is_better: whether a larger value is a better one.
        paired: whether differences to a reference are shown, seed by seed.
        brief: whether the short table has the column, too.

    Example:
        >>> Column("accuracy %", 100, 2, higher_is_better=True).direction
        'higher is better'
    """

    title: str
    scale: float
    digits: int
    higher_is_better: bool = False
    paired: bool = True
    brief: bool = True

    @property
    def direction(self) -> str:
        """Which values are better, in words."""
        return f"{'higher' if self.higher_is_better else 'lower'} is better"


Columns = Mapping[str, Column]  # measure → how it is shown, in the order of the columns


def paired(columns: Columns) -> dict[str, Column]:
    """Return the columns whose differences to a reference are shown.

    Example:
        >>> list(paired({"nll": Column("NLL", 1, 3), "brier": Column("Brier", 1, 4, paired=False)}))
        ['nll']
    """
    return {measure: column for measure, column in columns.items() if column.paired}


def brief(columns: Columns) -> dict[str, Column]:
    """Return the columns of the short table.

    Example:
        >>> list(brief({"nll": Column("NLL", 1, 3), "brier": Column("Brier", 1, 4, brief=False)}))
        ['nll']
    """
    return {measure: column for measure, column in columns.items() if column.brief}
