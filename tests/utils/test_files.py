import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from netfission.utils.files import check_target, has_file, remove_abandoned, write_together, write_whole


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


def test_a_link_is_written_through_and_permissions_are_kept(tmp_path: Path) -> None:
    real, link = tmp_path / "real.csv", tmp_path / "links" / "link.csv"
    real.write_text("old")
    real.chmod(0o600)
    link.parent.mkdir()
    link.symlink_to(os.path.relpath(real, link.parent))
    write_whole(link, "new")
    write_together({link: "newer"}, removed=[link])
    assert link.is_symlink()
    assert real.read_text("utf-8") == "newer"
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    fresh, later = tmp_path / "fresh", tmp_path / "later"
    fresh.symlink_to(later)
    write_whole(fresh, "made")
    assert fresh.is_symlink()
    assert later.read_text("utf-8") == "made"


def test_a_link_that_is_kept_is_moved_itself(tmp_path: Path) -> None:
    real, link, kept = tmp_path / "real", tmp_path / "link", tmp_path / "kept"
    real.write_text("old")
    link.symlink_to(real)
    write_whole(link, "new", kept_as=kept)
    assert (link.read_text("utf-8"), kept.read_text("utf-8"), real.read_text("utf-8")) == (
        "new",
        "old",
        "old",
    )


def special_files(folder: Path) -> dict[str, Path]:
    """Return what is no regular file, by its name in messages."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "link").symlink_to(folder / "pipe")
    return {"folder": folder / "folder", "pipe": folder / "pipe", "broken link": folder / "loop"}


def test_what_is_no_regular_file_is_never_replaced_nor_taken_for_none(tmp_path: Path) -> None:
    special = special_files(tmp_path)
    before = {path: path.lstat().st_ino for path in tmp_path.iterdir()}
    for kind, path in (*special.items(), ("pipe", tmp_path / "link")):
        message = f"^{path} must be a regular file, got a {kind}$"
        with pytest.raises(ValueError, match=message):
            write_together({tmp_path / "other": "new", path: "new"})
        with pytest.raises(ValueError, match=message):
            has_file(path)
    assert {path: path.lstat().st_ino for path in tmp_path.iterdir()} == before
    with pytest.raises(
        ValueError, match=r"^--out must be a regular file, got .*pipe \(a pipe\); try another$"
    ):
        check_target("--out", special["pipe"], hint="try another")
    assert not has_file(tmp_path / "none")
