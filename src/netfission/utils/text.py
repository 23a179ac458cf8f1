"""Plain text: aligned columns, printable names, counted things."""

import unicodedata
from collections.abc import Sequence


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Lines with columns two spaces apart, the first to the left and the others to the right.

    Args:
        rows: cells; the first row has as many as any, others may end early.
    """
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def printable(text: str) -> str:
    """Text whose control characters, which would steer a terminal, stand as escapes: a newline as `\\n`.

    Likewise what is no character at all, as in names of files that are not text.
    """
    return "".join(_visible(letter) for letter in text)


def _visible(letter: str) -> str:
    steers = unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in _TURNING
    return letter.encode("unicode_escape").decode() if steers else letter


# Characters that turn the direction of writing.
_TURNING = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def count_noun(number: int, thing: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
