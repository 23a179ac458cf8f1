"""Plain text: aligned columns, printable names, counted nouns."""

import unicodedata
from collections.abc import Sequence

# Characters that turn the direction of writing.
_TURNING = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows as lines of columns two spaces apart, the first to the left, the others to the right.

    Args:
        rows: the cells; no row is longer than the first.

    Example:
        >>> print(align_columns([["network", "MACs"], ["single", "12"]]))
        network  MACs
        single     12
    """
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def printable(text: str) -> str:
    """Return text with escapes in place of characters that control a terminal: a newline as `\\n`.

    The halves of surrogate pairs, which stand for bytes that are not text in file names, are escaped too.

    Example:
        >>> print(printable("cat\\t.png"))
        cat\\t.png
    """
    return "".join(_visible(letter) for letter in text)


def _visible(letter: str) -> str:
    escaped = unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in _TURNING
    return letter.encode("unicode_escape").decode() if escaped else letter


def count_noun(number: int, noun: str) -> str:
    """Write a number with its noun, in the plural unless the number is 1.

    Example:
        >>> count_noun(1, "seed"), count_noun(1200, "seed")
        ('1 seed', '1,200 seeds')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
