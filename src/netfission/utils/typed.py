"""What JSON or YAML hold, read as the dataclass that wrote it: every value of its declared type."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


def read_json(path: Path, kind: type[T], *, besides: tuple[str, ...] = ()) -> T | None:
    """Read a file as `kind`; None where there is no file.

    Args:
        path: of the file.
        kind: a dataclass, or a list, dict or tuple of such.
        besides: entries of the outermost object that are no fields of `kind`.

    Raises:
        ValueError: it is damaged: no JSON, or a value is missing, unknown or of another type.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            content = {name: value for name, value in content.items() if name not in besides}
        return typed(kind, content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


def typed(kind: type[T], content: Any, where: str = "") -> T:
    """What a file held, as `kind`.

    Args:
        kind: a dataclass, a plain type, Literal, a list, tuple or dict of such, or a union of plain types.
        content: as `json.loads` or `yaml.safe_load` give it.
        where: it stands in the file, for messages.

    Raises:
        ValueError: a value is missing, unknown or of another type; names it and what it takes.
    """
    return cast(T, _value(kind, content, where))


def _value(kind: Any, content: Any, where: str) -> Any:
    if is_dataclass(kind):
        return _record(cast(type, kind), content, where)
    if kind is Any:
        return content
    arguments = get_args(kind)
    origin = get_origin(kind)
    if origin is UnionType:
        return _one_of(arguments, content, where)
    if origin is Literal:
        return _checked(content in arguments, content, where, f"one of {', '.join(map(repr, arguments))}")
    if origin in (list, tuple):
        _checked(isinstance(content, list | tuple), content, where, "a list")
        return origin(_value(arguments[0], each, f"{where}[{place}]") for place, each in enumerate(content))
    if origin is dict:
        _checked(isinstance(content, dict), content, where, "an object")
        to_key: Callable[[str], Any] = arguments[0]  # JSON's keys are text, whatever they were
        return {to_key(name): _value(arguments[1], each, f"{where}.{name}") for name, each in content.items()}
    if kind is float:
        content = _number(content)
    return _checked(_is(content, kind), content, where, PLAIN[kind])


# Plain types in words.
PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _number(content: Any) -> Any:
    """Whole numbers as floats, and what YAML 1.1 takes for text: 1e-3 and 1E6, without a dot."""
    written = isinstance(content, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", content)
    whole = isinstance(content, int) and not isinstance(content, bool)
    return float(content) if written or whole else content


def _is(content: Any, kind: type) -> bool:
    return isinstance(content, kind) and (kind is bool or not isinstance(content, bool))


def _one_of(kinds: Sequence[Any], content: Any, where: str) -> Any:
    """The content as one of several types, of which all but None are plain where there are several."""
    if content is None and NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not NoneType]
    if len(others) == 1:
        return _value(others[0], content, where)
    takes = " or ".join(PLAIN[kind] for kind in others)
    return _checked(any(_is(content, kind) for kind in others), content, where, takes)


def _record(kind: type, content: Any, where: str) -> Any:
    _checked(isinstance(content, dict), content, where, "an object")
    known = {field.name: field for field in fields(kind)}
    for name in content:
        if name not in known:
            raise ValueError(f"{where}.{name}".lstrip(".") + f": is not known to {kind.__name__}")
    for name, field in known.items():
        if name not in content and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where}.{name}".lstrip(".") + ": is missing")
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], each, f"{where}.{name}") for name, each in content.items()})


def _checked(fits: bool, content: Any, where: str, takes: str) -> Any:
    if not fits:
        raise ValueError(
            f"{where.lstrip('.') or 'the file'}: takes {takes}, not {json.dumps(content, default=str):.40}"
        )
    return content
