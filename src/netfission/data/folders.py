"""What the folders of a data set of image files mean: its splits, its classes, its labels."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

from netfission.data.class_folders import check_content, check_names
from netfission.data.files import FileTree, FoundImages, path_order, top_folders
from netfission.data.label_files import (
    FileIndex,
    Match,
    Row,
    class_name,
    match_rows,
    read_label_file,
    says_labels,
)
from netfission.data.split_names import SplitName, assign_splits, may_be_split, split_of, splits_in, test_name
from netfission.data.tables import Tables, renames_classes, why_unread, why_unused
from netfission.utils.errors import did_you_mean, invalid
from netfission.utils.text import as_text, count_noun, printable

# Splits that may be the name of a class: trains among vehicles, valid among invalid signatures.
_CLASSES_TOO = ("train", "valid")


@dataclass(frozen=True)
class LabelledImages:
    """The images of one split.

    Attributes:
        origin: the folder or table that says their classes.
        labels: image → name of its class; in the order of paths if folders say the classes.
        match: the table and what it names; None if folders say the classes.
        remarks: what a user should know about the classes.
    """

    origin: Path
    labels: dict[str, str]
    match: Match | None = None
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class FolderContents:
    """The splits that a folder holds.

    Attributes:
        folder: the folder of the splits or classes, which may be below the one that was given.
        splits: at least `train`, or any one if no training split is required.
        left_out: reason → number of files and folders that are in no split.
        unused: name of a table or folder that is not used → why.
    """

    folder: Path
    splits: dict[SplitName, LabelledImages]
    left_out: dict[str, int]
    unused: dict[str, str] = field(default_factory=dict)

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes of the training images, or else of all images, sorted."""
        parts = [self.splits["train"]] if "train" in self.splits else self.splits.values()
        return sorted(set().union(*(part.labels.values() for part in parts)))

    @property
    def remarks(self) -> list[str]:
        """What a user should know about the splits, each once."""
        return list(dict.fromkeys(remark for part in self.splits.values() for remark in part.remarks))


def find_test_folder(folder: Path, tree: FileTree | None = None) -> Path:
    """Return the folder of the test split in a folder, see `test_name`; without one, the folder itself.

    Args:
        folder: the folder.
        tree: lists the folder; default a new one.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Path(folder, "Test").mkdir()
        ...     find_test_folder(Path(folder)).name
        'Test'
    """
    tree = tree or FileTree()
    root = _look_through(tree, folder)
    name = test_name(path.name for path in _subfolders(tree, root))
    return root / name if name else root


