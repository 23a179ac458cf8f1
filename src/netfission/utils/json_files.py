"""Read files of JSON: whole, undamaged, and of declared types."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from netfission.utils.checksums import parse_json
from netfission.utils.errors import first_line, invalid
from netfission.utils.files import has_file
from netfission.utils.typed import typed

T = TypeVar("T")


def read_json(path: Path, kind: type[T], *, hint: str = "") -> T | None:
    """Read a file as `kind`; return None if there is no file.

    Args:
        path: path of the file.
        kind: a dataclass, or a list, dict or tuple of dataclasses.
        hint: what to do about a damaged file, for the message.

    Raises:
        ValueError: it is no regular file, is not JSON, differs from its checksum, or a value is missing,
            unknown or of another type.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "counts.json")
        ...     _ = path.write_text('{"right": 3}')
        ...     read_json(path, dict[str, int])
        {'right': 3}
    """
    if not has_file(path):
        return None
    with named_damage(path, hint):
        return typed(kind, parse_json(path.read_bytes()))


@contextmanager
def named_damage(path: Path, hint: str = "") -> Iterator[None]:
    """Say of which file it is that content is damaged.

    Args:
        path: path of the file.
        hint: what to do about it.

    Raises:
        ValueError: reading the content raises a ValueError.

    Example:
        >>> with named_damage(Path("n.json")):
        ...     typed(int, "x", "n")
        Traceback (most recent call last):
        ValueError: n.json must be a valid JSON file, got damaged content (n must be an integer, got "x")
    """
    try:
        yield
    except (ValueError, RecursionError) as error:
        found = f"damaged content ({first_line(error)})"
        raise invalid(str(path), "a valid JSON file", found=found, hint=hint) from error
