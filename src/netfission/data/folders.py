"""What the folders of a data set of image files mean: its splits, its classes, its labels."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

from netfission.data.files import find_images, walk_files, why_not_entered
from netfission.data.label_files import ImageIndex, Match, Row, match_rows, read_label_file
from netfission.utils.errors import did_you_mean, invalid
from netfission.utils.text import as_text, count_noun

SplitName = Literal["train", "validation", "test"]
# Names of splits, in any case.
SPLIT_NAMES: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# Those that may be the name of a class: trains among vehicles, valid among invalid signatures.
_CLASSES_TOO = ("train", "valid")
# Parts of a data set for segmentation or detection, in lower case: they look like classes.
_IMAGE_PARTS = {"image", "images", "img", "imgs", "jpegimages"}
_LABEL_PARTS = {
    "annotation",
    "annotations",
    "ground_truth",
    "groundtruth",
    "gt",
    "label",
    "labels",
    "mask",
    "masks",
    "segmentation",
    "segmentationclass",
    "segmentationobject",
    "segmentations",
}
TABLE_SUFFIXES = (".csv", ".tsv")


@dataclass(frozen=True)
class LabelledImages:
    """The images of one split.

    Attributes:
        origin: the folder or table that says their classes.
        labels: image → name of its class.
        match: the table and what it names; None if folders say the classes.
    """

    origin: Path
    labels: dict[Path, str]
    match: Match | None = None


@dataclass(frozen=True)
class FolderContents:
    """The splits that a folder holds.

    Attributes:
        folder: the folder of the splits or classes, which may be below the one that was given.
        splits: at least `train`.
        left_out: reason → number of files and folders that are in no split.
    """

    folder: Path
    splits: dict[SplitName, LabelledImages]
    left_out: dict[str, int]

    @property
    def classes(self) -> list[str]:
        """Names of the classes of the training images, sorted."""
        return sorted(set(self.splits["train"].labels.values()))


def split_of(name: str) -> SplitName | None:
    """Return the split that a name stands for; None if it is not the name of a split.

    Example:
        >>> split_of("Training"), split_of("valid"), split_of("daisy")
        ('train', 'validation', None)
    """
    return next((split for split, names in SPLIT_NAMES.items() if name.casefold() in names), None)


def assign_splits(names: Iterable[str], where: str) -> dict[SplitName, str]:
    """Return which of some names stands for which split, training first.

    Without a test split, the validation split is the test split.

    Args:
        names: those that stand for no split are left out.
        where: name of the data set, for messages.

    Raises:
        ValueError: two names stand for one split, or none stands for the training split.

    Example:
        >>> assign_splits(["Test", "Training", "extra"], "here")
        {'train': 'Training', 'test': 'Test'}
        >>> assign_splits(["train", "val"], "here")
        {'train': 'train', 'test': 'val'}
    """
    found: dict[SplitName, str] = {}
    for name in names:
        split = split_of(name)
        if split is not None and found.setdefault(split, name) != name:
            raise invalid(where, f"a data set with one {split} split", found=f"{found[split]} and {name}")
    if "train" not in found:
        listed = ", ".join(names) or "none"
        raise invalid(where, "a data set with a train split", found=f"the splits {listed}")
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def test_name(names: Iterable[str]) -> str | None:
    """Return the name that stands for the test split, or else for the validation split; None without either.

    Example:
        >>> test_name(["train", "val"]), test_name(["train", "val", "Testing"]), test_name(["train"])
        ('val', 'Testing', None)
    """
    ranked = ((split_of(name), name) for name in names)
    found = {split: name for split, name in ranked if split in ("test", "validation")}
    return found.get("test") or found.get("validation")


def find_test_folder(folder: Path) -> Path:
    """Return the folder of the test split in a folder, see `test_name`; without one, the folder itself.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Path(folder, "Test").mkdir()
        ...     find_test_folder(Path(folder)).name
        'Test'
    """
    root = _look_through(folder)
    name = test_name(path.name for path in _subfolders(root))
    return root / name if name else root


def read_folder(folder: Path) -> FolderContents:
    """Find the splits, classes and images of a folder.

    Images are in one folder per class, or in any folder with their labels in a table, see `read_label_file`.
    Splits are folders with the names in `SPLIT_NAMES`, or are named by a table; they can be missing. A single
    folder inside the one given is looked through.

    Raises:
        ValueError: the folder has another layout, a class has no image, or a split has classes that the
            training split lacks.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("base/Train/cat/1.png", "base/Train/dog/2.png", "base/Test/dog/3.png"):
        ...         path = Path(folder, name)
        ...         path.parent.mkdir(parents=True, exist_ok=True)
        ...         path.touch()
        ...     contents = read_folder(Path(folder))
        >>> contents.classes, contents.folder.name, [len(split.labels) for split in contents.splits.values()]
        (['cat', 'dog'], 'base', [2, 1])
    """
    root = _look_through(folder)
    tables = _Tables(root)
    split_folders = _find_split_folders(root, tables)
    splits = _read_split_folders(split_folders, tables) if split_folders else _read_whole(root, tables)
    _check_disjoint(splits)
    contents = FolderContents(root, splits, _count_left_out(root, splits.values()))
    for split, part in splits.items():
        _check_classes(contents.classes, part, split)
    return contents


def _look_through(folder: Path, known: Collection[str] = ()) -> Path:
    """Return the folder inside a folder that holds nothing else, and so on, down to splits or classes.

    Args:
        folder: where to begin.
        known: names of classes, which are not looked through.
    """
    inside = _subfolders(folder)
    if len(inside) != 1 or not _subfolders(inside[0]):
        return folder
    name = inside[0].name
    begins_splits = split_of(name) not in (None, split_of(folder.name))
    if begins_splits or as_text(name) in known or _Tables(folder).match_all():
        return folder
    return _look_through(inside[0], known)


def _subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder that may hold data, sorted."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and why_not_entered(path) is None)
    return [path for path in inside if not _holds_outputs_alone(path)]


def _holds_outputs_alone(folder: Path) -> bool:
    """Whether the folder is one such as `runs`."""
    return next(walk_files(folder), None) is None and "written by netfission" in find_images(folder).left_out


def _find_split_folders(root: Path, tables: "_Tables") -> dict[SplitName, Path]:
    """Return the folder of each split; none if the folders are classes."""
    inside = _subfolders(root)
    named = [path.name for path in inside if split_of(path.name)]
    if not named:
        return {}
    alone = len(named) == 1 < len(inside) and named[0].casefold() in _CLASSES_TOO
    if alone and not _subfolders(root / named[0]) and not tables.match_all():
        return {}
    return {split: root / name for split, name in assign_splits(named, str(root)).items()}


def _read_split_folders(
    folders: Mapping[SplitName, Path], tables: "_Tables"
) -> dict[SplitName, LabelledImages]:
    """Read the folder of each split; one whose images have no labels is left out, but that of training."""
    splits: dict[SplitName, LabelledImages] = {}
    classes: set[str] = set()
    for split, folder in folders.items():
        inner_tables = _Tables(folder)
        matches = inner_tables.match_all() or tables.match(split, folder)
        part = _read_classes(_look_through(folder, classes), matches, at_least=1 if classes else 2)
        if part is not None:
            splits[split] = part
            classes |= set(part.labels.values())
        elif split == "train":
            raise _no_classes(folder, inner_tables, tables)
    return splits


def _read_whole(root: Path, tables: "_Tables") -> dict[SplitName, LabelledImages]:
    """Read a folder without folders of splits; a table may say which images are in which split."""
    above = _Tables(root.parent, images=root)
    matches = tables.match("train", root)
    if not matches and not _subfolders(root):
        matches = above.match("train", root)
    train = _read_classes(root, matches, at_least=2)
    if train is None:
        raise _no_classes(root, tables, above)
    if train.match is None:
        return {"train": train}
    if any(row.split for row in train.match.rows.values()):
        return _by_split_column(train.match)
    splits: dict[SplitName, LabelledImages] = {"train": train}
    others: tuple[SplitName, ...] = ("validation", "test")
    for split in others:
        if matches := tables.match(split, root, general=False):
            splits[split] = _from_table(matches)
    return splits


def _read_classes(folder: Path, matches: Sequence[Match], at_least: int) -> LabelledImages | None:
    """Read class folders if there are enough of them, else a table; None if there is neither.

    A table that gives several labels to the images of one folder is read, if it names all images.
    """
    inside = _subfolders(folder)
    if not inside or (matches and len(inside) < at_least):
        return _from_table(matches) if matches else None
    _check_class_names(folder, inside)
    found = {path.name: find_images(path) for path in inside}
    for name, below in found.items():
        if not below.images:
            reasons = ", ".join(f"{count} {reason}" for reason, count in below.counts().items())
            contents = f"no image file ({reasons})" if reasons else "no image file"
            raise invalid(str(folder / name), "a class folder with images", found=contents)
    by_class = {name: below.images for name, below in found.items()}
    for match in matches:
        if any(_contradicts(match, images) for images in by_class.values()):
            _check_complete(match, folder, sum(map(len, by_class.values())))
            return _from_table(matches)
    labels = {image: as_text(name) for name, images in by_class.items() for image in images}
    return LabelledImages(folder, labels)


def _from_table(matches: Sequence[Match]) -> LabelledImages:
    match, *others = matches
    if others:
        found = f"{match.table.name} and {others[0].table.name}"
        raise invalid(str(match.table.parent), "a folder with one table of labels", found=found)
    return LabelledImages(match.table, {image: row.label for image, row in match.rows.items()}, match)


def _by_split_column(match: Match) -> dict[SplitName, LabelledImages]:
    names = sorted({row.split for row in match.rows.values() if row.split})
    return {
        split: LabelledImages(
            match.table, {image: row.label for image, row in match.rows.items() if row.split == name}, match
        )
        for split, name in assign_splits(names, str(match.table)).items()
    }


def _check_class_names(folder: Path, inside: Sequence[Path]) -> None:
    """Refuse folders that are no classes by their names or content."""
    names = [path.name for path in inside]
    lower = {name.casefold() for name in names}
    images, labels = lower & _IMAGE_PARTS, lower & _LABEL_PARTS
    found = f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
    expected = "a folder with one folder per class, or with train/CLASS"
    if (images and labels) or (len(lower) > 1 and lower == images | labels):
        hint = "they look like parts of a data set for segmentation or detection"
        raise invalid(str(folder), expected, found=found, hint=hint)
    splits = set().union(*map(splits_in, names))
    if "train" in splits and len(splits) > 1:
        raise invalid(
            str(folder), expected, found=found, hint="rename the folders of splits to train and test"
        )
    if len(inside) > 1 and all(
        any(split_of(p.name) == "train" for p in _subfolders(path)) for path in inside
    ):
        hint = "give one of them, or put the classes inside the splits"
        raise invalid(str(folder), expected, found=f"a train folder in each of {found}", hint=hint)


def _contradicts(match: Match, images: Iterable[Path]) -> bool:
    """Whether a table gives several labels to the images of a class folder."""
    return len({match.rows[image].label for image in images if image in match.rows}) > 1


def _check_complete(match: Match, folder: Path, images: int) -> None:
    """Refuse a table that contradicts the class folders but names only a part of their images."""
    if unnamed := images - len(match.rows):
        table = match.table.name
        expected = f"a folder whose images all have a label in {table}"
        hint = f"the class folders contradict {table}: remove it, or complete it"
        raise invalid(str(folder), expected, found=f"{unnamed} without one", hint=hint)


def _no_classes(folder: Path, *tables: "_Tables") -> ValueError:
    """Return the error for images without classes: that of the first table that could not be used, if any."""
    if refused := [error for source in tables for error in source.refused]:
        return refused[0]
    layouts = "CLASS/* or train/CLASS/*, or with their labels in labels.csv"
    expected = f"a folder of parquet files, or of images as {layouts}"
    return invalid(str(folder), expected, found="no class folder")


def _check_disjoint(splits: Mapping[SplitName, LabelledImages]) -> None:
    """Refuse tables that put one image into two splits."""
    for (first, part), (second, other) in combinations(splits.items(), 2):
        if shared := sorted(part.labels.keys() & other.labels.keys()):
            found = f"{shared[0]} in the {first} and the {second} split"
            raise invalid(
                str(other.origin), "a table of other images than those of other splits", found=found
            )


def _check_classes(classes: Sequence[str], part: LabelledImages, split: SplitName) -> None:
    """Refuse a split with classes that the training split lacks."""
    unknown = sorted(set(part.labels.values()) - set(classes))
    if unknown:
        raise invalid(
            str(part.origin),
            f"a {split} split of the {len(classes)} training classes",
            found=f"{', '.join(unknown[:5])}{', …' if len(unknown) > 5 else ''} without training images",
            hint=did_you_mean(unknown[0], classes),
        )


def _count_left_out(root: Path, splits: Collection[LabelledImages]) -> dict[str, int]:
    """Count the files and folders that are in no split, by reason."""
    tables = {part.match.table: part.match.missing for part in splits if part.match}
    used = {image for part in splits for image in part.labels}
    found = find_images(root)
    counts: Counter[str] = Counter(
        {reason: len(set(paths) - tables.keys()) for reason, paths in found.left_out.items()}
    )
    counts["without a class or split"] += len(set(found.images) - used)
    counts["missing"] += sum(tables.values())
    return {reason: count for reason, count in counts.items() if count}


def splits_in(name: str) -> set[SplitName]:
    """Return the splits that words of a name stand for.

    Example:
        >>> splits_in("seg_train"), splits_in("train2017"), splits_in("trains")
        ({'train'}, {'train'}, set())
    """
    words = re.split(r"[^a-z]+", name.casefold())
    return {split for word in words if (split := split_of(word))}


class _Tables:
    """The tables of labels in a folder.

    Args:
        folder: the folder.
        images: the folder of the images that they may name; default the same. Of another folder, only tables
            with usual names count.

    Attributes:
        fitting: table → rows, of those with columns of files and labels.
        refused: why other tables cannot be used.
    """

    def __init__(self, folder: Path, images: Path | None = None) -> None:
        self.folder = folder
        self.images = images or folder
        self.fitting: dict[Path, list[Row]] = {}
        self.refused: list[ValueError] = []
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in TABLE_SUFFIXES and path.is_file() and self._may_be_meant(path):
                try:
                    self.fitting[path] = read_label_file(path)
                except ValueError as error:
                    self.refused.append(error)

    def _may_be_meant(self, table: Path) -> bool:
        # Competitions have a sample_submission.csv with invented labels.
        if table.name.startswith((".", "sample")):
            return False
        if self.images == self.folder:
            return True
        # Other tables that lie beside a folder of images have nothing to do with it.
        return table.stem.casefold() in ("labels", "metadata", self.images.name) or bool(
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
        index = ImageIndex(find_images(folder).images, [self.folder, folder])
        matches = [match_rows(table, self.fitting[table], index) for table in tables]
        for match in matches:
            if not match.rows:
                count = count_noun(match.missing, "file")
                self.refused.append(
                    invalid(
                        str(match.table),
                        f"a table that names images below {folder}",
                        found=f"{count} elsewhere",
                    )
                )
        return [match for match in matches if match.rows]


def _only_below(folder: Path, rows: Mapping[Path, Row]) -> dict[Path, Row]:
    return {image: row for image, row in rows.items() if folder in image.parents}
