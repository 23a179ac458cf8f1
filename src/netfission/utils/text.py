"""Plain text: aligned columns, printable names, counted nouns, rounded numbers, terminals."""

import codecs
import io
import re
import unicodedata
from collections.abc import Sequence
from math import inf
from pathlib import PurePath
from typing import TextIO

# Characters that turn the direction of writing.
_TURNING = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
# What is written to terminals that lack a character; other characters are escaped.
_STAND_INS = {
    "±": "+-",
    "×": "x",
    "·": "*",
    "–": "-",
    "−": "-",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    "…": "...",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
}
_STAND_IN = "netfission.stand_in"  # name of the error handler of encoding
_CAN_FAIL = ("strict", "surrogateescape", "backslashreplace")  # Python's handlers of standard streams
_LONG = 1e4  # numbers from here on are written in scientific notation
_ALMOST_0 = 1e-9  # what float32 may round to 0, and its difference from 1


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows as lines of columns two spaces apart, the first to the left, the others to the right.

    Cells are written as `printable` text, as some are names that a user's files have.

    Args:
        rows: the cells; no row is longer than the first.

    Example:
        >>> print(align_columns([["network", "MACs"], ["single", "12"]]))
        network  MACs
        single     12
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def as_text(name: str) -> str:
    """Return the name of a file or folder as text: bytes that are not UTF-8 become escapes such as `\\xe9`.

    Python holds such bytes as halves of surrogate pairs, which cannot be written as UTF-8.

    Example:
        >>> print(as_text(b"ros\\xe9".decode(errors="surrogateescape")), as_text("rosé"))
        ros\\xe9 rosé
    """
    return re.sub("[\udc80-\udcff]+", _decoded, name)


def _decoded(surrogates: re.Match[str]) -> str:
    return surrogates[0].encode("ascii", "surrogateescape").decode("utf-8", "backslashreplace")


def printable(text: str | PurePath) -> str:
    """Return text or a path with escapes in place of characters that control a terminal: a newline as `\\n`.

    Bytes of file names that are not UTF-8 are escaped, too; see `as_text`.

    Example:
        >>> print(printable("cat\\t.png"))
        cat\\t.png
    """
    shown = as_text(str(text))
    # Most texts have nothing to escape, and none of these characters counts as printable.
    return shown if shown.isprintable() else "".join(map(_visible, shown))


def as_markdown(text: str) -> str:
    """Return Markdown that shows a text as it is, on one line: no markup, no HTML, and no control characters.

    Example:
        >>> print(as_markdown("a|b <i>"))
        a\\|b \\<i\\>
    """
    return re.sub(r"([\\`*_\[\]<>#+|$~&])", r"\\\1", printable(text))


def _visible(letter: str) -> str:
    escaped = unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in _TURNING
    return letter.encode("unicode_escape").decode() if escaped else letter


def accept_all_text(stream: TextIO | None) -> None:
    """Let a stream of any encoding accept any text, such as standard output on a terminal without `±`.

    Characters that the encoding lacks are written as ASCII that looks alike, or else as escapes.

    Args:
        stream: left as it is if its user has chosen what happens to such characters, or if it is not a
            `TextIOWrapper`.

    Example:
        >>> stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        >>> accept_all_text(stream)
        >>> _ = stream.write("16.1 ± 0.3 → rosé")
        >>> stream.flush()
        >>> print(stream.buffer.getvalue().decode())
        16.1 +- 0.3 -> ros\\xe9
    """
    if isinstance(stream, io.TextIOWrapper) and stream.errors in _CAN_FAIL:
        stream.reconfigure(errors=_STAND_IN)


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_STAND_INS.get(letter) or _escape(letter) for letter in letters), error.end


def _escape(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("ascii", "backslashreplace").decode()


codecs.register_error(_STAND_IN, _stand_in)


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


def decimal(number: float, digits: int, sign: str = "") -> str:
    """Write a number with `digits` after the point; one of 10,000 or more in scientific notation.

    Args:
        number: any.
        digits: number of digits after the point.
        sign: "+" to write the sign of a positive number, too.

    Example:
        >>> decimal(4.95, 3), decimal(0.5, 1, "+"), decimal(5.79e27, 4)
        ('4.950', '+0.5', '5.79e+27')
    """
    return f"{number:{sign}.{digits}f}" if abs(number) < _LONG else f"{number:{sign}.2e}"


def minus(number: str) -> str:
    """Return the text of a number with a minus sign, which is longer than a hyphen, for people to read.

    Example:
        >>> minus("-0.5"), minus("1.2e-05")
        ('−0.5', '1.2e−05')
    """
    return number.replace("-", "−")


def unsaturated(probability: float) -> float:
    """Return a softmax's probability; one that float32 rounded to 0 or 1 becomes almost 0 or almost 1.

    Example:
        >>> percent(unsaturated(1.0)), unsaturated(0.25)
        ('> 99.99', 0.25)
    """
    return min(max(probability, _ALMOST_0), 1 - _ALMOST_0)


def exit_names(exits: int, linear: int) -> list[str]:
    """Return the names of exits, of which the last `linear` ones are linear exits.

    Example:
        >>> exit_names(2, linear=1)
        ['exit 0', 'exit 1 (linear)']
    """
    return [f"exit {number}{' (linear)' if number >= exits - linear else ''}" for number in range(exits)]
