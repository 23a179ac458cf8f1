import json
from dataclasses import asdict, dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfission.utils.json_files import read_json


@dataclass(frozen=True)
class Leaf:
    name: str
    share: float
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Tree:
    n: int
    leaves: list[Leaf]
    order: tuple[int, ...]
    best: Leaf | None
    by_size: dict[int, float] = field(default_factory=dict)


FLOATS = st.floats(allow_nan=False)
LEAVES = st.builds(Leaf, st.text(), FLOATS, st.sampled_from(["a", "b"]))
TREES = st.builds(
    Tree,
    st.integers(),
    st.lists(LEAVES, max_size=3),
    st.lists(st.integers(), max_size=3).map(tuple),
    st.none() | LEAVES,
    st.dictionaries(st.integers(), FLOATS, max_size=3),
)
GOOD = asdict(Tree(3, [Leaf("x", 0.5)], (1, 0), None))


@given(tree=TREES)
def test_what_is_written_is_read_back(tree, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "tree.json"
    path.write_text(json.dumps(asdict(tree)), encoding="utf-8")
    assert read_json(path, Tree) == tree


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD | {"n": 3.5}, "n must be an integer, got 3.5"),
        (GOOD | {"n": True}, "n must be an integer, got true"),
        (GOOD | {"leaves": {}}, "leaves must be a list, got {}"),
        (
            GOOD | {"leaves": [{"name": "x", "share": "much"}]},
            r'leaves\[0\]\.share must be a number, got "much"',
        ),
        (GOOD | {"leaves": [{"share": 1.0}]}, r"leaves\[0\]\.name must be given, got nothing"),
        (
            GOOD | {"leaves": [{"name": "x", "share": 1, "kind": "c"}]},
            r"leaves\[0\]\.kind must be one of a, b, got 'c'\)$",
        ),
        (GOOD | {"order": [None]}, r"order\[0\] must be an integer, got null"),
        (GOOD | {"best": 1}, "best must be an object, got 1"),
        (GOOD | {"by_size": {"one": 1.0}}, "key of by_size must be an integer, got 'one'"),
        (GOOD | {"more": 1}, "entry must be one of n, leaves, order, best, by_size, got 'more'"),
        (
            GOOD | {"leaves": [{"nam": "x", "share": 1}]},
            r"entry of leaves\[0\] must be one of name, share, kind, got 'nam'; did you mean name\?\)$",
        ),
        ([], r"the file must be an object, got \[\]\)$"),
    ],
)
def test_damage_is_named_in_one_line(content, message, tmp_path):
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=rf"tree\.json must be a valid JSON file, got damaged content \({message}"
    ) as error:
        read_json(path, Tree)
    assert "\n" not in str(error.value)
