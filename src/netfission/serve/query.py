"""Read the parameters of a request's query."""

from collections.abc import Sequence

from starlette.datastructures import QueryParams

from netfission.serve.limits import refusal
from netfission.utils.errors import did_you_mean, shortened


def check_query(query: QueryParams, known: Sequence[str]) -> None:
    """Refuse parameters that have no meaning, or that stand there twice.

    Args:
        query: of the request.
        known: names of parameters.

    Raises:
        HTTPException: there are such parameters (400).

    Example:
        >>> check_query(QueryParams("coverage=0.9"), ["coverage"])
    """
    names = [name for name, _ in query.multi_items()]
    for name in names:
        if name not in known:
            expected = f"of {', '.join(known)}" if known else "left out for this network"
            suggestion = did_you_mean(name, known)
            raise refusal(
                400, "query", expected, f"{shortened(repr(name))}{suggestion and f'; {suggestion}'}"
            )
        if names.count(name) > 1:
            raise refusal(400, name, "given once", f"{names.count(name)} times")


def read_flag(query: QueryParams, name: str) -> bool:
    """Return whether a parameter is 1, not 0 or left out; HTTPException (400) if it is something else.

    Example:
        >>> read_flag(QueryParams("all=1"), "all")
        True
    """
    value = query.get(name, "0")
    if value not in ("0", "1"):
        raise refusal(400, name, "0 or 1", shortened(repr(value)))
    return value == "1"


def read_number(query: QueryParams, name: str) -> float | None:
    """Return a parameter's value, None if it is left out; HTTPException (400) if it is not a number.

    Example:
        >>> read_number(QueryParams("coverage=0.9"), "coverage")
        0.9
    """
    text = query.get(name)
    if text is None:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise refusal(400, name, "a number", shortened(repr(text))) from error
