import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from netfission.utils.files import remove_abandoned, write_together, write_whole


def disk_full(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("content", "expected"),
    [("größer\r\n2\n", "größer\r\n2\n".encode()), (b"\x00\xff\n", b"\x00\xff\n"), ("", b"")],
)
def test_writes_and_replaces(tmp_path: Path, content: str | bytes, expected: bytes) -> None:
    path = tmp_path / "a.json"
    for _ in range(2):
        write_whole(path, content)
        assert path.read_bytes() == expected
        path.write_bytes(b"old and longer than what comes")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("exists", [True, False])
def test_full_disk_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, exists: bool
) -> None:
    path = tmp_path / "a.json"
    if exists:
        path.write_text("old")
    monkeypatch.setattr(os, call, disk_full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(path, "new")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == ([path] if exists else [])
    assert not exists or path.read_text("utf-8") == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    real_open = Path.open

    def open_full(self: Path, mode: str) -> object:
        real_open(self, mode).close()
        return real_open(Path("/dev/full"), "wb")

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new" * 100_000)
    monkeypatch.undo()
    assert path.read_text("utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupt_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.json", "new")
    assert list(tmp_path.iterdir()) == []


def temporary_of(path: Path, process: int) -> Path:
    return path.with_name(f".{path.name}.{process}-0123abcd.tmp")


def test_what_a_killed_process_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    with subprocess.Popen([sys.executable, "-c", ""]) as killed:
        pass
    left = [temporary_of(path, killed.pid), temporary_of(other, killed.pid)]
    kept = [temporary_of(path, os.getpid()), tmp_path / ".a.txt.tmp", tmp_path / "a.1-0123abcd.tmp"]
    kept.append(tmp_path / f".a.txt.{2**22 + 1}@another-0123abcd.tmp")  # of another machine
    for file in (*left, *kept):
        file.touch()
    write_whole(path, "new")
    assert set(tmp_path.iterdir()) == {path, left[1], *kept}
    remove_abandoned(tmp_path)
    assert set(tmp_path.iterdir()) == {path, *kept}
    remove_abandoned(tmp_path / "none")


def test_on_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    calls = []
    real_replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))

    def replace(source: Path, target: Path) -> None:
        calls.append("replace")
        assert Path(source).parent == path.parent
        assert Path(source).read_text("utf-8") == "new"
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_whole(path, "new")
    assert calls == ["fsync", "replace"]


def test_readable_as_the_umask_says(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_whole(tmp_path / "ours", "")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "ours")}
    assert len(modes) == 1


def test_errors_name_the_file_asked_for(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "a.json"
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(missing, "")
    assert caught.value.filename == str(missing)
    (tmp_path / "file").touch()
    inside_a_file = tmp_path / "file" / "a.json"
    with pytest.raises(NotADirectoryError) as caught_other:
        write_whole(inside_a_file, "")
    assert caught_other.value.filename == str(inside_a_file)


def test_of_files_that_belong_together_none_changes_where_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_together({first: "old", second: b"old"})
    assert (first.read_text("utf-8"), second.read_text("utf-8")) == ("old", "old")
    done = []

    def full_at_the_second(_: int) -> None:
        done.append(1)
        if len(done) == 2:
            disk_full()

    monkeypatch.setattr(os, "fsync", full_at_the_second)
    with pytest.raises(OSError, match="No space left") as caught:
        write_together({first: "new", second: "new"})
    assert caught.value.filename == str(second)
    with pytest.raises(FileNotFoundError):
        write_together({first: "new", tmp_path / "no folder" / "c": "new"}, removed=[second])
    assert (first.read_text("utf-8"), second.read_text("utf-8")) == ("old", "old")
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_names_that_are_not_utf8_are_written_so_that_json_reads_them_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"ros\xe9/\xff")
    write_whole(tmp_path / "a.json", json.dumps({name: name, "é": 1}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {name: name, "é": 1}
