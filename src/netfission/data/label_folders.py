"""Folders of labels: an image has the label of each folder that it is in.

A folder holds `LABEL/*`, or `SPLIT/LABEL/*`. An image that has several labels is in several folders under
one name, as a copy or a link. Images without any label are in the folder `no-label`. In place of folders of
labels, the folder of each split may hold one table, such as Roboflow's `_classes.csv`.
"""

import filecmp
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from netfission.data.class_folders import check_names
from netfission.data.files import FileTree, inside, path_order
from netfission.data.folders import FolderContents, LabelledImages, read_rows
from netfission.data.label_files import TABLE_FILES, TargetRows, class_name
from netfission.data.split_names import SplitName, assign_splits, split_of
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
    """

    names: list[str]
    contents: FolderContents
    listed: bool


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
        ValueError: the folder has another layout, two files of one name differ, an image is in `no-label` and
            in another folder, a split has a label that the training split lacks, or tables have other labels
            than one another.

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
    tables = {split: _tables(tree, path) for split, path in folders.items()}
    if any(tables.values()):
        names, splits, listed = _read_tables(folders, tables, read)
    else:
        names, splits = _read_folders(tree, folders)
        listed = True
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
    left_out = {reason: count for reason, count in reasons.items() if count}
    return LabelledFolder(names, FolderContents(root, splits, left_out, unused), listed)


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
    # Beside other folders, one by the name of a split may be anything.
    required = train_required or len(named) < len(inner)
    assigned = assign_splits(inner, str(folder), train_required=required)
    return {split: folder / name for split, name in assigned.items()}


def _read_tables(
    folders: Mapping[SplitName, Path],
    tables: Mapping[SplitName, Sequence[Path]],
    read: Callable[[Path], TargetRows],
) -> tuple[list[str], dict[SplitName, LabelledImages], bool]:
    """Read one table in the folder of each split, or that of all splits in the folder itself."""
    for split, paths in tables.items():
        if len(paths) != 1:
            tables_found = ", ".join(printable(path.name) for path in paths) or "none"
            expected = "a folder with one table of labels, as other splits have it"
            hint = "pass the table itself, or move others elsewhere"
            raise invalid(printable(str(folders[split])), expected, found=tables_found, hint=hint)
    names: list[str] = []
    splits: dict[SplitName, LabelledImages] = {}
    for split, (table,) in tables.items():
        found = read(table)
        names = names or found.names
        if set(names) != set(found.names):
            other = sorted(set(names) ^ set(found.names))[0]
            expected = "a table of the labels of other splits"
            raise invalid(printable(str(table)), expected, found=f"a difference in {printable(other)}")
        order = [found.names.index(name) for name in names]
        rows = [replace(row, label=_ordered(row.label, order)) for row in found.rows]
        if len(tables) == 1:
            splits |= read_rows(table, rows, train_required=False).splits
        else:
            of_split = [replace(row, split=None) for row in rows]
            splits[split] = read_rows(table, of_split).splits["train"]
    remark = f"the labels are those of {printable(next(iter(tables.values()))[0].name)}"
    parts = {split: replace(part, remarks=[remark]) for split, part in splits.items()}
    return names, parts, found.listed


def _ordered(label: str, order: Sequence[int]) -> str:
    numbers = label.split()
    return " ".join(numbers[place] for place in order)


def _read_folders(
    tree: FileTree, folders: Mapping[SplitName, Path]
) -> tuple[list[str], dict[SplitName, LabelledImages]]:
    """Read the folders of labels in the folder of each split."""
    found = {split: _read_split(tree, path) for split, path in folders.items()}
    labels = found["train"][0] if "train" in found else set().union(*(part for part, _ in found.values()))
    names = sorted(labels)
    if not names:
        raise invalid(printable(str(next(iter(folders.values())))), _LAYOUT, found="no folder of a label")
    for split, (_, files) in found.items():
        _check_known(folders[split], split, files, names)
    return names, {split: _labelled(folders[split], files, names) for split, (_, files) in found.items()}


def _read_split(tree: FileTree, folder: Path) -> tuple[set[str], Files]:
    """Return the labels of a split, and its files."""
    inner = tree.subfolders(folder)
    if not inner:
        raise invalid(printable(str(folder)), _LAYOUT, found="no folder in it")
    check_names(folder, inner)
    loose = [path for path in tree.images(folder).images if os.path.dirname(path) == str(folder)]
    if loose:
        found = f"{printable(os.path.basename(loose[0]))} beside the folders"
        hint = f"put images without any label into {NO_LABEL}"
        raise invalid(printable(str(folder)), "a folder whose images are in folders", found=found, hint=hint)
    labels: set[str] = set()
    files: Files = {}
    for name in inner:
        label = _label(folder / name)
        labels |= {label} - {""}
        start = len(inside(folder / name))
        for path in tree.images(folder / name).images:
            files.setdefault(path[start:], []).append((label, path))
    if not files:
        raise invalid(printable(str(folder)), _LAYOUT, found="no image in its folders")
    for name, copies in files.items():
        _check_copies(folder, name, copies)
    return labels, files


def _label(folder: Path) -> str:
    """Return the label that a folder stands for; empty for that of images without any."""
    name = class_name(folder.name)
    plain = re.sub(r"[\s_-]+", "-", name.casefold())
    if plain in (NO_LABEL, f"{NO_LABEL}s"):
        return ""
    if plain in _UNCLEAR:
        hint = f"rename it to {NO_LABEL} if none of the labels applies to its images, else move it elsewhere"
        raise invalid(printable(str(folder)), "a folder with the name of a label", found=name, hint=hint)
    return name


def _check_copies(folder: Path, name: str, copies: Sequence[tuple[str, str]]) -> None:
    """Refuse files of one name that are not one image, and an image with and without labels."""
    where = printable(str(folder))
    (first, original), *others = copies
    for label, path in others:
        if first == "" or label == "":
            found = f"{printable(name)} in {NO_LABEL} and in {printable(first or label)}"
            raise invalid(where, "a folder whose images have labels or none", found=found)
        if not _equal(original, path):
            found = f"{printable(name)} with other content in {printable(first)} and in {printable(label)}"
            hint = "give different images different names; if each has one label, leave out the task"
            raise invalid(where, "a folder whose files of one name are one image", found=found, hint=hint)


def _equal(file: str, other: str) -> bool:
    """Whether two files have the same content; links to one file need not be read."""
    try:
        return os.path.samefile(file, other) or filecmp.cmp(file, other, shallow=False)
    except OSError:  # which is told of where the image is read
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
    several, where = sum(len(copies) > 1 for copies in files.values()), printable(folder.name)
    if several:
        yield f"{several:,} of {count_noun(len(files), 'image')} in {where} have several labels"
    else:
        yield f"no image in {where} is in two folders: if each has one label, leave out the task"


def _check_known(folder: Path, split: SplitName, files: Files, names: Sequence[str]) -> None:
    """Refuse a split whose images have a label that the training split lacks."""
    unknown = sorted({label for copies in files.values() for label, _ in copies} - {*names, ""})
    if unknown:
        raise invalid(
            printable(str(folder)),
            f"a folder whose {split} images have the {len(names)} labels of training images",
            found=printable(unknown[0]),
            hint=did_you_mean(unknown[0], names),
        )
