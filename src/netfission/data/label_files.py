"""Tables of labels for image files, such as `labels.csv`: their columns, and which image a row names."""

import codecs
import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from netfission.data.files import inside, path_order
from netfission.utils.errors import first_line, invalid, shortened
from netfission.utils.extras import extra
from netfission.utils.text import as_text, printable

# Names of columns in lower case; of several columns of files, the first in this order is read.
FILE_COLUMNS = (
    "file_name",
    "filename",
    "file",
    "filepath",
    "file_path",
    "path",
    "image",
    "image_name",
    "image_path",
    "image_id",
    "img",
    "id",
)
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "species", "breed", "target")
SPLIT_COLUMN = "split"
TABLE_FILES = (".csv", ".tsv", ".parquet")  # that may be given as a data set
NO_CLASS = ("nan", "NaN", "NAN", "<NA>", "#N/A")  # what programs write for a missing label
_WHOLE = re.compile(r"(-?\d+)(\.0+)?")
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?", re.IGNORECASE)
_FEWEST_MEASURED = 5  # rows of a table whose labels may be measured values
_OF_PREDICTIONS = "exit_0"  # a column of what `netfission predict` writes
# Words in the name of a table that say that it holds labels.
_OF_LABELS = {"annotation", "annotations", "class", "classes", "label", "labels"}


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        file: the image as it is named there.
        label: its class; empty if the cell is.
        split: its split; None if the table has no splits.
        number: number of the row, with that of the names of columns as 1.
    """

    file: str
    label: str
    split: str | None = None
    number: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True)
class TargetRows:
    """The rows of a table of labels or numbers, each with the targets of its image.

    Attributes:
        names: of the targets, in their order.
        rows: the rows; `Row.label` holds the targets as numbers with blanks between them.
        listed: whether the table lists the labels of each image; `names` are those that occur.
        unread: names of columns that are left out, as others are wanted.
    """

    names: list[str]
    rows: list[Row]
    listed: bool = False
    unread: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Columns:
    """Numbers of the columns that are read."""

    file: int
    label: int
    split: int | None = None


def find_columns(header: Sequence[str], where: str) -> Columns:
    """Find the columns of files, labels and splits of a table by their names, in any case.

    In a table of two columns, one of files, the other one holds the labels, whatever its name.

    Args:
        header: names of the columns.
        where: name of the table, for messages.

    Raises:
        ValueError: there is no column of files, or not exactly one of labels.

    Example:
        >>> find_columns(["id", "breed"], "labels.csv")
        Columns(file=0, label=1, split=None)
        >>> find_columns(["image", "class", "species"], "labels.csv")
        Traceback (most recent call last):
        ValueError: labels.csv must be a table with one column of labels, got class and species; rename or \
