"""What images are labelled with: one class, several labels, numbers, or a class for each pixel."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from netfission.data.label_files import (
    LABEL_COLUMNS,
    NO_CLASS,
    SPLIT_COLUMN,
    Row,
    TargetRows,
    check_cells,
    class_name,
    find_file_column,
    read_cells,
    whole_numbers,
)
from netfission.data.label_folders import FolderReader, read_label_folders
from netfission.data.splits import Rows
from netfission.utils.errors import invalid
from netfission.utils.text import count_noun

SEPARATOR = "|"  # between the names of an image's labels
_TRUTH = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}

_OTHER_SEPARATORS = {",", ";"}  # that other programs use in its place
_LARGEST = float(np.finfo(np.float32).max)  # targets are stored so

Values = npt.NDArray[Any]


class TableReader(Protocol):
    """Reads a table as `read_numbers` does."""

    def __call__(self, table: Path, wanted: Collection[str] = ()) -> TargetRows:
        """Return names and targets."""


@dataclass(frozen=True)
class Targets:
    """A kind of targets, and how a table holds them.

    Attributes:
        noun: what `names` are names of.
        expected: what a data set of them is, for messages, with `{}` for the ends of names of tables.
        read: reads a table; None if each image has one class, which has a reader of its own.
        read_folder: reads a folder, see `read_label_folders`; None if these targets are in no folder.
        count: targets `(images, names)` → number of images with each; None if there is nothing to count.
        masks: whether each pixel has a target of its own, in a mask; they are in a folder, not in a table.

    Example:
        >>> LABELS.strata(np.ones((3, 2)))
        array([0, 0, 0])
    """

    noun: str
    expected: str
    read: TableReader | None = None
    read_folder: FolderReader | None = None
    count: Callable[[Values], list[int]] | None = None
    masks: bool = False

    @property
    def exclusive(self) -> bool:
        """Whether each image has exactly one of the targets."""
        return self.read is None and not self.masks

    def strata(self, values: Values) -> Rows:
        """Return the group of each image, of which a split takes an equal share; one if there are no classes.

        Args:
            values: classes `(images,)` int64, or other targets `(images, names)`.
        """
        return values if self.exclusive else np.zeros(len(values), np.int64)

    def per_name(self, values: Values, names: Sequence[str]) -> list[int]:
        """Return the number of images of each class, or with each label; none for numbers.

        Args:
            values: classes `(images,)` int64, or other targets `(images, names)`.
            names: of the targets.
        """
        if self.exclusive:
            return [int(count) for count in np.bincount(values, minlength=len(names))]
        return [] if self.count is None else self.count(values)


def parse(label: str) -> list[float]:
    """Return the targets of an image, whose numbers are written with blanks between them.

    Example:
        >>> parse("1 0 0.5")
        [1.0, 0.0, 0.5]
    """
    return [float(number) for number in label.split()]


def read_labels(table: Path, wanted: Collection[str] = ()) -> TargetRows:
    """Read a table of images with any number of labels each.

    Beside the column of files there is one column of 0 and 1 per label; or a single column of labels, such as
    `labels`, with the names of an image's labels, separated by `|`. No label at all is allowed. Names that
    are all whole numbers lose their zeros behind the point: `1.0` is the label `1`.

    Args:
        table: the table.
        wanted: see `read_numbers`.

    Raises:
        ValueError: the table has another layout, a cell holds something else or several lines, or a row has
            more cells than there are columns.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     table = Path(folder, "images.csv")
        ...     _ = table.write_text("path,labels\\n1.png,car|tree\\n2.png,\\n")
        ...     found = read_labels(table)
        >>> found.names, [row.label for row in found.rows]
        (['car', 'tree'], ['1 1', '0 0'])
    """
    columns = _Columns(table, wanted)
    named = [name for name in columns.targets if name.casefold() in LABEL_COLUMNS]
    if not named:
        return columns.rows(_truth, "0 or 1 per label")
    if len(columns.targets) > 1:
        found = " and ".join(list(columns.targets)[:4])
        expected = "a table with one column of names of labels, or with one column of 0 and 1 per label"
        raise invalid(str(table), expected, found=f"the columns {found}")
    (column,) = columns.targets.values()
    labels = [columns.names_in(cells[column], row) for row, cells in columns.numbered]
    given = set().union(*labels)
    if not given:
        raise invalid(str(table), "a table with names of labels", found="none")
    whole = whole_numbers(given)
    renamed = [{whole.get(name, name) for name in of_image} for of_image in labels]
    names = sorted(set().union(*renamed))
    values = [[float(name in of_image) for name in names] for of_image in renamed]
    return TargetRows(names, columns.with_values(values), listed=True, unread=columns.unread)


def read_numbers(table: Path, wanted: Collection[str] = ()) -> TargetRows:
    """Read a table of images with one or several numbers each, in one column per number.

    Args:
        table: the table.
        wanted: names of columns of targets. If the table has some of them, all others are left out, also if
            they hold text; default all columns.

    Raises:
        ValueError: the table has another layout, a cell holds no finite number of float32 or several lines,
            or a row has more cells than there are columns, as decimal commas make them.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     table = Path(folder, "images.csv")
        ...     _ = table.write_text("path,road,split\\n1.png,0.25,train\\n")
        ...     found = read_numbers(table)
        >>> found.names, [row.label for row in found.rows]
        (['road'], ['0.25'])
    """
    return _Columns(table, wanted).rows(_number, "a finite number (float32) per target")


def _truth(cell: str) -> float | None:
    return _TRUTH.get(cell.casefold())


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if abs(value) <= _LARGEST else None


class _Columns:
    """The cells of a table, and which column holds what."""

    def __init__(self, table: Path, wanted: Collection[str]) -> None:
        header, *lines = read_cells(table) or [[]]
        names = [class_name(name).strip() for name in header]
        self.table = table
        self.file = find_file_column(header, str(table))
        lower = [name.casefold() for name in names]
        self.split = lower.index(SPLIT_COLUMN) if SPLIT_COLUMN in lower else None
        self.targets = {
            name: number
            for number, name in enumerate(names)
            if name and number not in (self.file, self.split)
        }
        others = len([name for name in names if name]) - 1 - (self.split is not None)
        if not self.targets or len(self.targets) < others:
            found = "two columns of one name" if self.targets else f"the column {names[self.file]} alone"
            raise invalid(str(table), "a table with columns of targets, of different names", found=found)
        known = {name: number for name, number in self.targets.items() if name in wanted}
        self.unread = [name for name in self.targets if known and name not in known]
        self.targets = known or self.targets
        padded = [[cell.strip() for cell in line] + [""] * (len(names) - len(line)) for line in lines]
        for number, cells in enumerate(padded, 2):
            self._check(number, cells, len(names))
        self.numbered = [(number, cells) for number, cells in enumerate(padded, 2) if cells[self.file]]

    def _check(self, row: int, cells: Sequence[str], columns: int) -> None:
        """Refuse a row in which cells are not under the names of their columns."""
        check_cells(self.table, cells, row)
        if any(cells[columns:]):
            found = f"{len(cells)} in row {row}"
            hint = "write numbers with a decimal point, and quote cells that hold the separator"
            raise invalid(str(self.table), f"a table with {columns} cells per row", found=found, hint=hint)

    def names_in(self, cell: str, row: int) -> set[str]:
        """Return the names of labels in a cell."""
        names = {class_name(part).strip() for part in cell.split(SEPARATOR)} - {""}
        if missing := sorted(names.intersection(NO_CLASS)):
            hint = "leave the cell empty for an image without labels"
            found = f"{missing[0]} in row {row}"
            raise invalid(str(self.table), "a table with names of labels", found=found, hint=hint)
        return names

    def rows(self, convert: Callable[[str], float | None], valid: str) -> TargetRows:
        """Return the rows with all columns of targets.

        Args:
            convert: cell → its value; None for a cell that is not valid.
            valid: what is valid.

        Raises:
            ValueError: a cell is not valid.
        """
        values = []
        for row, cells in self.numbered:
            found = {name: convert(cells[column]) for name, column in self.targets.items()}
            values.append([value for value in found.values() if value is not None])
            if missing := [name for name, value in found.items() if value is None]:
                cell = cells[self.targets[missing[0]]]
                what = f"{cell!r}" if cell else "no value"
                where = f"{what} for {missing[0]} in row {row}"
                raise invalid(str(self.table), f"a table with {valid}", found=where)
        return TargetRows(list(self.targets), self.with_values(values), unread=self.unread)

    def with_values(self, values: Sequence[Sequence[float]]) -> list[Row]:
        """Return the rows with these targets."""
        return [
            Row(
                cells[self.file],
                " ".join(f"{value:.9g}" for value in of_image),
                None if self.split is None else cells[self.split],
                number,
            )
            for (number, cells), of_image in zip(self.numbered, values, strict=True)
        ]


def _positives(values: Values) -> list[int]:
    return [int(count) for count in values.sum(axis=0)]


CLASSES = Targets("classes", "a data set with one class per image")
LABELS = Targets(
    "labels",
    "a table of paths and labels ({}), or a folder with one folder per label,",
    read_labels,
    read_label_folders,
    _positives,
)
NUMBERS = Targets("numbers", "a table of paths and numbers ({})", read_numbers)
MASKS = Targets("classes", "a folder of photographs and masks", masks=True)


def check_values(targets: Targets, values: Values, names: Sequence[str]) -> list[str]:
    """Say what is wrong with the targets of the training images.

    Args:
        targets: their kind.
        values: `(images, names)`.
        names: of the targets.

    Raises:
        ValueError: a number is the same for all images, or there is one label alone.

    Example:
        >>> check_values(LABELS, np.array([[0, 1], [0, 1]]), ["bus", "road"])
        ['no training image has the label bus', 'all training images have the label road']
    """
    if targets.exclusive:
        return []
    if targets.count is None:
        constant = [name for name, column in zip(names, values.T, strict=True) if np.ptp(column) == 0]
        if constant:
            found = f"{values[0, list(names).index(constant[0])]:g} for all training images"
            raise invalid(constant[0], "a target that differs between images", found=found)
        return []
    if len(names) == 1:
        hint = "classification of images with it and without it does the same"
        raise invalid("data", "a data set of at least 2 labels", found=f"1 ({names[0]})", hint=hint)
    counts = dict(zip(names, targets.count(values), strict=True))
    remarks = [f"no training image has the label {name}" for name, count in counts.items() if count == 0]
    remarks += [
        f"all training images have the label {name}" for name, count in counts.items() if count == len(values)
    ]
    if unsplit := [name for name in names if _OTHER_SEPARATORS.intersection(name)]:
        others = f", and {len(unsplit) - 1} more like it" if len(unsplit) > 1 else ""
        remarks.append(f"{unsplit[0]} is one label{others}: only {SEPARATOR} separates names")
    return remarks


def describe_counts(names: Sequence[str], counts: Sequence[int]) -> str:
    """Say which label is the rarest and which the most frequent; empty without counts.

    Example:
        >>> describe_counts(["car", "bus"], [30, 2])
        'rarest label: bus (2 training images), most frequent: car (30)'
    """
    if not counts:
        return ""
    by_count = sorted(zip(counts, names, strict=True), key=lambda pair: pair[0])
    (few, rare), (many, frequent) = by_count[0], by_count[-1]
    rarest = f"rarest label: {rare} ({count_noun(few, 'training image')})"
    return f"{rarest}, most frequent: {frequent} ({many:,})"
