"""Content of JSON and YAML files, checked and turned into dataclasses: every value has its declared type."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from netfission.utils.errors import check_choice, invalid, shortened

T = TypeVar("T")

# Plain types in words.
PLAIN = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def typed(kind: type[T], content: Any, where: str = "") -> T:
    """Return the content of a file as `kind`.

    Args:
        kind: a dataclass, a plain type, Literal, a list, tuple or dict of these, or a union of plain types.
        content: what `json.loads` or `yaml.safe_load` returned.
        where: name of the entry of the file that holds the content, for messages.

    Raises:
        ValueError: a value is missing, unknown or of another type; the message names it.

    Example:
        >>> typed(list[float], [1, "1e-3"])
        [1.0, 0.001]
        >>> typed(list[int], [1, 2.5], "sizes")
        Traceback (most recent call last):
        ValueError: sizes[1] must be an integer, got 2.5
    """
    return cast(T, _value(kind, content, where))


@cache  # a grid reads thousands of configs and records
def type_hints(kind: type) -> Mapping[str, Any]:
    """Return the types of a dataclass's fields by their names."""
    return get_type_hints(kind)


def _value(kind: Any, content: Any, where: str) -> Any:
    if is_dataclass(kind):
        return _record(cast(type, kind), content, where)
    if kind is Any:
        return content
    arguments = get_args(kind)
    origin = get_origin(kind)
    if origin in (Union, UnionType):  # `Literal[...] | None` is a Union
        return _one_of(arguments, content, where)
    if origin is Literal:
        if isinstance(content, str):
            return check_choice(_entry(where), content, arguments)
        return _checked(False, content, where, f"one of {', '.join(arguments)}")
    if origin in (list, tuple):
        _checked(isinstance(content, list | tuple), content, where, "a list")
        return origin(_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(content))
    if origin is dict:
        _checked(isinstance(content, dict), content, where, "an object")
        return {
            _key(arguments[0], name, where): _value(arguments[1], item, f"{where}.{name}")
            for name, item in content.items()
        }
    if kind is float:
        content = _number(content)
    return _checked(_is(content, kind), content, where, PLAIN[kind])


def _key(kind: Callable[[str], Any], name: str, where: str) -> Any:
    """Return a key as `kind`; the keys of JSON are text."""
    try:
        return kind(name)
    except ValueError:
        raise invalid(f"key of {_entry(where)}", PLAIN[cast(type, kind)], name) from None


def _number(content: Any) -> Any:
    """Return integers as floats, and so numbers that YAML 1.1 reads as text: 1e-3 and 1E6, without a dot."""
    written = isinstance(content, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", content)
    integer = isinstance(content, int) and not isinstance(content, bool)
    if not (written or integer):
        return content
    try:
        return float(content)
    except OverflowError:  # an integer beyond the range of floats
        return content


def _is(content: Any, kind: type) -> bool:
    return isinstance(content, kind) and (kind is bool or not isinstance(content, bool))


def _one_of(kinds: Sequence[Any], content: Any, where: str) -> Any:
    """Return the content as one of several types: None, one list, and plain types or one Literal."""
    if content is None and NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not NoneType]
    lists = [kind for kind in others if get_origin(kind) in (list, tuple)]
    if lists and isinstance(content, list | tuple):
        return _value(lists[0], content, where)
    others = [kind for kind in others if kind not in lists] or lists
    if len(others) == 1:
        return _value(others[0], content, where)
    expected = " or ".join(PLAIN[kind] for kind in others)
    return _checked(any(_is(content, kind) for kind in others), content, where, expected)


def _record(kind: type, content: Any, where: str) -> Any:
    _checked(isinstance(content, dict), content, where, "an object")
    known = {field.name: field for field in fields(kind)}
    for name in content:
        check_choice(f"entry of {where.lstrip('.')}" if where else "entry", name, known)
    for name, field in known.items():
        if name not in content and field.default is MISSING and field.default_factory is MISSING:
            raise invalid(_entry(f"{where}.{name}"), "given", found="nothing")
    hints = type_hints(kind)
    return kind(**{name: _value(hints[name], item, f"{where}.{name}") for name, item in content.items()})


def _entry(where: str) -> str:
    return where.lstrip(".") or "the file"


def _checked(fits: bool, content: Any, where: str, expected: str) -> Any:
    if not fits:
        import json

        raise invalid(_entry(where), expected, found=shortened(json.dumps(content, default=str)))
    return content
