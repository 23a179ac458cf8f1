"""Whether folders are classes, by their names, the folders in them and the names of their images."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from netfission.data.copies import find_copies
from netfission.data.files import top_folders
from netfission.data.formats import open_image
from netfission.data.label_files import class_name
from netfission.data.split_names import splits_in
from netfission.utils.errors import invalid
from netfission.utils.text import count_noun, printable

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
# Names of such parts only if all folders have one of them.
_INPUTS = _IMAGE_PARTS | {"input", "inputs", "original", "originals", "photo", "photos", "raw", "rgb"}
_TARGETS = _LABEL_PARTS | {"depth", "ground truth", "ground-truth", "output", "outputs", "target", "targets"}
# Pairs that are classes, too: of the images' quality, for example.
_EITHER = (
    {"low", "high"},
    {"lr", "hr"},
    {"lq", "hq"},
    {"noisy", "clean"},
    {"blur", "sharp"},
    {"blurred", "sharp"},
    {"hazy", "clear"},
    {"before", "after"},
    {"left", "right"},
)
# Folders that hold the classes again: parts of a cross-validation, years, places, versions of the images.
_GROUP = re.compile(
    r"(fold|cv|split|part|set|subset|batch|session|round|run|day|site|camera|cam|center|centre|source|domain"
    r"|shard|chunk|group|dataset|year|scanner|hospital)s?[ _-]*(\d+|[a-z])"
    r"|(19|20)\d\d|originals?|(un)?augmented|augmentations?|aug|raw|(pre)?processed|cropped|resized"
)
_PARTNER = re.compile(r"[ _-]*(mask|masks|gt|groundtruth|seg|segmentation|label|labels)\d*$", re.IGNORECASE)
_PARTNER_WORDS = ("mask", "gt", "groundtruth", "seg", "label")  # one is in each name that matches
_MOSTLY = 0.9  # share of names that coincide in copies and pairs
_FEWEST = 3  # images of a class whose names are compared
_PROBED = 8  # images of a class that are opened
_PARTS = 4  # folders whose images are opened
_MASK_COLOURS, _PICTURE_COLOURS = 16, 64
_EXPECTED = "a folder with one folder per class, or with train/CLASS"

Images = Mapping[str, Sequence[str]]


def check_names(folder: Path, names: Sequence[str]) -> None:
    """Refuse folders that are no classes by their names: parts of images and masks, or splits.

    Args:
        folder: the folder that they are in.
        names: their names.

    Raises:
        ValueError: the names are those of other things than classes.

    Example:
        >>> check_names(Path("pets"), ["cat", "dog"])
    """
    lower = {name.casefold() for name in names}
    images, labels = lower & _IMAGE_PARTS, lower & _LABEL_PARTS
    is_paired = lower & _INPUTS and lower & _TARGETS and lower <= _INPUTS | _TARGETS
    if (images and labels) or (len(lower) > 1 and lower == images | labels) or is_paired:
        hint = "they look like parts of a data set for segmentation or detection"
        raise invalid(str(folder), _EXPECTED, found=_listed(names), hint=hint)
    splits = set().union(*map(splits_in, names))
    if "train" in splits and len(splits) > 1:
        hint = "rename the folders of splits to train and test"
        raise invalid(str(folder), _EXPECTED, found=_listed(names), hint=hint)


def check_content(folder: Path, images: Images) -> list[str]:
    """Refuse folders that are no classes by what they hold: the classes again, copies, or images and masks.

    Args:
        folder: the folder that they are in.
        images: folder → its images.

    Returns:
        What makes it likely, but not certain, that the folders are no classes.

    Raises:
        ValueError: the folders are no classes.

    Example:
        >>> check_content(Path("."), {"cat": ["cat/1.png"], "dog": ["dog/1.png"]})
        []
    """
    inner = {name: _inner_folders(folder / name, paths) for name, paths in images.items()}
    _check_no_classes_again(folder, inner)
    copies = [] if _are_even(images, inner) else _copies(folder, images)
    return [*copies, *_groups(folder, inner), *_pairs(folder, images), *_partners(images)]


def _inner_folders(folder: Path, images: Sequence[str]) -> set[str]:
    """Return the folders in a folder that its images are in; "" if some are in the folder itself."""
    return {class_name(name) for name in top_folders(folder, images)}


def _check_no_classes_again(folder: Path, inner: Mapping[str, set[str]]) -> None:
    """Refuse a folder that holds the other ones again."""
    names = {class_name(name) for name in inner}
    for name, below in inner.items():
        again = below & (names - {class_name(name)})
        if len(again) > 1 and 2 * len(again) >= len(below):
            found = f"{printable(name)}, which holds {_listed(sorted(again))} again"
            raise invalid(str(folder), _EXPECTED, found=found, hint="move it elsewhere")


def _are_even(images: Images, inner: Mapping[str, set[str]]) -> bool:
    """Whether no folder has about as many images as the others together, as copies of all of them have.

    With folders inside, names may occur twice in one, so that it is not known from the numbers alone.
    """
    sizes = [len(paths) for paths in images.values()]
    return max(sizes) < _MOSTLY * (sum(sizes) - max(sizes)) and all(below == {""} for below in inner.values())


def _copies(folder: Path, images: Images) -> list[str]:
    """Refuse a folder with copies of the images in all others, or say so if the files differ."""
    if len(images) < 3:
        return []
    names = {name: _file_names(paths) for name, paths in images.items()}
    if len(set().union(*names.values())) == sum(map(len, names.values())):  # as in most data sets
        return []
    files = {name: dict(zip(names[name], paths, strict=True)) for name, paths in images.items()}
    holders = Counter(file for paths_by_name in files.values() for file in paths_by_name)
    shared = sorted(file for file, count in holders.items() if count > 1)
    if len(shared) < 2 * _FEWEST or any(holders[file] > 2 for file in shared):
        return []
    for name in (name for name, paths_by_name in files.items() if shared[0] in paths_by_name):
        alone = sum(holders[file] == 1 for file in names[name])
        in_all = all(file in files[name] for file in shared)
        if in_all and len(shared) >= _MOSTLY * (len(holders) - alone):
            originals = {
                file: path for other in files if other != name for file, path in files[other].items()
            }
            return _check_copied(folder, name, shared, files[name], originals)
    return []


def _check_copied(
    folder: Path, name: str, shared: Sequence[str], files: Mapping[str, str], originals: Mapping[str, str]
) -> list[str]:
    """Refuse a folder if its files equal those of the same names in others, or say that it may hold copies.

    Args:
        folder: the folder that all are in.
        name: the folder in question.
        shared: names of the files that it shares with others, sorted.
        files: name of a file → its path in the folder in question.
        originals: name of a file → its path in another folder.
    """
    probed = _spread(shared)
    copies = [files[file] for file in probed]
    found = f"{printable(name)} holds images of the same names as all other folders"
    equal = find_copies(copies, [originals[file] for file in probed])
    if len(equal) >= _MOSTLY * len(copies) or _GROUP.fullmatch(name.casefold()):
        raise invalid(str(folder), _EXPECTED, found=f"copies: {found}", hint="move it elsewhere")
    return [] if _are_counted(shared) else [f"{found}: are they copies?"]


def _spread(names: Sequence[str]) -> list[str]:
    """Return some names that are spread evenly."""
    return [names[number] for number in sorted({i * len(names) // _PROBED for i in range(_PROBED)})]


def _groups(folder: Path, inner: Mapping[str, set[str]]) -> list[str]:
    """Refuse folders that all hold the same folders, or say so if it is unclear which of both are classes."""
    common = set.intersection(*inner.values()) if len(inner) > 1 else set()
    union = set().union(*inner.values())
    if "" in union or len(common) < 2 or 2 * len(common) < len(union):
        return []
    tops, below = _listed(sorted(inner)), _listed(sorted(common))
    named = all(_GROUP.fullmatch(name.casefold()) for name in inner)
    more = len(common) > len(inner) and all(re.fullmatch(r"[^\d]+", name) for name in common)
    if named or more:
        hint = f"if {tops} are the classes, leave out the folders in them; else pass or merge them"
        raise invalid(str(folder), _EXPECTED, found=f"{below} in each of {tops}", hint=hint)
    return [f"each of {tops} holds {below}, which may be the classes"]


def _pairs(folder: Path, images: Images) -> list[str]:
    """Refuse pairs of images and masks, or say that classes have images of the same names."""
    sizes = [len(paths) for paths in images.values()]
    if min(sizes) < _MOSTLY * max(sizes):
        return []
    shared = _common_cores(images, max(_FEWEST, _MOSTLY * max(sizes)))
    if len(images) < 2 or not shared:
        return []
    stems = {name: dict(zip(_cores(paths), paths, strict=True)) for name, paths in images.items()}
    probed = _spread(shared)
    kinds = {_kind([Path(paths[core]) for core in probed]) for paths in list(stems.values())[:_PARTS]}
    marked = {
        name
        for name, paths in stems.items()
        if all(stem != core for stem, core in zip(_stems(list(paths.values())), paths, strict=True))
    }
    if {"mask", "picture"} <= kinds or 0 < len(marked) < len(stems):
        hint = "they look like images and their masks, as their files have the same names"
        raise invalid(str(folder), _EXPECTED, found=_listed(sorted(images)), hint=hint)
    either = {name.casefold() for name in images} in _EITHER
    if either or not _are_counted(shared):
        return [f"all classes hold images of the same names, such as {printable(shared[0])}: are they pairs?"]
    return []


def _common_cores(images: Images, least: float) -> list[str]:
    """Return the cores of names that all folders have, sorted; none if they are fewer than `least`."""
    common: set[str] | None = None
    for paths in images.values():
        cores = set(_cores(paths))
        common = cores if common is None else common & cores
        if len(common) < least:  # as of most data sets after two folders
            return []
    return sorted(common or ())


def _file_names(paths: Sequence[str]) -> list[str]:
    """Return the names of files, without their folders."""
    return [path.rpartition(os.sep)[2] for path in paths]


def _stems(paths: Sequence[str]) -> list[str]:
    """Return the names of image files without their suffixes."""
    return [name.rpartition(".")[0] for name in _file_names(paths)]


def _cores(paths: Sequence[str]) -> list[str]:
    """Return the names of files without suffixes, and without what marks them as the masks of images."""
    stems = _stems(paths)
    return [_PARTNER.sub("", stem) or stem for stem in stems] if _may_be_partners(stems) else stems


def _may_be_partners(names: Iterable[str]) -> bool:
    """Return whether some names have what marks masks: quickly, as most folders have none."""
    text = "\n".join(names).casefold()
    return any(word in text for word in _PARTNER_WORDS)


def _kind(images: Collection[Path]) -> str:
    """Return whether images are masks, by their few colours, or pictures; "" if neither or unreadable."""
    try:
        fewest = [_few_colours(path, _MASK_COLOURS) for path in images]
        if all(fewest):
            return "mask"
        return "" if any(_few_colours(path, _PICTURE_COLOURS) for path in images) else "picture"
    except Exception:  # decoders raise many types; unreadable images are refused later
        return ""


def _few_colours(path: Path, most: int) -> bool:
    with open_image(path) as image:
        return image.getcolors(most) is not None


def _are_counted(stems: Sequence[str]) -> bool:
    """Whether names differ in numbers alone, as each class has if its images are numbered."""
    return 3 * len({re.sub(r"\d+", "0", stem) for stem in stems}) <= len(stems)


def _partners(images: Images) -> list[str]:
    """Say that masks lie beside images in the classes."""
    count, example = 0, ""
    for paths in images.values():
        if not (_may_be_partners(paths) and _may_be_partners(_file_names(paths))):
            continue
        cores = zip(paths, _stems(paths), _cores(paths), strict=True)
        marked = [(path, core) for path, stem, core in cores if core != stem]
        stems = {path[: path.rindex(".")] for path in paths} if marked else set()
        for path, core in marked:
            if path[: path.rindex(os.sep) + 1] + core in stems:
                count, example = count + 1, example or os.path.basename(path)
    noun = count_noun(count, "image")
    return [f"{noun} may be masks of others, such as {printable(example)}"] if count else []


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:5])
    return shown + (", …" if len(names) > 5 else "")
