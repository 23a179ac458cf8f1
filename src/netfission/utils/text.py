"""Plain text: aligned columns, printable names, counted nouns, rounded numbers."""

import unicodedata
from collections.abc import Sequence
from math import inf

# Characters that turn the direction of writing.
_TURNING = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_ALMOST_0 = 1e-9  # what float32 may round to 0, and its difference from 1


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


def percent(share: float, digits: int = 2) -> str:
    """Write a share in percent, without the sign; see `rounded`.

    Example:
        >>> percent(0.5), percent(0.99999), percent(1.0), percent(0.00001, digits=1)
        ('50.00', '> 99.99', '100.00', '< 0.1')
    """
    return rounded(100 * share, digits, most=100)


def rounded(number: float, digits: int, *, most: float = inf) -> str:
    """Write a number, rounded; 0 and `most` stand for nothing but themselves.

    Args:
        number: from 0 to `most`.
        digits: number of digits after the point.
        most: largest possible number, such as 1 for a share.

    Example:
        >>> rounded(0.12345, 3), rounded(0.0001, 3), rounded(0.0, 3), rounded(0.9999, 3, most=1)
        ('0.123', '< 0.001', '0.000', '> 0.999')
    """
    text, step = f"{number:.{digits}f}", 10.0**-digits
    if number > 0 == float(text):
        return f"< {step:.{digits}f}"
    if number < most == float(text):
        return f"> {most - step:.{digits}f}"
    return text


def unsaturated(probability: float) -> float:
    """Return a softmax's probability; one that float32 rounded to 0 or 1 becomes almost 0 or almost 1.

    Example:
        >>> percent(unsaturated(1.0)), unsaturated(0.25)
        ('> 99.99', 0.25)
    """
    return min(max(probability, _ALMOST_0), 1 - _ALMOST_0)
