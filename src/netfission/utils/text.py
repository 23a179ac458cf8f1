"""Plain text: aligned columns, printable names, counted things, and the nearest known names."""

import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches


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


def check_choice(argument: str, value: str, known: Iterable[str]) -> str:
    """`value` if it is among `known`.

    Raises:
        ValueError: it is not; names the argument, the value and the nearest known names.
    """
    names = list(known)
    if value in names:
        return value
    near = get_close_matches(value, names, n=3, cutoff=0.5)
    some = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    hint = f"did you mean {' or '.join(near)}?" if near else f"takes one of {some}"
    raise ValueError(f"{argument}={value!r} is not known; {hint}")
