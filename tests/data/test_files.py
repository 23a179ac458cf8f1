import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfission.config import RunConfig
from netfission.data.files import FileTree, find_images, path_order, top_folders, walk_files
from netfission.data.sources import find_source
from netfission.runs.folder import RunFolder


def strings(paths: Iterable[Path]) -> list[str]:
    return list(map(str, paths))


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_every_file_is_an_image_or_left_out_for_a_reason(tmp_path: Path) -> None:
    images = [tmp_path / name for name in ("a.JPG", "b.png", "deep/er/c.webp")]
    touch(*images, tmp_path / "notes.txt", tmp_path / "Thumbs.db", tmp_path / "._a.jpg")
    touch(tmp_path / ".cache" / "a.jpg", tmp_path / ".cache" / "b.jpg")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    found = find_images(tmp_path)
    assert found.images == strings(images)
    assert found.left_out == {
        "hidden": strings(tmp_path / name for name in ("._a.jpg", ".cache", "Thumbs.db")),
        "of another type": [str(tmp_path / "notes.txt")],
        "missing": strings(tmp_path / name for name in ("broken.png", "loop.png")),
    }


def test_what_netfission_wrote_is_no_data(tmp_path: Path) -> None:
    touch(tmp_path / "a.png", tmp_path / "out" / "report" / "figure.png")
    RunFolder(tmp_path / "run").claim(RunConfig(), resume=False)
    touch(tmp_path / "run" / "cascade.png", tmp_path / "compare" / "comparison.png")
    for name in ("records", "locks"):
        (tmp_path / "compare" / name).mkdir()
    (tmp_path / "out" / "config.yaml").write_text("data: another program's\n")
    found = find_images(tmp_path)
    assert found.images == strings([tmp_path / "a.png", tmp_path / "out" / "report" / "figure.png"])
    assert found.left_out["written by netfission"] == strings([tmp_path / "compare", tmp_path / "run"])
    assert str(tmp_path / "run" / "config.yaml") not in list(walk_files(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "Desktop.ini",
        "._a.jpg",
        "__MACOSX/cat/a.jpg",
        ".ipynb_checkpoints/a.jpg",
        "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
    ],
)
def test_what_systems_leave_behind_is_hidden(name: str, tmp_path: Path) -> None:
    touch(tmp_path / "cat" / "a.jpg", tmp_path / "cat" / name)
    found = find_images(tmp_path)
    assert found.images == [str(tmp_path / "cat" / "a.jpg")]
    assert found.counts() == {"hidden": 1}
    assert list(walk_files(tmp_path)) == found.images


def test_what_pillow_reads_is_an_image_and_heic_names_its_package(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.jfif", "b.GIF", "c.mpo", "d.webp", "e.HEIC", "f.heif", "g.eps")))
    found = find_images(tmp_path)
    assert [Path(path).name for path in found.images] == ["a.jfif", "b.GIF", "c.mpo", "d.webp"]
    assert found.left_out == {
        "needing pillow-heif": strings([tmp_path / "e.HEIC", tmp_path / "f.heif"]),
        "of another type": [str(tmp_path / "g.eps")],
    }


def test_linked_files_and_folders_count_once_and_links_upwards_not(tmp_path: Path) -> None:
    touch(tmp_path / "all" / "cat" / "a.png", tmp_path / "all" / "dog" / "b.png", tmp_path / "else" / "c.png")
    cat = tmp_path / "all" / "cat"
    (cat / "linked").symlink_to(tmp_path / "else")
    (cat / "once more").symlink_to(tmp_path / "else")
    (cat / "d.png").symlink_to(tmp_path / "else" / "c.png")
    (cat / "up").symlink_to(tmp_path / "all")  # to the other classes, too
    (cat / "round").symlink_to(cat)
    (tmp_path / "else" / "back").symlink_to(cat)
    found = find_images(cat)
    assert found.images == strings([cat / "a.png", cat / "d.png", cat / "linked" / "c.png"])
    assert found.left_out == {}


def test_a_name_without_a_point_is_no_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "png", tmp_path / "v1.0" / "jpg")
    assert find_images(tmp_path).counts() == {"of another type": 2}


def test_paths_of_the_current_folder_begin_with_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "cat" / "a.png", tmp_path / "b.png")
    monkeypatch.chdir(tmp_path)
    assert find_images(Path()).images == ["b.png", "cat/a.png"]


@given(st.lists(st.lists(st.text("a./ -é", min_size=1), min_size=1, max_size=3), max_size=8))
def test_the_order_is_that_of_paths(parts: list[list[str]]) -> None:
    paths = [str(Path("images", *(name.strip("/") for name in part))) for part in parts]
    assert sorted(paths, key=path_order) == strings(sorted(map(Path, paths)))


names = st.builds(
    str.__add__, st.text("ab -\n", max_size=2), st.sampled_from([".jpg", ".JPG", ".txt", ""])
).filter(lambda name: name.strip("."))


@given(st.lists(st.lists(names, min_size=1, max_size=3), max_size=8), st.booleans())
def test_images_are_all_files_of_their_suffixes_in_the_order_of_paths(
    parts: list[list[str]], is_linked: bool
) -> None:
    with TemporaryDirectory() as folder, TemporaryDirectory() as elsewhere:
        for part in parts:
            with suppress(OSError):  # a file in place of a folder, or the other way round
                touch(Path(folder, *part))
        shown = [
            path
            for path in sorted(Path(folder).rglob("*"))
            if not any(name.startswith(".") for name in path.relative_to(folder).parts)
        ]
        if is_linked:
            Path(folder, "0").symlink_to(elsewhere)
            touch(Path(elsewhere, "0.jpg"))
            shown.append(Path(folder, "0", "0.jpg"))
        images = sorted(path for path in shown if path.is_file() and path.suffix.lower() == ".jpg")
        assert find_images(Path(folder)).images == strings(images)


def test_a_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/deep/4.png")
    touch(*(tmp_path / name for name in names))
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    assert find_source(str(tmp_path)).classes == ["cat", "dog"]
    assert len(listed) == len(set(listed)) == 8


def test_a_tree_does_not_see_what_changes_later(tmp_path: Path) -> None:
    touch(tmp_path / "a.png")
    tree = FileTree()
    before = tree.images(tmp_path)
    touch(tmp_path / "b.png")
    assert tree.images(tmp_path) == before != find_images(tmp_path)


def test_images_of_the_folder_itself_are_in_no_folder_of_it():
    assert top_folders(Path(), ["overview.png", "train/cat/1.png"]) == {"", "train"}
