"""Which files of a folder are images, and which are left out, by reason."""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple

from netfission.data.formats import image_suffixes, package_for
from netfission.utils.outputs import is_output

# Why a file or folder is no image: "hidden", "written by netfission", "of another type", "needing PACKAGE" or
# "missing". The words stand after its number: "3 hidden".
Reason = str

_NEVER_DATA = ("hidden", "written by netfission")

# The key that sorts paths as `Path` does, by folder and then by name: "a/2" before "a b/1". Of a million,
# a function in Python would take most of the time.
path_order: Callable[[str], str] = methodcaller("replace", os.sep, "\0")

# Hidden by other operating systems and by network drives, beside all names that begin with a dot.
_HIDDEN = {
    "$recycle.bin",
    "@eadir",
    "__macosx",
    "desktop.ini",
    "ehthumbs.db",
    "icon\r",
    "system volume information",
    "thumbs.db",
}


@dataclass(frozen=True)
class FoundImages:
    """The images below a folder, and what is not one.

    Paths are strings, since a `Path` for each file takes most of the time of a large folder.

    Attributes:
        images: the image files, sorted.
        left_out: reason → files and folders left out for it, sorted; no reason without a path.

    Example:
        >>> FoundImages(["a.png"], {"hidden": [".b.png"]}).counts()
        {'hidden': 1}
    """

    images: list[str] = field(default_factory=list)
    left_out: dict[Reason, list[str]] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return how many files and folders are left out for each reason."""
        return {reason: len(paths) for reason, paths in self.left_out.items()}


class _Listing(NamedTuple):
    """What is in one folder.

    Attributes:
        real_path: of the folder.
        images: paths of the images, sorted.
        left_out: path and reason of other files, and of folders that are not entered.
        inside: names of the folders that are entered, in a fixed order: folders before links to them.
        is_mixed: whether images lie beside folders, or folders beside links, so that one after the other is
            not the order of paths.
    """

    real_path: str
    images: list[str]
    left_out: list[tuple[str, Reason]]
    inside: list[str]
    is_mixed: bool


class FileTree:
    """The files below folders, none of which is listed twice; what changes on disk meanwhile is not seen.

    Linked folders count as any other, each once, even if several links lead to it, except those that lead
    back to a folder above. A hidden folder, or one that netfission has written, counts as one path left out.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("cat/1.png", "dog/2.png", "notes.txt"):
        ...         Path(folder, name).parent.mkdir(exist_ok=True)
        ...         Path(folder, name).touch()
        ...     tree = FileTree()
        ...     tree.subfolders(Path(folder)), len(tree.images(Path(folder)).images)
        (['cat', 'dog'], 2)
    """

    def __init__(self) -> None:
        self._listings: dict[str, _Listing] = {}

    def images(self, folder: Path) -> FoundImages:
        """Find the image files below a folder, see `find_images`."""
        images: list[str] = []
        left_out: list[tuple[str, Reason]] = []
        is_sorted = True
        for listing in self._walk(folder):
            images += listing.images
            left_out += listing.left_out
            is_sorted = is_sorted and not listing.is_mixed
        found = FoundImages(images if is_sorted else sorted(images, key=path_order))
        for path, reason in sorted(left_out, key=lambda item: path_order(item[0])):
            found.left_out.setdefault(reason, []).append(path)
        return found

    def files(self, folder: Path) -> Iterator[str]:
        """Yield the paths below a folder that are not folders, without hidden ones, see `walk_files`."""
        for listing in self._walk(folder):
            yield from listing.images
            yield from _others(listing)

    def others(self, folder: Path) -> Iterator[str]:
        """Yield those of `files` that are no images."""
        for listing in self._walk(folder):
            yield from _others(listing)

    def subfolders(self, folder: Path) -> list[str]:
        """Return the names of the folders in a folder that may hold data, sorted."""
        return sorted(self._list(str(folder)).inside)

    def _walk(self, folder: Path) -> Iterator[_Listing]:
        """Yield the listings of a folder and of all below it."""
        above = set(map(str, Path(os.path.realpath(folder)).parents))
        return self._walk_into(str(folder), above)

    def _walk_into(self, folder: str, seen: set[str]) -> Iterator[_Listing]:
        """Walk a folder unless it is one of those seen, by their real paths, to which it is added."""
        listing = self._list(folder)
        if listing.real_path in seen:
            return
        seen.add(listing.real_path)
        yield listing
        for name in listing.inside:
            yield from self._walk_into(inside(folder) + name, seen)

    def _list(self, folder: str) -> _Listing:
        if folder not in self._listings:
            self._listings[folder] = _list(folder)
        return self._listings[folder]


def find_images(folder: Path) -> FoundImages:
    """Find the image files below a folder, by the ends of their names; none is opened.

    An image is what the installed Pillow reads, see `image_suffixes`. For links and hidden folders see
    `FileTree`, which is used to find them several times.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as temporary:
        ...     for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png"):
        ...         Path(temporary, name).touch()
        ...     found = find_images(Path(temporary))
        >>> [os.path.basename(path) for path in found.images], found.counts()
        (['a.JPG', 'b.png'], {'hidden': 1, 'of another type': 1})
    """
    return FileTree().images(folder)


def walk_files(folder: Path) -> Iterator[str]:
    """Yield the paths below a folder that are not folders, without hidden ones.

    Folders that netfission has written are left out; for links see `FileTree`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Path(folder, "a.png").touch()
        ...     Path(folder, ".hidden").touch()
        ...     print([os.path.basename(path) for path in walk_files(Path(folder))])
        ['a.png']
    """
    return FileTree().files(folder)


def inside(folder: Path | str) -> str:
    """Return what the paths in a folder begin with.

    Example:
        >>> inside("images"), inside(".")
        ('images/', '')
    """
    name = str(folder)
    return "" if name == os.curdir else os.path.join(name, "")


def top_folders(folder: Path, files: Collection[str]) -> set[str]:
    """Return the folders in a folder that files are in, at any depth; "" if some are in the folder itself.

    Example:
        >>> sorted(top_folders(Path("images"), ["images/cat/young/1.png", "images/2.png"]))
        ['', 'cat']
    """
    top = inside(folder)
    if files and "".join(files).count(os.sep) == top.count(os.sep) * len(files):  # as of most classes
        return {""}
    below = {file[len(top) : file.rfind(os.sep) + 1] for file in files}  # few, so that each is split once
    return {name.partition(os.sep)[0] for name in below}


def _list(folder: str) -> _Listing:
    """List a folder; one that does not exist or may not be read is empty."""
    real_path = os.path.realpath(folder)
    try:
        with os.scandir(folder) as scanned:
            entries = list(scanned)
    except OSError:
        return _Listing(real_path, [], [], [], is_mixed=False)
    names = _plain_images(entries)
    if len(names) < len(entries):
        plain = set(names)
        entries = [entry for entry in entries if entry.name not in plain]
    else:
        entries = []
    start = inside(folder)
    left_out, entered = [], []
    for entry in entries:
        is_folder = _is(entry.is_dir)
        reason = why_not_entered(Path(start + entry.name)) if is_folder else _why_no_image(entry)
        if reason is not None:
            left_out.append((start + entry.name, reason))
        elif is_folder:
            entered.append((entry.is_symlink(), entry.name))
        else:
            names.append(entry.name)
    is_mixed = bool(names and entered) or len({is_link for is_link, _ in entered}) > 1
    images = [start + name for name in sorted(names)]
    return _Listing(real_path, images, left_out, [name for _, name in sorted(entered)], is_mixed)


def _plain_images(entries: Iterable[os.DirEntry[str]]) -> list[str]:
    """Return the names of files that are images without doubt: quickly, as of most folders all are."""
    try:
        names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    except OSError:  # then each is asked by itself
        return []
    return names if _are_alike(names) else list(filter(_image_name().fullmatch, names))


def _are_alike(names: Sequence[str]) -> bool:
    """Whether all names have the end of the first one, which is that of an image, and none is hidden."""
    end = names[0][names[0].rfind(".") :] if names else ""
    text = "".join(f"/{name}" for name in names)
    return end.lower() in image_suffixes() and f"{text}/".count(f"{end}/") == len(names) and "/." not in text


@cache
def _image_name() -> re.Pattern[str]:
    """Return what the names of images match that are not hidden."""
    ends = "|".join(map(re.escape, image_suffixes()))
    return re.compile(rf"[^.].*({ends})", re.ASCII | re.DOTALL | re.IGNORECASE)


def _others(listing: _Listing) -> Iterator[str]:
    """Yield the files of a folder that are neither images nor left out whatever they are."""
    return (path for path, reason in listing.left_out if reason not in _NEVER_DATA)


def _why_no_image(entry: os.DirEntry[str]) -> Reason | None:
    """Return why a file is no image; what the listing of its folder tells is enough, unless it is a link."""
    name = entry.name
    if _is_hidden(name):
        return "hidden"
    _, dot, end = name.rpartition(".")
    if (reason := _why_unread(dot and end)) is not None:
        return reason
    return None if _is(entry.is_file) else "missing"  # as the target of a broken link


@cache
def _why_unread(end: str) -> Reason | None:
    """Return why files are no images, by what follows the last dot of their names."""
    suffix = f".{end}" if end else ""
    if suffix.lower() in image_suffixes():
        return None
    package = package_for(suffix)
    return f"needing {package}" if package else "of another type"


def _is(kind: Callable[[], bool]) -> bool:
    """Ask an entry for its kind; a link to itself is of none."""
    try:
        return kind()
    except OSError:
        return False


def why_not_entered(folder: Path) -> Reason | None:
    """Return why the files of a folder are no data; None if they may be.

    Example:
        >>> why_not_entered(Path("images/.cache"))
        'hidden'
    """
    if _is_hidden(folder.name):
        return "hidden"
    return "written by netfission" if is_output(folder) else None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN
