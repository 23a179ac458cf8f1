"""Names of image files in a list, such as on standard input."""

import codecs
import io
import os
from collections.abc import Iterator

from netfission.data.formats import MissingPackageError, open_image
from netfission.utils.errors import invalid

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_names(content: bytes) -> list[str]:
    """Return the names in a list of files, one per line; empty lines are skipped.

    Args:
        content: in the encoding of file names, with or without the byte order mark of UTF-8, or UTF-16 with
            its mark, as PowerShell writes. Lines end in LF or CRLF.

    Raises:
        ValueError: it is not a list but an image, or other binary data.

    Example:
        >>> read_names(b"a.png\\r\\nb.png\\r\\n")
        ['a.png', 'b.png']
    """
    try:
        if content.startswith(_UTF_16):
            lines = content.decode("utf-16").split("\n")
        else:
            lines = [os.fsdecode(line) for line in content.removeprefix(codecs.BOM_UTF8).split(b"\n")]
    except UnicodeDecodeError:
        lines = ["\0"]
    if any("\0" in line for line in lines):
        expected = "names of files on standard input, one per line"
        hint = "pass the name of the file in place of -"
        raise invalid("images", expected, found=_describe(content), hint=hint)
    return list(_names(lines))


def _names(lines: list[str]) -> Iterator[str]:
    for line in lines:
        # A name may end in a carriage return, too.
        name = line if os.path.lexists(line) else line.removesuffix("\r")
        if name:
            yield name


def _describe(content: bytes) -> str:
    """Say what was piped in place of names."""
    try:
        with open_image(io.BytesIO(content)) as image:
            return f"an image ({image.format})"
    except MissingPackageError:
        return "an image (HEIC)"
    except Exception:  # decoders raise errors of every kind
        return "binary data"
