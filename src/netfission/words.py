"""How a request that names something unknown is answered."""

from collections.abc import Iterable
from difflib import get_close_matches


def one_of(argument: str, value: str, known: Iterable[str]) -> str:
    """`value` if it is among `known`.

    Raises:
        ValueError: it is not; names the argument, the value and the nearest known names.
    """
    names = list(known)
    if value in names:
        return value
    near = get_close_matches(value, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"takes one of {', '.join(names[:12])}"
    raise ValueError(f"{argument}={value!r} is not known; {hint}")
