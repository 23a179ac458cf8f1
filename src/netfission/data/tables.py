"""The tables of labels in a folder: which images they name, and why one is not used."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from netfission.data.files import FileTree, inside
from netfission.data.label_files import (
    ImageIndex,
    Match,
    Row,
    class_name,
    match_rows,
    read_columns,
    read_label_file,
    says_labels,
)
from netfission.data.split_names import SplitName, splits_in
from netfission.utils.errors import invalid
from netfission.utils.text import count_noun

TABLE_SUFFIXES = (".csv", ".tsv")
_CELLS = 1000  # of a column that are looked up to see whether it names images
_MOST = 0.5  # a table whose column names images by more than this share is one of these images


class Tables:
    """The tables of labels in a folder.

    Args:
        folder: the folder.
        images: the folder of the images that they may name; default the same. Of another folder, only tables
            with usual names count.
        tree: lists the folder of the images; default a new one.

    Attributes:
        paths: the tables that may be meant.
        fitting: table → rows, of those with columns of files and labels.
        refused: table → why it cannot be used.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Path(folder, "1.png").touch()
        ...     _ = Path(folder, "labels.csv").write_text("file,label\\n1.png,cat\\n")
        ...     [match] = Tables(Path(folder)).match_all()
        >>> [row.label for row in match.rows.values()]
        ['cat']
    """

    def __init__(self, folder: Path, images: Path | None = None, tree: FileTree | None = None) -> None:
        self.folder = folder
        self.images = images or folder
        self.tree = tree or FileTree()
        # Names first: a `Path` for each file takes most of the time of a large folder.
        names = sorted(name for name in os.listdir(folder) if name.lower().endswith(TABLE_SUFFIXES))
        named = (folder / name for name in names)
        self.paths = [path for path in named if is_table(path) and self._may_be_meant(path)]
        self.fitting: dict[Path, list[Row]] = {}
        self.refused: dict[Path, ValueError] = {}
        for path in self.paths:
            try:
                self.fitting[path] = read_label_file(path)
            except ValueError as error:
                self.refused[path] = error

    def _may_be_meant(self, table: Path) -> bool:
        if self.images == self.folder:
            return True
        # Other tables that lie beside a folder of images have nothing to do with it.
        return table.stem.casefold() in ("labels", "metadata", self.images.name.casefold()) or bool(
            splits_in(table.stem)
        )

    def match_all(self) -> list[Match]:
        """Match all tables with the images."""
        return self._match(self.fitting, self.images)

    def match(self, split: SplitName, folder: Path, *, general: bool = True) -> list[Match]:
        """Match the tables that belong to a split by their names, or else, if `general`, those of no split.

        Args:
            split: the split.
            folder: where its images are; only those are returned.
            general: whether tables of no split count.
        """
        named = [table for table in self.fitting if split in splits_in(table.stem)]
        if (matches := self._match(named, folder)) or not general:
            return matches
        unnamed = [table for table in self.fitting if not splits_in(table.stem)]
        # One table of all splits: a name must be that of one image in all of them.
        matches = self._match(unnamed, self.images)
        below = [replace(match, rows=_only_below(folder, match.rows)) for match in matches]
        return [match for match in below if match.rows]

    def _match(self, tables: Collection[Path], folder: Path) -> list[Match]:
        if not tables:
            return []
        index = ImageIndex(self.tree.images(folder).images, [self.folder, folder])
        matches = []
        for table in tables:
            try:
                matches.append(match_named(table, self.fitting[table], index, folder))
            except ValueError as error:
                self.refused[table] = error
        return matches

    def why_refused(self) -> ValueError | None:
        """Return why a table cannot be used, preferably one that says that it holds labels."""
        tables = sorted(self.refused, key=lambda table: not says_labels(table))
        return self.refused[tables[0]] if tables else None


def is_table(path: Path) -> bool:
    """Return whether a path is that of a table that may hold labels.

    Example:
        >>> is_table(Path("no such file.csv"))
        False
    """
    # Competitions have a sample_submission.csv with invented labels.
    return (
        path.suffix.lower() in TABLE_SUFFIXES and not path.name.startswith((".", "sample")) and path.is_file()
    )


def match_named(table: Path, rows: Sequence[Row], index: ImageIndex, folder: Path) -> Match:
    """Match a table with the images below a folder.

    Raises:
        ValueError: it names none of them, or see `match_rows`.
    """
    match = match_rows(table, rows, index)
    if not match.rows:
        unlabelled = count_noun(len(match.unlabelled), "image") + " without a label"
        found = unlabelled if match.unlabelled else f"{count_noun(match.missing, 'file')} elsewhere"
        raise invalid(str(table), f"a table that names images below {folder}", found=found)
    return match


def _only_below(folder: Path, rows: Mapping[str, Row]) -> dict[str, Row]:
    return {image: row for image, row in rows.items() if image.startswith(inside(folder))}


def why_unread(table: Path) -> str:
    """Return why a table holds no labels; empty if it does.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "test.csv").write_text("file,label\\n1.png,8\\n")
        ...     why_unread(Path(folder, "test.csv"))
        ''
    """
    try:
        read_label_file(table)
    except ValueError as error:
        return _reason(error, table)
    return ""


def why_unused(table: Path, labels: Mapping[str, str], folder: Path) -> str:
    """Return why a table is not used beside class folders; empty if it agrees with them and is complete.

    Args:
        table: the table.
        labels: image → name of its class folder.
        folder: the folder of these images.

    Raises:
        ValueError: the table looks as if it held labels of the images, but contradicts the folders or cannot
            be used; without two classes, also if it looks so in part.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     table = Path(folder, "old.csv")
        ...     _ = table.write_text("file,label\\n1.png,cat\\n")
        ...     why_unused(table, {"a/7.png": "a", "b/8.png": "b"}, Path("."))
        'it must be a table that names images below ., got 1 file elsewhere'
    """
    index = ImageIndex(labels, [table.parent, folder])
    columns = read_columns(table)
    named = max((_names_images(column, index) for column in columns), default=0)
    if named and (agreement := _agreement(columns, index, labels)) is not None:
        return agreement
    several = len(set(labels.values())) > 1
    error = _why_not_labels(table, index, folder)
    if error is None:
        return "it gives all images one label"
    is_meant = (named > _MOST, says_labels(table))
    if all(is_meant) if several else any(is_meant):
        raise error
    return _reason(error, table)


def _reason(error: ValueError, table: Path) -> str:
    """Return an error about a table without the table's path."""
    return "it " + str(error).removeprefix(f"{table} ")