remove one
    """
    file = find_file_column(header, where)
    names = [name.strip().casefold() for name in header]
    listed = shortened(", ".join(header), 120)
    labels = [number for number, name in enumerate(names) if name in LABEL_COLUMNS]
    if not labels and len(names) == 2:
        labels = [1 - file]
    if not labels:
        expected = f"a table with a column of labels ({', '.join(LABEL_COLUMNS)})"
        raise invalid(where, expected, found=f"the columns {listed}")
    if len(labels) > 1:
        found = " and ".join(header[number] for number in labels)
        raise invalid(where, "a table with one column of labels", found=found, hint="rename or remove one")
    split = names.index(SPLIT_COLUMN) if SPLIT_COLUMN in names else None
    return Columns(file, labels[0], split)


def find_file_column(header: Sequence[str], where: str) -> int:
    """Find the column of files of a table by its name, in any case.

    Args:
        header: names of the columns.
        where: name of the table, for messages.

    Raises:
        ValueError: there is no such column, or the table holds predictions.

    Example:
        >>> find_file_column(["label", "path"], "labels.csv")
        1
    """
    names = [name.strip().casefold() for name in header]
    if _OF_PREDICTIONS in names:
        raise invalid(where, "a table of labels", found="predictions of netfission")
    file = next((names.index(name) for name in FILE_COLUMNS if name in names), None)
    if file is None:
        expected = f"a table with a column of file names ({', '.join(FILE_COLUMNS[:6])}, …)"
        raise invalid(where, expected, found=f"the columns {shortened(', '.join(header), 120)}")
    return file


def read_label_file(path: Path) -> list[Row]:
    """Read a table of labels, in a parquet file, or separated by commas, semicolons or tabs.

    The names of columns come first. Whole numbers as labels lose their zeros behind the point: `1.0` is the
    class `1`. Text is UTF-8, or UTF-16 if it begins with its mark.

    Returns:
        The rows that have a file; the label may be empty.

    Raises:
        ValueError: the labels are `nan` or measured values, or see `find_columns`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "labels.csv").write_text("file_name,label\\n1.png,cat\\n2.png,\\n")
        ...     read_label_file(Path(folder, "labels.csv"))
        [Row(file='1.png', label='cat', split=None), Row(file='2.png', label='', split=None)]
    """
    header, *lines = read_cells(path) or [[]]
    if not header:
        raise invalid(str(path), "a table of labels", found="no names of columns")
    columns = find_columns(header, str(path))
    rows = [
        _row(line + [""] * (len(header) - len(line)), columns, number)
        for number, line in enumerate(lines, start=2)
    ]
    for row in rows:
        check_cells(path, [row.label, row.file], row.number)
    return _check_labels(path, [row for row in rows if row.file])


def check_cells(path: Path, cells: Iterable[str], row: int) -> None:
    """Check that each cell of a row has one line.

    Args:
        path: the table.
        cells: the cells that are read.
        row: its number.

    Raises:
        ValueError: a cell has several lines, as a quotation mark that is not closed makes them.

    Example:
        >>> check_cells(Path("labels.csv"), ["1.png", "cat"], 2)
    """
    for cell in cells:
        if "\n" in cell:
            found = f"{printable(cell)!r} near row {row}"
            hint = "a quotation mark is not closed"
            raise invalid(str(path), "a table whose cells have one line", found=found, hint=hint)


def whole_numbers(labels: Iterable[str]) -> dict[str, str]:
    """Return label → the same without zeros behind the point, if all labels are whole numbers; else none.

    Example:
        >>> whole_numbers(["1", "2.0"]), whole_numbers(["1.0", "cat"])
        ({'1': '1', '2.0': '2'}, {})
    """
    found = {label: _WHOLE.fullmatch(label) for label in labels}
    whole = {label: match.group(1) for label, match in found.items() if match}
    return whole if len(whole) == len(found) else {}


def _check_labels(path: Path, rows: list[Row]) -> list[Row]:
    """Refuse labels that are no classes, and return rows whose whole numbers have no point."""
    labels = [row.label for row in rows if row.label]
    for row in rows:
        if row.label in NO_CLASS:
            found = f"{row.label} for {row.file} in row {row.number}"
            hint = "leave the cell empty to leave the image out"
            raise invalid(str(path), "a table of classes", found=found, hint=hint)
    if whole := whole_numbers(labels):
        return [replace(row, label=whole.get(row.label, "")) for row in rows]
    if not all(map(_NUMBER.fullmatch, labels)):
        return rows
    fractions = [label for label in labels if not _WHOLE.fullmatch(label)]
    different = len(set(labels))
    if len(labels) >= _FEWEST_MEASURED and 2 * different > len(labels):
        found = f"{different} different numbers in {len(labels)} rows, such as {fractions[0]}"
        raise invalid(str(path), "a table of classes", found=found, hint="measured values cannot be learned")
    return rows


def read_cells(path: Path) -> list[list[str]]:
    """Read the cells of a table, those of the names of columns first.

    Raises:
        ValueError: the table is damaged.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "sizes.csv").write_text("file;width\\n1.png;8\\n")
        ...     read_cells(Path(folder, "sizes.csv"))
        [['file', 'width'], ['1.png', '8']]
    """
    if path.suffix.lower() == ".parquet":
        return _read_parquet_cells(path)
    content = path.read_bytes()
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as Excel may export it
            text = content.decode("utf-16")
        else:
            text = content.decode("utf-8-sig", errors="surrogateescape")
        file = io.StringIO(text, newline="")
        separator = max(",;\t", key=file.readline().count)
        file.seek(0)
        return list(csv.reader(file, delimiter=separator))
    except (csv.Error, UnicodeDecodeError) as error:
        raise invalid(str(path), "a table of labels", found=f"damaged content ({error})") from error


def _read_parquet_cells(path: Path) -> list[list[str]]:
    with extra("train", "a parquet file"):
        from pyarrow import ArrowException, types
        from pyarrow.parquet import read_table
    try:
        table = read_table(path)
    except (OSError, ArrowException) as error:
        found = f"damaged content ({first_line(error)})"
        raise invalid(str(path), "a table of labels", found=found) from error
    for column in table.schema:
        if types.is_struct(column.type) or types.is_binary(column.type):
            found = f"values of type {column.type} in the column {column.name}"
            hint = "if these are images, give the folder of the file"
            raise invalid(str(path), "a table of paths and labels", found=found, hint=hint)
    read = {SPLIT_COLUMN, *FILE_COLUMNS, *LABEL_COLUMNS}
    for column in table.schema:
        if types.is_nested(column.type) and (column.name.casefold() in read or len(table.schema) == 2):
            found = f"values of type {column.type} in the column {column.name}"
            raise invalid(str(path), "a table of one path and one label per row", found=found)
    columns = [["" if value is None else str(value) for value in column.to_pylist()] for column in table]
    return [table.column_names, *map(list, zip(*columns, strict=True))]


def read_columns(path: Path) -> list[list[str]]:
    """Read all columns of a table of any content, each with its name first; none if it is damaged.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "sizes.csv").write_text("file,width\\n1.png,8\\n2.png\\n")
        ...     read_columns(Path(folder, "sizes.csv"))
        [['file', '1.png', '2.png'], ['width', '8', '']]
    """
    try:
        lines = read_cells(path)
    except ValueError:
        return []
    return [list(cells) for cells in zip_longest(*lines, fillvalue="")]


def says_labels(table: Path) -> bool:
    """Return whether a table says that it holds labels, by its name or by the name of a column.

    Example:
        >>> says_labels(Path("train_labels.csv"))
        True
    """
    if set(re.split(r"[^a-z]+", table.stem.casefold())) & _OF_LABELS:
        return True
    return any(name.strip().casefold() in LABEL_COLUMNS for name, *_ in read_columns(table))


def class_name(name: str) -> str:
    """Return the name of a class as text, in one Unicode form (NFC): names that look the same are the same.

    Example:
        >>> class_name("rose\\u0301 ") == class_name("ros\\xe9")
        True
    """
    text = unicodedata.normalize("NFC", as_text(name))
    return text.strip() or text


def _row(cells: Sequence[str], columns: Columns, number: int) -> Row:
    split = None if columns.split is None else cells[columns.split].strip()
    return Row(cells[columns.file].strip(), class_name(cells[columns.label]).strip(), split, number)


class ImageIndex:
    """Finds images by the names that tables give them: a path, a file's name, or that without its suffix.

    Args:
        images: the images.
        folders: folders that paths may be relative to.

    Example:
        >>> index = ImageIndex(["pets/a/1.png", "pets/b/2.png"], [Path("pets")])
        >>> [index.find(name) for name in ("a/1.png", "other/2.png", "2", "3")]
        [['pets/a/1.png'], ['pets/b/2.png'], ['pets/b/2.png'], []]
    """

    def __init__(self, images: Iterable[str], folders: Sequence[Path]) -> None:
        self._folders = [inside(folder) for folder in folders]
        self._paths = {_normal(image): image for image in sorted(set(images), key=path_order)}
        self._by_name: dict[str, list[str]] = {}
        for path, image in self._paths.items():
            name = path[path.rfind(os.sep) + 1 :]
            for key in {name, name.rpartition(".")[0]}:
                self._by_name.setdefault(key, []).append(image)

    def find(self, name: str) -> list[str]:
        """Return the images that a name can stand for; one at most if it is a path."""
        path = PurePosixPath(_normal(name.replace("\\", "/")))
        for folder in self._folders:
            if image := self._paths.get(os.path.join(_normal(folder), path)):
                return [image]
        return self._by_name.get(path.name, [])


class FileIndex:
    """Finds files by their paths alone.

    Args:
        folder: what paths are relative to.

    Example:
        >>> FileIndex(Path("no such folder")).find("1.png")
        []
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, name: str) -> list[str]:
        """Return the file of a path; none if it does not exist."""
        path = os.path.normpath(os.path.join(self._folder, name.replace("\\", "/")))
        return [path] if os.path.isfile(path) else []


