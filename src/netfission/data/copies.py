"""Files that are copies of others, byte for byte."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

_CHUNK = 4096  # bytes from the middle of a file that are compared first


def find_copies(files: Iterable[Path], originals: Iterable[Path]) -> list[Path]:
    """Return which files have the same content as one of others.

    Sizes are compared first, then a piece from the middle, and whole contents only if both are equal.

    Args:
        files: the files in question.
        originals: the files that they may be copies of.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     a, b, c = (Path(folder, name) for name in "abc")
        ...     _ = a.write_text("one"), b.write_text("two"), c.write_text("two")
        ...     [path.name for path in find_copies([a, b], [c])]
        ['b']
    """
    candidates, others = list(files), list(originals)
    for fingerprint in (_size, _middle, _digest):
        if not candidates:
            break
        marks = {path: fingerprint(path) for path in dict.fromkeys([*candidates, *others])}
        shared = {marks[path] for path in candidates} & {marks[path] for path in others} - {None}
        candidates, others = (
            [path for path in paths if marks[path] in shared] for paths in (candidates, others)
        )
    return candidates


def _size(file: Path) -> int | None:
    """Return the size of a file; None if it is empty or does not exist."""
    try:
        return file.stat().st_size or None
    except OSError:
        return None


def _middle(file: Path) -> bytes | None:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - _CHUNK) // 2)
            return stream.read(_CHUNK)
    except OSError:
        return None


def _digest(file: Path) -> bytes | None:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError:
        return None
