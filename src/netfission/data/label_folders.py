"""Folders of labels: an image has the label of each folder that it is in.

A folder holds `LABEL/*`, or `SPLIT/LABEL/*`. An image that has several labels is in several folders under
one name, as a copy or a link. Images without any label are in the folder `no-label`. In place of folders of
labels, the folder of each split may hold one table, such as Roboflow's `_classes.csv`.
"""

import filecmp
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from netfission.data.class_folders import check_names
from netfission.data.files import FileTree, inside, path_order
from netfission.data.folders import FolderContents, LabelledImages, read_rows
from netfission.data.label_files import TABLE_FILES, TargetRows, class_name, find_file_column, read_cells
from netfission.data.split_names import SplitName, assign_splits, may_be_split, split_of
from netfission.utils.errors import did_you_mean, invalid
from netfission.utils.text import count_noun, printable

NO_LABEL = "no-label"
# Names that may mean that no label applies, or that nobody has looked.
_UNCLEAR = {"none", "no-class", "nolabel", "unknown", "unlabeled", "unlabelled"}
_LAYOUT = "a folder with one folder per label, or with train/LABEL"

Files = dict[str, list[tuple[str, str]]]  # name within a folder of a label → (label, path) of each copy


@dataclass(frozen=True)
class LabelledFolder:
    """What a folder of images with several labels holds.

    Attributes:
        names: of the labels.
        contents: the images: `LabelledImages.labels` holds 1 or 0 for each label, with blanks between them.
        listed: see `TargetRows`; folders of labels list them, too.
        unread: see `TargetRows`.
    """

    names: list[str]
    contents: FolderContents
    listed: bool
    unread: list[str] = field(default_factory=list)


class FolderReader(Protocol):
    """Reads a folder as `read_label_folders` does."""

    def __call__(
        self, folder: Path, read: Callable[[Path], TargetRows], *, train_required: bool
    ) -> LabelledFolder:
        """Return the names of targets, and the images."""


def read_label_folders(
    folder: Path, read: Callable[[Path], TargetRows], *, train_required: bool = True
) -> LabelledFolder:
    """Find the labels, splits and images of a folder of label folders, or of a table in each split.

    Args:
        folder: the folder.
        read: reads a table of labels.
        train_required: refuse a folder of other splits without a training split.

    Raises:
        ValueError: the folder has another layout, two files of one name differ, or one of them is a broken
            link, an image is in `no-label` and in another folder, a split has a label that the training split
            lacks, or tables have other columns of labels than one another.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from netfission.data.targets import read_labels
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("bus/1.png", "car/1.png", "car/2.png", "no-label/3.png"):
        ...         Path(folder, name).parent.mkdir(exist_ok=True)
        ...         Path(folder, name).touch()
        ...     found = read_label_folders(Path(folder), read_labels)
        >>> found.names, list(found.contents.splits["train"].labels.values())
        (['bus', 'car'], ['1 1', '0 1', '0 0'])
    """
    tree = FileTree()
    root = _look_through(tree, folder)
    folders = _split_folders(tree, root, train_required)
    tables, unused_tables = _choose_tables(tree, folders)
    if any(tables.values()):
        names, splits, listed, unread = _read_tables(folders, tables, read)
    else:
        names, splits = _read_folders(tree, folders)
        listed, unread = True, []
    images = tree.images(root)
    used = {image for part in splits.values() for image in part.labels}
    reasons = images.counts()
    if not any(tables.values()):  # copies are in use, too, though the image is read once
        inside_splits = (tree.images(path).images for path in folders.values())
        used = {image for found in inside_splits for image in found}
    reasons["without a label or split"] = len(set(images.images) - used)
    unused = {
        name: "not the name of a split; rename it to val or test to use it"
        for name in tree.subfolders(root)
        if root not in folders.values() and root / name not in folders.values()
    }
    if root not in folders.values():
        own = "the folders of splits say the labels; pass the table itself to use it"
        unused |= {path.name: own for path in _tables(tree, root)}
    unused |= {str(path.relative_to(root)): reason for path, reason in unused_tables.items()}
    left_out = {reason: count for reason, count in reasons.items() if count}
    return LabelledFolder(names, FolderContents(root, splits, left_out, unused), listed, unread)


