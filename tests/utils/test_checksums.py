"""A file that differs from its checksum is refused, whatever its format."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

import netfission
from netfission.utils.checksums import BLANK, check_tensors, check_text, parse_json, stamp, stamp_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
CONTENT = st.dictionaries(st.text(), JSON, max_size=4).filter(lambda content: "checksum" not in content)


def assert_not_taken(raw: bytes, content):
    """Damaged content is refused, or has an entry that no reader accepts: the checksum by another name."""
    try:
        found = parse_json(raw)
    except (ValueError, RecursionError):
        return
    assert len(found) > len(content), raw


@given(CONTENT | st.lists(JSON, max_size=4), st.sampled_from([None, 1, 2]), st.integers(0))
@settings(deadline=None)
def test_json_comes_back_and_a_flipped_bit_is_not_taken(content, indent, bit):
    text = stamp_json(json.dumps(content, indent=indent, ensure_ascii=False) + "\n")
    assert parse_json(text) == content
    raw = bytearray(text.encode(errors="backslashreplace"))
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    assert_not_taken(bytes(raw), content)


@pytest.mark.parametrize("content", [{"epochs": 30, "classes": ["cat", "dog"]}, [{"data": "svhn"}]])
def test_each_bit_of_a_file_counts(content):
    raw = stamp_json(json.dumps(content)).encode()
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        assert_not_taken(bytes(changed), content)


@pytest.mark.parametrize("content", [{"a": f'"checksum": "{BLANK}'}, [BLANK], {"a": {"checksum": BLANK}}])
def test_content_that_looks_like_a_checksum_is_content(content):
    assert parse_json(stamp_json(json.dumps(content))) == content


def test_a_file_without_a_checksum_is_read():
    assert parse_json('{"n": 3}') == {"n": 3}


def test_yaml_is_checked_by_a_comment():
    content = stamp(f"epochs: 3\n# checksum: {BLANK}\n# Made with:\n".encode())
    check_text(content)
    check_text(b"epochs: 3\n")
    with pytest.raises(ValueError, match="checksum must be that of the content, got another; leave it out"):
        check_text(content.replace(b"3", b"4", 1))


def test_tensors_are_checked(tmp_path: Path):
    path = tmp_path / "net.safetensors"
    tensors = {"weight": torch.arange(600_000.0)}  # more than two blocks
    path.write_bytes(stamp(save(tensors, {"checksum": BLANK})))
    check_tensors(path)
    assert load_file(path)["weight"].equal(tensors["weight"])
    content = bytearray(path.read_bytes())
    for place in (60, 200, 1_500_000, len(content) - 1):  # one in the checksum itself
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"net\.safetensors must be as it was written, got other"):
            check_tensors(path)
        content[place] ^= 1
    path.write_bytes(save(tensors))  # of another program
    check_tensors(path)


# A file of JSON that is written by another function than `write_json`.
UNCHECKED = re.compile(r"write_whole\((?!path, stamp_json\()[^\n]*json")


def test_what_is_read_again_is_written_with_a_checksum():
    found = [
        file.name
        for file in Path(netfission.__file__).parent.rglob("*.py")
        if UNCHECKED.search(re.sub(r"^ *(>>>|\.\.\.) .*", "", file.read_text(encoding="utf-8"), flags=re.M))
    ]
    assert found == ["cost.py"]  # which no command reads