def _normal(name: str) -> str:
    """Return a name in the Unicode form in which all spellings of it are equal."""
    return unicodedata.normalize("NFC", name)


@dataclass(frozen=True)
class Match:
    """A table and the images that it names.

    Attributes:
        table: the table.
        rows: image → its row, of the images that have a label.
        missing: number of rows whose image does not exist.
        unlabelled: the images whose row has no label.
        repeated: number of rows whose image an earlier row names.
    """

    table: Path
    rows: dict[str, Row]
    missing: int
    unlabelled: set[str] = field(default_factory=set)
    repeated: int = 0


def match_rows(table: Path, rows: Iterable[Row], index: ImageIndex | FileIndex) -> Match:
    """Find the images that a table names.

    Raises:
        ValueError: an image has two labels or splits, or a name is that of several images.

    Example:
        >>> index = ImageIndex(["1.png"], [Path(".")])
        >>> match = match_rows(Path("labels.csv"), [Row("1", "cat"), Row("2", "dog")], index)
        >>> [row.label for row in match.rows.values()], match.missing
        (['cat'], 1)
    """
    found: dict[str, Row] = {}
    unlabelled: set[str] = set()
    missing = named = 0
    for row in rows:
        images = index.find(row.file)
        named += len(images)
        if len(images) > 1:
            expected = "a table whose file names are each of one image"
            several = f"{row.file} for {images[0]} and {images[1]}"
            raise invalid(str(table), expected, found=several, hint="name their folders, too")
        if not images:
            missing += 1
        elif not row.label:
            unlabelled.add(images[0])
        elif (earlier := found.setdefault(images[0], row)).label != row.label:
            labels = f"{earlier.label} and {row.label} for {row.file}"
            raise invalid(str(table), "a table with one label per image", found=labels)
        elif earlier.split != row.split:
            splits = f"{earlier.split or 'none'} and {row.split or 'none'} for {row.file}"
            raise invalid(str(table), "a table with one split per image", found=splits)
    repeated = named - len(found.keys() | unlabelled)
    return Match(table, found, missing, unlabelled - found.keys(), repeated)
