"""Checksums within files, by which a damaged file is found before its content is used.

A file holds the SHA-256 of its own bytes, with the checksum's digits taken as zeros. It is written with the
content at once, so that no crash separates the two, and it stays with a file that is copied or shared.
"""

import json
import re
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netfission.utils.errors import first_line, invalid

if TYPE_CHECKING:  # every command imports this file, and help needs no checksum
    import hashlib

NAME = "checksum"
_DIGITS = 64
BLANK = "sha256:" + "0" * _DIGITS  # what `stamp` fills in
# In JSON, in the header of safetensors, and as a comment of YAML.
_MARK = re.compile(rb'(?:"checksum": ?"|^# checksum: )sha256:([^"\n]{64})(?:"|$)', re.MULTILINE)
_METADATA = b'{"__metadata__":{'  # begins the header of a safetensors file
_HEAD = 4096  # bytes of a safetensors file, whose header begins with its metadata
_BLOCK = 2**20
_OTHER = "other content than its checksum stands for"


def stamp(content: bytes, *, last: bool = False) -> bytes:
    """Return the content of a file with its checksum in place of `BLANK` in its mark.

    Args:
        content: with a mark, such as `"checksum": "…"`.
        last: whether the mark is the last one that the content has, or the first.

    Example:
        >>> stamp(b'{"n": 3, "checksum": "' + BLANK.encode() + b'"}')[:41]
        b'{"n": 3, "checksum": "sha256:42b6b5b25b18'
    """
    mark = _mark(content, last=last)
    assert mark is not None
    digest = _sha256(content).hexdigest().encode()
    return content[: mark.start(1)] + digest + content[mark.end(1) :]


def stamp_json(text: str) -> str:
    """Return the text of a JSON object or list with its checksum as the last entry.

    Example:
        >>> text = stamp_json('{"n": 3}')
        >>> text[:20], parse_json(text)
        ('{"n": 3, "checksum":', {'n': 3})
        >>> parse_json(text.replace("3", "4", 1))
        Traceback (most recent call last):
        ValueError: checksum must be that of the content, got another; leave it out if you edited the file
    """
    body = text.rstrip()
    opening, closing = body[:-1].rstrip(), body[-1]
    indented = re.match(r"[{\[](\n *)", body)
    entry = f'"{NAME}": "{BLANK}"' if closing == "}" else f'{{"{NAME}": "{BLANK}"}}'
    comma = "" if opening in ("{", "[") else ","
    before, after = (indented[1], "\n") if indented else (" " if comma else "", "")
    marked = f"{opening}{comma}{before}{entry}{after}{closing}\n"
    return stamp(marked.encode(errors="backslashreplace"), last=True).decode()


def parse_json(text: str | bytes, besides: Collection[str] = ()) -> Any:
    """Return the content of a JSON file without its checksum.

    A file without a checksum is one that an earlier version or another program wrote, and is read as it is.

    Args:
        text: the file's.
        besides: names of entries of the outermost object that are left out, too.

    Raises:
        ValueError: it is no JSON, or differs from what its checksum stands for.
    """
    raw = text.encode(errors="backslashreplace") if isinstance(text, str) else text
    try:
        content, mark = json.loads(raw), _mark(raw, last=True)
    except RecursionError as error:
        raise invalid(
            "JSON", "nested less deeply", found="objects or lists within each other without end"
        ) from error
    is_marked = mark is not None or (isinstance(content, dict) and NAME in content)
    if is_marked and (mark is None or _differs(raw, mark)):
        raise _edited()
    if isinstance(content, dict):
        for name in (NAME, *besides):
            content.pop(name, None)
    elif mark is not None and isinstance(content, list):
        content.pop()
    return content


def check_text(content: bytes) -> None:
    """Check a text file that has its checksum as a comment, if it has one.

    Raises:
        ValueError: it differs from what its checksum stands for.

    Example:
        >>> content = stamp(f"epochs: 3\\n# checksum: {BLANK}\\n".encode())
        >>> check_text(content)
        >>> check_text(content.replace(b"3", b"4", 1))
        Traceback (most recent call last):
        ValueError: checksum must be that of the content, got another; leave it out if you edited the file
    """
    mark = _mark(content)
    if mark is not None and _differs(content, mark):
        raise _edited()


def check_tensors(path: Path) -> None:
    """Check a safetensors file that has its checksum in its metadata, if it has one.

    Raises:
        ValueError: it differs from what its checksum stands for.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
        mark = _mark(head)
        if mark is None:
            return
        digest = _sha256(_blanked(head, mark))
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest().encode() != mark[1]:
        hint = "restore it from a copy, or train the network again"
        raise invalid(str(path), "as it was written", found=_OTHER, hint=hint)


def add_metadata(content: bytes, name: str, value: str) -> bytes:
    """Return the content of a safetensors file that has metadata with one more entry, which comes first.

    The library writes several entries in any order, so that the same content has other bytes.

    Args:
        content: the file's.
        name: of the entry; plain ASCII as `value`, without quotes.
        value: of the entry.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].rstrip(b" ")
    assert header.startswith(_METADATA)
    header = _METADATA + f'"{name}":"{value}",'.encode() + header.removeprefix(_METADATA)
    header += b" " * (-len(header) % 8)  # tensors are aligned
    return len(header).to_bytes(8, "little") + header + content[end:]


def checksum_of(content: bytes) -> str:
    """Return the checksum that a JSON file holds, as digits; an empty text if it holds none.

    Example:
        >>> checksum_of(stamp_json("{}").encode())[:8], checksum_of(b"{}")
        ('1f04d3a9', '')
    """
    mark = _mark(content, last=True)
    return "" if mark is None else mark[1].decode(errors="replace")


def _edited() -> ValueError:
    return invalid(
        "checksum", "that of the content", found="another", hint="leave it out if you edited the file"
    )


def _mark(content: bytes, *, last: bool = False) -> re.Match[bytes] | None:
    if last:
        return next(iter(deque(_MARK.finditer(content), maxlen=1)), None)
    return _MARK.search(content)


def _differs(content: bytes, mark: re.Match[bytes]) -> bool:
    return _sha256(_blanked(content, mark)).hexdigest().encode() != mark[1]


def _sha256(content: bytes) -> "hashlib._Hash":
    import hashlib

    return hashlib.sha256(content)


def _blanked(content: bytes, mark: re.Match[bytes]) -> bytes:
    return content[: mark.start(1)] + b"0" * _DIGITS + content[mark.end(1) :]


def is_archive(file: Path) -> bool:
    """Whether a file is a zip archive, damaged or not.

    Example:
        >>> is_archive(Path("no such file"))
        False
    """
    from zipfile import BadZipFile, is_zipfile

    try:
        return is_zipfile(file)
    except BadZipFile:  # of several disks, as a damaged end may say
        return True


def archive_damage(file: Path) -> str:
    """Return what is damaged in an archive, by its checksums; an empty text if nothing is.

    Example:
        >>> archive_damage(Path("no such file")) != ""
        True
    """
    from zipfile import ZipFile

    try:
        with ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged archive may raise anything
        return first_line(error)
    return f"the checksum of {damaged} differs" if damaged is not None else ""
