import pytest

from netfission.utils.json_files import read_json


@pytest.mark.parametrize("content", [b'{"n": 3, "lea', b"", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_no_json_is_refused(content, tmp_path):
    path = tmp_path / "counts.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"counts\.json must be a valid JSON file, got damaged content \("):
        read_json(path, dict[str, int])


def test_no_file_is_none(tmp_path):
    assert read_json(tmp_path / "none.json", dict[str, int]) is None
