"""Which files of a folder are images, and which are left out, by reason."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

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
    for path, reason in sorted(_walk(folder)):
        reason = reason or _why_no_image(path)
        if reason is None:
            found.images.append(path)
        else:
            found.left_out.setdefault(reason, []).append(path)
    return found


def _why_no_image(path: Path) -> Reason | None:
    if path.suffix.lower() not in image_suffixes():
        package = package_for(path.suffix)
        return f"needing {package}" if package else "of another type"
    return None if path.is_file() else "missing"  # as the target of a broken link


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
    return (path for path, reason in _walk(folder) if reason is None)


def _walk(folder: Path) -> Iterator[tuple[Path, Reason | None]]:
    """Yield the files below a folder, and the folders that are not entered with the reason."""
    seen = set(map(str, Path(os.path.realpath(folder)).parents))
    for parent, folders, names in os.walk(folder, followlinks=True):
        real_path = os.path.realpath(parent)
        if real_path in seen:
            folders.clear()
            continue
        seen.add(real_path)
        entered = []
        for name in folders:
            path = Path(parent, name)
            if reason := why_not_entered(path):
                yield path, reason
            else:
                entered.append(path)
        # In a fixed order, and folders before links to them.
        folders[:] = [path.name for path in sorted(entered, key=lambda path: (path.is_symlink(), path))]
        for name in names:
            yield Path(parent, name), "hidden" if _is_hidden(name) else None


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