def _look_through(tree: FileTree, folder: Path) -> Path:
    """Return the folder inside a folder that holds nothing else, and so on, down to splits or labels."""
    inner = tree.subfolders(folder)
    alone = len(inner) == 1 and split_of(inner[0]) is None and not _tables(tree, folder)
    if not alone or not tree.subfolders(folder / inner[0]):
        return folder
    return _look_through(tree, folder / inner[0])


def _tables(tree: FileTree, folder: Path) -> list[Path]:
    """Return the tables in a folder itself."""
    paths = (Path(path) for path in tree.files(folder))
    return [path for path in paths if path.suffix.lower() in TABLE_FILES and path.parent == folder]


def _split_folders(tree: FileTree, folder: Path, train_required: bool) -> dict[SplitName, Path]:
    """Return the folder of each split; that of all as the training split, if its folders are labels."""
    inner = tree.subfolders(folder)
    named = [name for name in inner if split_of(name)]
    if not any(tree.subfolders(folder / name) or _tables(tree, folder / name) for name in named):
        return {"train": folder}
    others = [name for name in inner if not may_be_split(name) and tree.images(folder / name).images]
    alone = sum(map(may_be_split, inner)) == 1
    if alone and others and not _tables(tree, folder / named[0]):
        found = f"{named[0]}, which may be a label or a split, beside {printable(others[0])}"
        hint = f"if {named[0]} is a label, rename it; if it is a split, move other folders elsewhere"
        raise invalid(printable(folder), "a folder of labels or of splits", found=found, hint=hint)
    # Beside other folders, one by the name of a split may be anything.
    required = train_required or len(named) < len(inner)
    assigned = assign_splits(inner, str(folder), train_required=required)
    return {split: folder / name for split, name in assigned.items()}


def _choose_tables(
    tree: FileTree, folders: Mapping[SplitName, Path]
) -> tuple[dict[SplitName, list[Path]], dict[Path, str]]:
    """Return the tables of labels in the folder of each split, and why others are not used.

    Folders of labels say the labels if not all splits have a table that names files.
    """
    found = {split: _tables(tree, path) for split, path in folders.items()}
    inner = [tree.subfolders(path) for path in folders.values()]
    nameless = {table for paths in found.values() for table in paths if not _names_files(table)}
    tables = {split: [table for table in paths if table not in nameless] for split, paths in found.items()}
    if not any(tables.values()) and not any(inner):
        return found, {}
    unused = dict.fromkeys(sorted(nameless), "it has no column of file names")
    several = all(inner) and len(set().union(*inner)) > 1
    if several and not all(tables.values()):
        reason = "the folders beside it say the labels; pass the table itself to use it"
        unused = {table: reason for paths in tables.values() for table in paths} | unused
        tables = {split: [] for split in folders}
    return tables, unused


def _names_files(table: Path) -> bool:
    """Whether a table can be read and has a column of file names."""
    try:
        find_file_column((read_cells(table) or [[]])[0], str(table))
    except ValueError:
        return False
    return True


