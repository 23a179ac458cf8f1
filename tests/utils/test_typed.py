import json
from dataclasses import asdict, dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfission.utils.typed import read_json


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
        (GOOD | {"n": 3.5}, "n: takes a whole number, not 3.5"),
        (GOOD | {"n": True}, "n: takes a whole number, not true"),
        (GOOD | {"leaves": {}}, "leaves: takes a list, not {}"),
        (
            GOOD | {"leaves": [{"name": "x", "share": "much"}]},
            r'leaves\[0\]\.share: takes a number, not "much"',
        ),
        (GOOD | {"leaves": [{"share": 1.0}]}, r"leaves\[0\]\.name: is missing"),
        (
            GOOD | {"leaves": [{"name": "x", "share": 1, "kind": "c"}]},
            "kind: takes one of 'a', 'b', not \"c\"",
        ),
        (GOOD | {"order": [None]}, r"order\[0\]: takes a whole number, not null"),
        (GOOD | {"best": 1}, "best: takes an object, not 1"),
        (GOOD | {"by_size": {"one": 1.0}}, "invalid literal"),
        (GOOD | {"more": 1}, "more: is not known to Tree"),
        ([], "the file: takes an object, not "),
    ],
)
def test_damage_is_named_in_one_line(content, message, tmp_path):
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"tree\.json: cannot be read \(.*{message}") as error:
        read_json(path, Tree)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b'{"n": 3, "lea', b"", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_no_json_is_refused(content, tmp_path):
    path = tmp_path / "tree.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tree\.json: cannot be read"):
        read_json(path, Tree)


def test_no_file_is_none_and_entries_besides_are_left_out(tmp_path):
    assert read_json(tmp_path / "none.json", Tree) is None
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(GOOD | {"environment": {}}))
    assert read_json(path, Tree, besides=("environment",)) == Tree(3, [Leaf("x", 0.5)], (1, 0), None)
