"""Contents that are equal byte for byte, of files or in memory."""

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

T = TypeVar("T")
Content = str | memoryview  # the path of a file, or bytes in memory

_CHUNK = 4096  # bytes from the middle of a content that are compared first


def find_equal(
    items: Iterable[T],
    content: Callable[[T], Content | None],
    matters: Callable[[list[T]], bool] = lambda group: True,
) -> list[list[T]]:
    """Group items whose contents are equal.

    Sizes are compared first, then a piece from the middle, and whole contents only if both are equal.

    Args:
        items: the items.
        content: returns the content of an item; None if it has none.
        matters: whether it matters that the items of a group are equal. If it is False of a group, it must be
            False of each part of it. The contents of others are not read.

    Returns:
        Groups of at least two items, those that matter; an item whose content is unique, empty or unreadable
        is in none of them.

    Example:
        >>> find_equal(["one", "two", "one"], lambda text: memoryview(text.encode()))
        [['one', 'one']]
    """
    groups = [list(items)]
    for fingerprint in (_size, _middle, _digest):
        groups = [part for group in groups for part in _divide(group, content, fingerprint) if matters(part)]
    return groups


def _divide(
    items: list[T], content: Callable[[T], Content | None], fingerprint: Callable[[Content], Hashable | None]
) -> list[list[T]]:
    """Divide items into groups of equal fingerprints, without those that are alone or have none."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        found = content(item)
        mark = None if found is None else fingerprint(found)
        if mark is not None:
            groups.setdefault(mark, []).append(item)
    return [group for group in groups.values() if len(group) > 1]


def find_copies(files: Iterable[str], originals: Iterable[str]) -> list[str]:
    """Return which files have the same content as one of others.

    Args:
        files: paths of the files in question.
        originals: paths of the files that they may be copies of.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     a, b, c = (os.path.join(folder, name) for name in "abc")
        ...     _ = [Path(path).write_text(text) for path, text in ((a, "one"), (b, "two"), (c, "two"))]
        ...     [os.path.basename(path) for path in find_copies([a, b], [c])]
        ['b']
    """
    candidates, others = list(files), set(originals)
    in_question = set(candidates)
    groups = find_equal(
        dict.fromkeys([*candidates, *others]),
        lambda path: path,
        lambda group: not (in_question.isdisjoint(group) or others.isdisjoint(group)),
    )
    copies = {path for group in groups for path in group}
    return [path for path in candidates if path in copies]


def _size(content: Content) -> int | None:
    """Return the number of bytes; None if there are none or the file does not exist."""
    if isinstance(content, memoryview):
        return content.nbytes or None
    try:
        return os.stat(content).st_size or None
    except OSError:
        return None


def _middle(content: Content) -> bytes | None:
    """Return the hash of a piece from the middle, which takes less memory than the piece."""
    if isinstance(content, memoryview):
        start = max(0, content.nbytes - _CHUNK) // 2
        return hashlib.sha256(content[start : start + _CHUNK]).digest()
    try:
        with open(content, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _CHUNK) // 2)
            return hashlib.sha256(stream.read(_CHUNK)).digest()
    except OSError:
        return None


def _digest(content: Content) -> bytes | None:
    if isinstance(content, memoryview):
        return hashlib.sha256(content).digest()
    try:
        with open(content, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError:
        return None
