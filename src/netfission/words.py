"""Words of messages: what is known where something else was named, and numbers of things."""

from collections.abc import Iterable
from difflib import get_close_matches


def counted(number: int, thing: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def one_of(argument: str, value: str, known: Iterable[str]) -> str:
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