def _read_tables(
    folders: Mapping[SplitName, Path],
    tables: Mapping[SplitName, Sequence[Path]],
    read: Callable[[Path], TargetRows],
) -> tuple[list[str], dict[SplitName, LabelledImages], bool, list[str]]:
    """Read one table in the folder of each split, or that of all splits in the folder itself."""
    for split, paths in tables.items():
        if len(paths) != 1:
            tables_found = ", ".join(printable(path.name) for path in paths) or "none"
            others = [table for other, found in tables.items() if other != split for table in found]
            like = [f" like {printable(table.name)} in {printable(table.parent.name)}" for table in others]
            expected = f"a folder with one table of labels{''.join(like[:1])}"
            hint = "pass the table itself, or move others elsewhere"
            raise invalid(printable(folders[split]), expected, found=tables_found, hint=hint)
    read_tables = {split: read(table) for split, (table,) in tables.items()}
    names = _names_of(read_tables)
    splits: dict[SplitName, LabelledImages] = {}
    for split, (table,) in tables.items():
        found = read_tables[split]
        _check_table(table, found, names)
        rows = [replace(row, label=_ordered(row.label, found.names, names)) for row in found.rows]
        if len(tables) == 1:
            splits |= read_rows(table, rows, train_required=False).splits
        else:
            of_split = [replace(row, split=None) for row in rows]
            splits[split] = read_rows(table, of_split).splits["train"]
    remark = f"the labels are those of {printable(next(iter(tables.values()))[0].name)}"
    parts = {split: replace(part, remarks=[remark]) for split, part in splits.items()}
    unread = dict.fromkeys(name for found in read_tables.values() for name in found.unread)
    return names, parts, all(found.listed for found in read_tables.values()), list(unread)


def _names_of(tables: Mapping[SplitName, TargetRows]) -> list[str]:
    """Return the labels of training, or else of all tables."""
    if "train" in tables:
        return tables["train"].names
    names = list(dict.fromkeys(name for found in tables.values() for name in found.names))
    return sorted(names) if all(found.listed for found in tables.values()) else names


def _check_table(table: Path, found: TargetRows, names: Sequence[str]) -> None:
    """Refuse a table with other labels; one that lists the labels of each image need not have all."""
    where = printable(table)
    unknown = sorted(set(found.names) - set(names))
    if found.listed and unknown:
        expected = f"a table of the {len(names)} labels of training images"
        raise invalid(where, expected, found=printable(unknown[0]), hint=did_you_mean(unknown[0], names))
    if not found.listed and set(names) != set(found.names):
        other = sorted(set(names) ^ set(found.names))[0]
        expected = "a table of the labels of other splits"
        raise invalid(where, expected, found=f"a difference in {printable(other)}")


def _ordered(label: str, own: Sequence[str], names: Sequence[str]) -> str:
    """Return the numbers of a row of labels `own` for `names`; 0 for a label that its table lacks."""
    numbers = dict(zip(own, label.split(), strict=True))
    return " ".join(numbers.get(name, "0") for name in names)


def _read_folders(
    tree: FileTree, folders: Mapping[SplitName, Path]
) -> tuple[list[str], dict[SplitName, LabelledImages]]:
    """Read the folders of labels in the folder of each split."""
    found = {split: _read_split(tree, path) for split, path in folders.items()}
    labels = found["train"][0] if "train" in found else set().union(*(part for part, _ in found.values()))
    names = sorted(labels)
    if not names:
        raise invalid(printable(next(iter(folders.values()))), _LAYOUT, found="no folder of a label")
    for split, (_, files) in found.items():
        _check_known(folders[split], split, files, names)
    return names, {split: _labelled(folders[split], files, names) for split, (_, files) in found.items()}


def _read_split(tree: FileTree, folder: Path) -> tuple[set[str], Files]:
    """Return the labels of a split, and its files."""
    inner = tree.subfolders(folder)
    if not inner:
        raise invalid(printable(folder), _LAYOUT, found="no folder in it")
    check_names(folder, inner)
    loose = [path for path in tree.images(folder).images if os.path.dirname(path) == str(folder)]
    if loose:
        found = f"{printable(os.path.basename(loose[0]))} beside the folders"
        hint = f"put images without any label into {NO_LABEL}"
        raise invalid(printable(folder), "a folder whose images are in folders", found=found, hint=hint)
    labels: set[str] = set()
    files: Files = {}
    for name in inner:
        label = _label(folder / name)
        labels |= {label} - {""}
        start = len(inside(folder / name))
        for path in tree.images(folder / name).images:
            files.setdefault(path[start:], []).append((label, path))
    if not files:
        raise invalid(printable(folder), _LAYOUT, found="no image in its folders")
    _check_links(tree, folder, files)
    for name, copies in files.items():
        _check_copies(folder, name, copies)
    return labels, files


def _check_links(tree: FileTree, folder: Path, files: Files) -> None:
    """Refuse a broken link to an image that is read in another folder, which would lose a label."""
    for path in tree.images(folder).left_out.get("missing", []):
        link = path[len(inside(folder)) :]
        if link.partition(os.sep)[2] in files:
            expected = "a folder of images that can be read"
            hint = "restore the file that it links to, or remove the link if the image lacks the label"
            raise invalid(printable(folder), expected, found=f"broken link {printable(link)}", hint=hint)


def _label(folder: Path) -> str:
    """Return the label that a folder stands for; empty for that of images without any."""
    name = class_name(folder.name)
    plain = re.sub(r"[\s_-]+", "-", name.casefold())
    if plain in (NO_LABEL, f"{NO_LABEL}s"):
        return ""
    if plain in _UNCLEAR:
        hint = f"rename it to {NO_LABEL} if none of the labels applies to its images, else move it elsewhere"
        raise invalid(printable(folder), "a folder with the name of a label", found=name, hint=hint)
    return name


def _check_copies(folder: Path, name: str, copies: Sequence[tuple[str, str]]) -> None:
    """Refuse files of one name that are not one image, and an image with and without labels."""
    where = printable(folder)
    (first, original), *others = copies
    for label, path in others:
        if (first == "") != (label == ""):
            found = f"{printable(name)} in {NO_LABEL} and in {printable(first or label)}"
            raise invalid(where, "a folder whose images have labels or none", found=found)
        if not _equal(original, path):
            found = f"{printable(name)} with other content in {printable(first or NO_LABEL)}"
            found += f" and in {printable(label or NO_LABEL)}"
            hint = "give different images different names; if each has one label, leave out the task"
            raise invalid(where, "a folder whose files of one name are one image", found=found, hint=hint)


def _equal(file: str, other: str) -> bool:
    """Whether two files have the same content; links to one file need not be read."""
    try:
        return os.path.samefile(file, other) or filecmp.cmp(file, other, shallow=False)
    except OSError:  # reading the image reports it
        return True


def _labelled(folder: Path, files: Files, names: Sequence[str]) -> LabelledImages:
    """Return the images of a split with a number for each label, and what should be known of them."""
    labels = {}
    for copies in files.values():
        own = {label for label, _ in copies}
        labels[copies[0][1]] = " ".join(str(int(name in own)) for name in names)
    return LabelledImages(
        folder,
        dict(sorted(labels.items(), key=lambda item: path_order(item[0]))),
        remarks=list(_remarks(folder, files)),
    )


def _remarks(folder: Path, files: Files) -> Iterator[str]:
    several, where = (
        sum(len({label for label, _ in copies}) > 1 for copies in files.values()),
        printable(folder.name),
    )
    if several:
        yield f"{several:,} of {count_noun(len(files), 'image')} in {where} have several labels"
    else:
        yield f"no image in {where} is in two folders: if each has one label, leave out the task"


def _check_known(folder: Path, split: SplitName, files: Files, names: Sequence[str]) -> None:
    """Refuse a split whose images have a label that the training split lacks."""
    unknown = sorted({label for copies in files.values() for label, _ in copies} - {*names, ""})
    if unknown:
        raise invalid(
            printable(folder),
            f"a folder whose {split} images have the {len(names)} labels of training images",
            found=printable(unknown[0]),
            hint=did_you_mean(unknown[0], names),
        )
