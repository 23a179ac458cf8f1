"""Read YAML from people and files: data alone, each key once, and no more than its text has room for."""

from pathlib import Path
from typing import Any

from netfission.utils.checksums import check_text
from netfission.utils.errors import invalid

_LONGEST = 2**20  # bytes of a file
_MOST = 100_000  # values, each as often as its aliases repeat it


def read_text(path: Path) -> str:
    """Return the text of a file that a person wrote; a device, which may have no end, is no such file.

    Raises:
        OSError: it cannot be read.
        ValueError: it has more than a mebibyte, is not UTF-8, or differs from a checksum in it.
    """
    with path.open("rb") as file:
        content = file.read(_LONGEST + 1)
    if len(content) > _LONGEST:
        raise invalid("it", f"at most {_LONGEST:,} bytes", found="more")
    check_text(content)
    return content.decode()


def parse_yaml(text: str) -> Any:
    """Return what a text of YAML holds; None if it is empty.

    Args:
        text: one document.

    Raises:
        ValueError: it is no YAML, a mapping has a key twice, of which the last would win, a value holds
            itself, or aliases repeat values until there are more than 100,000. The message is one line.

    Example:
        >>> parse_yaml("{epochs: 3, stages: [layer1, layer2]}")
        {'epochs': 3, 'stages': ['layer1', 'layer2']}
        >>> parse_yaml("{epochs: 3, epochs: 4}")
        Traceback (most recent call last):
        ValueError: epochs must be given once, got it twice
    """
    import yaml  # slow to import, and most commands read none

    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        _count(root, {})
        return None if root is None else loader.construct_document(root)
    except RecursionError as error:
        raise invalid("YAML", "nested less deeply", found="too many levels") from error
    except yaml.YAMLError as error:
        raise invalid("text", "YAML", found=" ".join(str(error).split())) from error


def _count(node: Any, known: dict[int, int]) -> int:
    """Return the number of values of a node, those of an alias each time.

    Args:
        node: of the document; None if it is empty.
        known: `id` of the nodes that were entered → their number; 0 until they are left.

    Raises:
        ValueError: see `parse_yaml`.
    """
    if not isinstance(value := getattr(node, "value", None), list):  # a scalar, or no node
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise invalid("alias", "outside of what it names", found="one within it")
        return known[id(node)]  # another alias of it
    known[id(node)] = 0
    total = 1
    keys: set[str] = set()
    for entry in value:
        total += sum(_count(inner, known) for inner in (entry if isinstance(entry, tuple) else (entry,)))
        if isinstance(entry, tuple) and isinstance(key := entry[0].value, str):
            if key in keys:
                raise invalid(key, "given once", found="it twice")
            keys.add(key)
    if total > _MOST:
        raise invalid("YAML", f"at most {_MOST:,} values", found="more, as aliases repeat them")
    known[id(node)] = total
    return total
