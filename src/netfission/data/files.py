"""Which files of a folder are images, and which are left out, by reason."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from netfission.data.formats import image_suffixes, package_for
from netfission.utils.outputs import is_output

# Why a file or folder is no image: "hidden", "written by netfission", "of another type", "needing PACKAGE" or
# "missing". The words stand after its number: "3 hidden".
Reason = str

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

    Attributes:
        images: the image files, sorted.
        left_out: reason → files and folders left out for it, sorted; no reason without a path.

    Example:
        >>> FoundImages([Path("a.png")], {"hidden": [Path(".b.png")]}).counts()
        {'hidden': 1}
    """

    images: list[Path] = field(default_factory=list)
    left_out: dict[Reason, list[Path]] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return how many files and folders are left out for each reason."""
        return {reason: len(paths) for reason, paths in self.left_out.items()}


def find_images(folder: Path) -> FoundImages:
    """Find the image files below a folder, by the ends of their names; none is opened.

    An image is what the installed Pillow reads, see `image_suffixes`. Linked folders count as any other, each
    once, except those that lead back to a folder above. A hidden folder, or one that netfission has written,
    counts as one path left out.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as temporary:
        ...     for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png"):
        ...         Path(temporary, name).touch()
        ...     found = find_images(Path(temporary))
        >>> [path.name for path in found.images], found.counts()
        (['a.JPG', 'b.png'], {'hidden': 1, 'of another type': 1})
    """
    found = FoundImages()
    # As paths are sorted: by folder, then by name.
    walked = sorted(_walk(str(folder)), key=lambda entry: entry.path.replace(os.sep, "\0"))
    for entry in walked:
        reason = entry.reason or _why_no_image(entry)
        if reason is None:
            found.images.append(Path(entry.path))
        else:
            found.left_out.setdefault(reason, []).append(Path(entry.path))
    return found


class _Entry(NamedTuple):
    """What is in a folder: a file, or a folder that is not entered, with the reason.

    Strings and what the listing of a folder tells, since a `Path` and a look at each file take most of the
    time of a large folder.
    """

    path: str
    is_file: bool
    reason: Reason | None = None


def _why_no_image(entry: _Entry) -> Reason | None:
    suffix = "." + entry.path.rpartition(".")[2]
    if suffix.lower() not in image_suffixes():
        package = package_for(suffix)
        return f"needing {package}" if package else "of another type"
    return None if entry.is_file else "missing"  # as the target of a broken link


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield the paths below a folder that are not folders, without hidden ones.

    Linked folders count as any other, each once, even if several links lead to it. Folders that netfission
    has written are left out.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Path(folder, "a.png").touch()
        ...     Path(folder, ".hidden").touch()
        ...     print([path.name for path in walk_files(Path(folder))])
        ['a.png']
    """
    return (Path(entry.path) for entry in _walk(str(folder)) if entry.reason is None)


def has_file(folder: Path, suffix: str) -> bool:
    """Return whether there is a file below a folder whose name ends so; hidden ones do not count.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Path(folder, "a.png").touch()
        ...     print(has_file(Path(folder), ".png"), has_file(Path(folder), ".parquet"))
        True False
    """
    return any(entry.reason is None and entry.path.endswith(suffix) for entry in _walk(str(folder)))


def _walk(folder: str) -> Iterator[_Entry]:
    """Yield the files below a folder, and the folders that are not entered with the reason."""
    return _walk_into(folder, set(map(str, Path(os.path.realpath(folder)).parents)))


def _walk_into(folder: str, seen: set[str]) -> Iterator[_Entry]:
    """Walk a folder unless it is one of those seen, by their real paths, to which it is added."""
    real_path = os.path.realpath(folder)
    if real_path in seen:
        return
    seen.add(real_path)
    try:
        with os.scandir(folder) as listing:
            entries = list(listing)
    except OSError:  # no folder, or one that may not be read
        return
    entered = []
    for entry in entries:
        if not entry.is_dir():
            yield _Entry(entry.path, entry.is_file(), "hidden" if _is_hidden(entry.name) else None)
        elif reason := why_not_entered(Path(entry.path)):
            yield _Entry(entry.path, is_file=False, reason=reason)
        else:
            entered.append(entry)
    # In a fixed order, and folders before links to them.
    for entry in sorted(entered, key=lambda entry: (entry.is_symlink(), entry.name)):
        yield from _walk_into(entry.path, seen)


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