def read_folder(folder: Path, *, train_required: bool = True, tree: FileTree | None = None) -> FolderContents:
    """Find the splits, classes and images of a folder.

    Images are in one folder per class, or in any folder with their labels in a table, see `read_label_file`.
    Splits are folders, see `assign_splits`, or are named by a table; they can be missing. A single folder
    inside the one given is looked through.

    Args:
        folder: the folder.
        train_required: refuse a folder of other splits without a training split.
        tree: lists the folder; default a new one.

    Raises:
        ValueError: the folder has another layout, a class has no image, or a split has classes that the
            training split lacks. Also if a table of labels for the images cannot be used.

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
    tree = tree or FileTree()
    root = _look_through(tree, folder)
    tables = Tables(root, tree=tree)
    split_folders = _find_split_folders(tree, root, tables, train_required)
    splits = (
        _read_split_folders(tree, split_folders, tables) if split_folders else _read_whole(tree, root, tables)
    )
    _check_disjoint(splits)
    other_tables = _other_tables(folder, root, splits)
    found = tree.images(root)
    left_out = _count_left_out(found, splits.values(), other_tables)
    unused = {table: reason for table, reason in other_tables.items() if reason}
    if split_folders:
        unused |= _unused_folders(root, found.images, splits.values(), split_folders.values())
    named = {as_text(str(path.relative_to(folder))): reason for path, reason in unused.items()}
    contents = FolderContents(root, splits, left_out, named)
    for split, part in splits.items():
        _check_classes(contents.classes, part, split)
    return contents


def read_table(table: Path, *, train_required: bool = True) -> FolderContents:
    """Read a table of paths and labels, with an optional column of splits, see `read_label_file`.

    Paths are relative to the folder of the table, or absolute.

    Args:
        table: the file, .csv, .tsv or .parquet.
        train_required: refuse splits without a training split.

    Raises:
        ValueError: the table has another layout, names a file that does not exist, or has no label.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Path(folder, "1.png").touch()
        ...     table = Path(folder, "images.csv")
        ...     _ = table.write_text("path,label,split\\n1.png,cat,train\\n")
        ...     read_table(table).classes
        ['cat']
    """
    contents = read_rows(table, read_label_file(table), train_required=train_required)
    for split, part in contents.splits.items():
        _check_classes(contents.classes, part, split)
    return contents


def read_rows(table: Path, rows: Sequence[Row], *, train_required: bool = True) -> FolderContents:
    """Find the images that the rows of a table name, and their splits.

    Args:
        table: the file, where relative paths begin.
        rows: its rows.
        train_required: refuse splits without a training split.

    Raises:
        ValueError: a file does not exist, no image has a label, or an image has two labels or splits.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Path(folder, "1.png").touch()
        ...     read_rows(Path(folder, "images.csv"), [Row("1.png", "0.5")]).classes
        ['0.5']
    """
    index = FileIndex(table.parent)
    if missing := [row for row in rows if not index.find(row.file)]:
        found = f"no {missing[0].file} (row {missing[0].number})"
        of_all = f"{len(missing):,} of {count_noun(len(rows), 'file')} are missing"
        hint = f"{of_all}; paths are relative to {table.parent}"
        raise invalid(str(table), "a table of files that exist", found=found, hint=hint)
    match = match_rows(table, rows, index)
    if not match.rows:
        raise invalid(str(table), "a table with labels of images", found="none")
    splits: dict[SplitName, LabelledImages] = {"train": _from_table([match])}
    if _has_splits(match):
        splits = _by_split_column(match, train_required=train_required)
    images = FoundImages(sorted(match.rows.keys() | match.unlabelled, key=path_order))
    return FolderContents(table.parent, splits, _count_left_out(images, splits.values(), ()))


def _look_through(tree: FileTree, folder: Path, known: Collection[str] = ()) -> Path:
    """Return the folder inside a folder that holds nothing else, and so on, down to splits or classes.

    Args:
        tree: lists the folders.
        folder: where to begin.
        known: names of classes, which are not looked through.
    """
    found = _subfolders(tree, folder)
    if len(found) != 1 or not _subfolders(tree, found[0]):
        return folder
    name = found[0].name
    begins_splits = split_of(name) not in (None, split_of(folder.name))
    if begins_splits or class_name(name) in known or Tables(folder, tree=tree).match_all():
        return folder
    return _look_through(tree, found[0], known)


def _subfolders(tree: FileTree, folder: Path) -> list[Path]:
    """Return the folders in a folder that may hold data, sorted."""
    found = (folder / name for name in tree.subfolders(folder))
    return [path for path in found if not _holds_outputs_alone(tree, path)]


def _holds_outputs_alone(tree: FileTree, folder: Path) -> bool:
    """Whether the folder is one such as `runs`."""
    return next(tree.files(folder), None) is None and "written by netfission" in tree.images(folder).left_out


def _find_split_folders(
    tree: FileTree, root: Path, tables: Tables, train_required: bool
) -> dict[SplitName, Path]:
    """Return the folder of each split; none if the folders are classes."""
    found = _subfolders(tree, root)
    named = [path.name for path in found if split_of(path.name)]
    if not named:
        return {}
    alone = len(named) == 1 < len(found) and named[0].casefold() in _CLASSES_TOO
    if alone and not _subfolders(tree, root / named[0]) and not tables.match_all():
        return {}
    if "train" in map(split_of, named):
        named = [path.name for path in found]
    # Beside other folders, one by the name of a split may be anything.
    required = train_required or len(named) < len(found)
    assigned = assign_splits(named, str(root), train_required=required)
    return {split: root / name for split, name in assigned.items()}


def _read_split_folders(
    tree: FileTree, folders: Mapping[SplitName, Path], tables: Tables
) -> dict[SplitName, LabelledImages]:
    """Read the folder of each split; one whose images have no labels is left out, but that of training."""
    splits: dict[SplitName, LabelledImages] = {}
    agreeing: list[tuple[Match, LabelledImages]] = []
    classes: set[str] = set()
    for split, folder in folders.items():
        inner_tables = Tables(folder, tree=tree)
        matches = inner_tables.match_all() or tables.match(split, folder)
        classes_in = _look_through(tree, folder, classes)
        part = _read_classes(tree, classes_in, matches, at_least=1 if classes else 2)
        if part is not None:
            splits[split] = part
            classes |= set(part.labels.values())
            agreeing += [(match, part) for match in matches if part.match is None]
        elif split == "train" or len(folders) == 1:
            raise _no_classes(folder, inner_tables, tables)
        else:
            _check_holds_images(tree, folder, split)
    contradicting = {part.match.table for part in splits.values() if part.match and part.remarks}
    for match, part in agreeing:
        if match.table in contradicting:
            reason = "contradicts the class folders of another split"
            _check_complete(match, part.origin, len(part.labels), reason)
    return splits


def _check_holds_images(tree: FileTree, folder: Path, split: SplitName) -> None:
    """Refuse the folder of a split in which there is no image, with or without a label."""
    found = tree.images(folder)
    if not found.images:
        hint = "add some, or remove the folder"
        raise invalid(str(folder), f"a folder of {split} images", found=_no_image(found), hint=hint)


def _no_image(found: FoundImages) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in found.counts().items())
    return f"no image file ({reasons})" if reasons else "no image file"


def _read_whole(tree: FileTree, root: Path, tables: Tables) -> dict[SplitName, LabelledImages]:
    """Read a folder without folders of splits; a table may say which images are in which split."""
    above = Tables(root.parent, images=root, tree=tree)
    matches = tables.match("train", root)
    if not matches and not _subfolders(tree, root):
        matches = above.match("train", root)
    train = _read_classes(tree, root, matches, at_least=2)
    if train is None:
        raise _no_classes(root, tables, above)
    if train.match is None:
        divided = next((match for match in matches if _has_splits(match, "train")), None)
        if divided is None:
            return {"train": train}
        _check_complete(divided, root, len(train.labels), "has splits")
        return _by_split_column(divided)
    if _has_splits(train.match):
        return _by_split_column(train.match)
    splits: dict[SplitName, LabelledImages] = {"train": train}
    others: tuple[SplitName, ...] = ("validation", "test")
    for split in others:
        if matches := tables.match(split, root, general=False):
            splits[split] = _from_table(matches)
    return splits


def _read_classes(
    tree: FileTree, folder: Path, matches: Sequence[Match], at_least: int
) -> LabelledImages | None:
    """Read class folders if there are enough of them, else a table; None if there is neither.

    A table that gives several labels to the images of one folder is read, if it names all images.
    """
    classes = _subfolders(tree, folder)
    if not classes or (matches and len(classes) < at_least):
        return _from_table(matches) if matches else None
    check_names(folder, [path.name for path in classes])
    _check_no_splits_inside(tree, folder, classes)
    found = {path.name: tree.images(path) for path in classes}
    for name, below in found.items():
        if not below.images:
            raise invalid(str(folder / name), "a class folder with images", found=_no_image(below))
    labels: dict[str, str] = {}
    for name, below in found.items():
        labels |= dict.fromkeys(below.images, class_name(name))
    for match in matches:
        _check_below(match, folder, labels)
        if _contradicts(match, labels):
            _check_complete(match, folder, len(labels), "contradicts the class folders")
            remark = f"the classes are those of {printable(match.table.name)}, not the {len(classes)} folders"
            return replace(_from_table(matches), remarks=[remark + _differences(match, labels)])
    images = {name: below.images for name, below in found.items()}
    return LabelledImages(folder, labels, remarks=check_content(folder, images) if at_least > 1 else ())


def _from_table(matches: Sequence[Match]) -> LabelledImages:
    match, *others = matches
    if others:
        found = f"{match.table.name} and {others[0].table.name}"
        raise invalid(str(match.table.parent), "a folder with one table of labels", found=found)
    return LabelledImages(match.table, {image: row.label for image, row in match.rows.items()}, match)


def _has_splits(match: Match, wanted: SplitName | None = None) -> bool:
    """Whether a table names splits of images; if `wanted`, also that one."""
    return any(row.split and wanted in (None, split_of(row.split)) for row in match.rows.values())


def _by_split_column(match: Match, *, train_required: bool = True) -> dict[SplitName, LabelledImages]:
    _check_split_names(match)
    names = sorted({row.split for row in match.rows.values() if row.split})
    return {
        split: LabelledImages(
            match.table, {image: row.label for image, row in match.rows.items() if row.split == name}, match
        )
        for split, name in assign_splits(names, str(match.table), train_required=train_required).items()
    }


def _check_split_names(match: Match) -> None:
    """Refuse a table with a split that no name of splits stands for."""
    unknown = [row for row in match.rows.values() if row.split and not may_be_split(row.split)]
    if unknown:
        row = min(unknown, key=lambda row: row.number)
        of_all = f"{len(unknown):,} of {count_noun(len(match.rows), 'image')} have no such split"
        raise invalid(
            str(match.table),
            "a table whose splits are named train, val or test",
            found=f"{row.split!r} for {row.file} in row {row.number}",
            hint=f"{of_all}; leave the cell empty to leave an image out",
        )


def _check_no_splits_inside(tree: FileTree, folder: Path, classes: Sequence[Path]) -> None:
    """Refuse folders that each hold splits."""
    if len(classes) > 1 and all(
        any(split_of(p.name) == "train" for p in _subfolders(tree, path)) for path in classes
    ):
        names = [path.name for path in classes]
        found = f"a train folder in each of {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
        expected = "a folder with one folder per class, or with train/CLASS"
        hint = "give one of them, or put the classes inside the splits"
        raise invalid(str(folder), expected, found=found, hint=hint)


def _check_below(match: Match, folder: Path, images: Collection[str]) -> None:
    """Refuse a table most of whose images lie beside the class folders."""
    beside = len(match.rows.keys() - set(images))
    if 2 * beside > len(match.rows):
        expected = f"a folder of either class folders or images named by {match.table.name}"
        found = f"both, with {count_noun(beside, 'image')} beside the folders"
        raise invalid(str(folder), expected, found=found, hint="move one of them elsewhere")


def _contradicts(match: Match, labels: Mapping[str, str]) -> bool:
    """Whether a table that says that it holds labels has others than the class folders."""
    pairs = {(labels[image], row.label) for image, row in match.rows.items() if image in labels}
    several = len({label for _, label in pairs}) > 1
    return several and not renames_classes(pairs) and says_labels(match.table)


def _differences(match: Match, labels: Mapping[str, str]) -> str:
    """Say how many labels of a table differ from the names of the folders, unless all do."""
    different = [
        (image, row.label) for image, row in match.rows.items() if labels.get(image, row.label) != row.label
    ]
    if len(different) == len(match.rows):
        return ""
    image, label = different[0]
    name = "/".join(Path(image).parts[-2:])
    of_all = f"{len(different)} of {count_noun(len(match.rows), 'image')}"
    verb = "differs" if len(different) == 1 else "differ"
    return f" ({of_all} {verb}, such as {printable(label)} for {printable(name)})"


def _check_complete(match: Match, folder: Path, images: int, reason: str) -> None:
    """Refuse a table that goes before the class folders, but names only a part of their images."""
    if unnamed := images - len(match.rows):
        table = match.table.name
        expected = f"a folder whose images all have a label in {table}"
        hint = f"{table} {reason}: remove it, or complete it"
        raise invalid(str(folder), expected, found=f"{unnamed} without one", hint=hint)


def _no_classes(folder: Path, *tables: Tables) -> ValueError:
    """Return the error for images without classes: that of the first table that could not be used, if any."""
    if refused := [error for source in tables if (error := source.why_refused())]:
        return refused[0]
    layouts = "CLASS/* or train/CLASS/*, or with their labels in labels.csv"
    expected = f"a folder of parquet files, or of images as {layouts}"
    return invalid(str(folder), expected, found="no class folder")


def _check_disjoint(splits: Mapping[SplitName, LabelledImages]) -> None:
    """Refuse tables that put one image into two splits."""
    for (first, part), (second, other) in combinations(splits.items(), 2):
        if shared := sorted(part.labels.keys() & other.labels.keys(), key=path_order):
            found = f"{shared[0]} in the {first} and the {second} split"
            raise invalid(
                str(other.origin), "a table of other images than those of other splits", found=found
            )


def _check_classes(classes: Sequence[str], part: LabelledImages, split: SplitName) -> None:
    """Refuse a split with classes that the training split lacks."""
    unknown = sorted(set(part.labels.values()) - set(classes))
    if not unknown:
        return
    found = f"{', '.join(unknown[:5])}{', …' if len(unknown) > 5 else ''} without training images"
    if part.match:
        row = next(row for row in part.match.rows.values() if row.label == unknown[0])
        found += f" ({row.file} in row {row.number})"
    kind = "table whose" if part.match else "folder whose"
    raise invalid(
        str(part.origin),
        f"a {kind} {split} images are of the {len(classes)} training classes",
        found=found,
        hint=did_you_mean(unknown[0], classes),
    )


def _other_tables(folder: Path, root: Path, splits: Mapping[SplitName, LabelledImages]) -> dict[Path, str]:
    """Return why tables between a folder and its images are not used; "" if there is nothing to say."""
    used = {part.match.table for part in splits.values() if part.match}
    ends = [root, *(part.origin for part in splits.values() if not part.match)]
    places = dict.fromkeys(path for end in ends for path in _between(folder, end))
    unused = {}
    for table in (path for place in places for path in Tables(place).paths if path not in used):
        parts = _parts_near(table, splits)
        if any(part.match for part in parts):
            reason = why_unread(table) or "another table is used"
        else:
            labels = {image: label for part in parts for image, label in part.labels.items()}
            reason = why_unused(table, labels, root)
        unused[table] = reason
    return unused


def _between(top: Path, bottom: Path) -> list[Path]:
    """Return the folders from one down to another one inside."""
    return [path for path in (bottom, *bottom.parents) if top in (path, *path.parents)][::-1]


def _parts_near(table: Path, splits: Mapping[SplitName, LabelledImages]) -> list[LabelledImages]:
    """Return the splits that a table may be about: those in its name, those in its folder, or all."""
    named = [part for split, part in splits.items() if split in splits_in(table.stem)]
    inside = [part for part in splits.values() if table.parent in (part.origin, *part.origin.parents)]
    return named or inside or list(splits.values())


def _unused_folders(
    root: Path,
    images: Collection[str],
    splits: Collection[LabelledImages],
    split_folders: Collection[Path],
) -> dict[Path, str]:
    """Return why folders beside those of splits are not used, of folders with images."""
    holding = top_folders(root, images) - {""}
    used = set().union(*(top_folders(root, part.labels) for part in splits))
    of_splits = {folder.name for folder in split_folders}
    other = "not the name of a split; rename it to val or test to use it"
    return {
        root / name: "its images have no labels" if name in of_splits else other
        for name in sorted(holding - used)
    }


def _count_left_out(
    found: FoundImages, splits: Collection[LabelledImages], named: Collection[Path]
) -> dict[str, int]:
    """Count the files and folders that are in no split, by reason; without those that are `named`."""
    matches = {part.match.table: part.match for part in splits if part.match}
    unused = found.images
    for part in splits:
        unused = [image for image in unused if image not in part.labels]
    used = set().union(*(part.labels for part in splits)) if matches else set()  # tables alone need it
    mentioned = {str(path) for path in (*matches, *named)}
    counts: Counter[str] = Counter(
        {reason: len(set(paths) - mentioned) for reason, paths in found.left_out.items()}
    )
    other_splits = {
        image: f"of the {printable(row.split)} split"
        for match in matches.values()
        for image, row in match.rows.items()
        if row.split and image not in used
    }
    counts.update(other_splits.values())
    unlabelled: set[str] = set()
    for table, match in matches.items():
        counts[f"without a label in {printable(table.name)}"] = len(match.unlabelled - used - unlabelled)
        counts[f"named in {printable(table.name)} without a file"] = match.missing
        counts[f"named again in {printable(table.name)}"] = match.repeated
        unlabelled |= match.unlabelled
    counts["without a class or split"] += len(set(unused) - other_splits.keys() - unlabelled)
    return {reason: count for reason, count in counts.items() if count}
