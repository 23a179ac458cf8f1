"""Plain text for terminals."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
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
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )
