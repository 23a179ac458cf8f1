from pathlib import Path

import pytest

from netfission.data import copies
from netfission.data.copies import find_copies


def write(folder: Path, **contents: bytes) -> list[str]:
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return sorted(map(str, folder.iterdir()))


def test_only_equal_bytes_are_copies(tmp_path: Path) -> None:
    middle = bytes(9000)
    originals = write(tmp_path / "a", same=b"abc" + middle, end=middle + b"x", empty=b"", other=b"q")
    files = write(
        tmp_path / "b", same=b"abc" + middle, end=middle + b"y", empty=b"", size=b"12", twice=b"abc" + middle
    )
    missing = str(tmp_path / "missing")
    assert [Path(path).name for path in find_copies([*files, missing], [*originals, missing])] == [
        "same",
        "twice",
    ]


def test_files_of_other_sizes_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, originals = (
        write(tmp_path / "a", a=b"1", b=b"12"),
        write(tmp_path / "b", c=b"123", d=b"1", e=b"1234"),
    )
    opened = []
    monkeypatch.setattr(
        copies, "_middle", lambda path: opened.append(Path(path).name) or Path(path).read_bytes()
    )
    assert [Path(path).name for path in find_copies(files, originals)] == ["a"]
    assert opened == ["a", "d"]


def test_files_that_equal_no_original_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path / "a", a=b"1", b=b"12", c=b"34", d=b"34")
    originals = write(tmp_path / "b", e=b"1", f=b"567", g=b"567")
    read = []
    monkeypatch.setattr(
        copies, "_digest", lambda path: read.append(Path(path).name) or Path(path).read_bytes()
    )
    assert [Path(path).name for path in find_copies(files, originals)] == ["a"]
    assert read == ["a", "e"]


def test_contents_are_compared_by_little_memory() -> None:
    assert len(copies._middle(memoryview(bytes(9000)))) == 32