def _names_images(column: Sequence[str], index: ImageIndex) -> float:
    """Return the share of cells that name an image; a bare number may stand for one image alone."""
    cells = column[1 : 1 + _CELLS] or column
    return sum(_names_image(cell.strip(), index) for cell in cells) / max(1, len(cells))


def _names_image(cell: str, index: ImageIndex) -> bool:
    images = index.find(cell) if cell else []
    return len(images) == 1 or (len(images) > 1 and cell.endswith(os.path.splitext(images[0])[1]))


def _agreement(columns: Sequence[Sequence[str]], index: ImageIndex, labels: Mapping[str, str]) -> str | None:
    """Say what a column of the images' classes lacks, or that it renames them; None without such a column."""
    files = max(columns, key=lambda column: _names_images(column, index))
    named = [name.strip() for name in files[1:]]
    found = [images[0] if len(images) == 1 else None for images in map(index.find, named)]
    renamed = None
    for column in columns:
        cells = {
            image: class_name(cell)
            for image, cell in zip(found, column[1:], strict=True)
            if image is not None and cell.strip()
        }
        pairs = {(labels[image], cell) for image, cell in cells.items()}
        if column is files or not pairs:
            continue
        if all(name.casefold() == cell.casefold() for name, cell in pairs):
            nowhere = [name for name in named if name and not index.find(name)]
            return _incomplete(len(cells), len(labels), nowhere)
        if renames_classes(pairs):
            renamed = "it gives the class folders other names"
    return renamed


def _incomplete(labelled: int, images: int, nowhere: Sequence[str]) -> str:
    """Say how many images an agreeing table labels, and how many of its rows name none; empty if all."""
    reasons = [f"it agrees with the folders, and labels {labelled:,} of {count_noun(images, 'image')}"]
    if nowhere:
        reasons.append(f"{count_noun(len(nowhere), 'row')} without an image, such as {nowhere[0]}")
    return "; ".join(reasons) if nowhere or labelled < images else ""


def renames_classes(pairs: Collection[tuple[str, str]]) -> bool:
    """Return whether pairs of a class and a label give each class a label of its own, and not another's name.

    Example:
        >>> renames_classes({("001", "cat"), ("002", "dog")})
        True
        >>> renames_classes({("cat", "dog"), ("dog", "cat")})
        False
    """
    classes, labels = ({pair[side] for pair in pairs} for side in (0, 1))
    is_one_to_one = len(pairs) == len(classes) == len(labels) > 1
    return is_one_to_one and all(label == name or label not in classes for name, label in pairs)


def _why_not_labels(table: Path, index: ImageIndex, folder: Path) -> ValueError | None:
    """Return why a table does not hold the labels of class folders; None if it has one label alone."""
    try:
        match = match_named(table, read_label_file(table), index, folder)
    except ValueError as error:
        return error
    if len({row.label for row in match.rows.values()}) == 1:
        return None
    expected = "a table that agrees with the class folders"
    return invalid(str(table), expected, found="other labels", hint="rename or remove it")
