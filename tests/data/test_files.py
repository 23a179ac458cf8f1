from pathlib import Path

import pytest

from netfission.config import RunConfig
from netfission.data.files import find_images, walk_files
from netfission.runs.folder import RunFolder


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_every_file_is_an_image_or_left_out_for_a_reason(tmp_path: Path) -> None:
    images = [tmp_path / name for name in ("a.JPG", "b.png", "deep/er/c.webp")]
    touch(*images, tmp_path / "notes.txt", tmp_path / "Thumbs.db", tmp_path / "._a.jpg")
    touch(tmp_path / ".cache" / "a.jpg", tmp_path / ".cache" / "b.jpg")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    found = find_images(tmp_path)
    assert found.images == images
    assert found.left_out == {
        "hidden": [tmp_path / "._a.jpg", tmp_path / ".cache", tmp_path / "Thumbs.db"],
        "of another type": [tmp_path / "notes.txt"],
        "missing": [tmp_path / "broken.png"],
    }


def test_what_netfission_wrote_is_no_data(tmp_path: Path) -> None:
    touch(tmp_path / "a.png", tmp_path / "out" / "report" / "figure.png")
    RunFolder(tmp_path / "run").claim(RunConfig(), resume=False)
    touch(tmp_path / "run" / "cascade.png", tmp_path / "compare" / "comparison.png")
    for name in ("records", "locks"):
        (tmp_path / "compare" / name).mkdir()
    (tmp_path / "out" / "config.yaml").write_text("data: another program's\n")
    found = find_images(tmp_path)
    assert found.images == [tmp_path / "a.png", tmp_path / "out" / "report" / "figure.png"]
    assert found.left_out["written by netfission"] == [tmp_path / "compare", tmp_path / "run"]
    assert tmp_path / "run" / "config.yaml" not in list(walk_files(tmp_path))


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
    assert found.images == [tmp_path / "cat" / "a.jpg"]
    assert found.counts() == {"hidden": 1}
    assert list(walk_files(tmp_path)) == found.images


def test_what_pillow_reads_is_an_image_and_heic_names_its_package(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.jfif", "b.GIF", "c.mpo", "d.webp", "e.HEIC", "f.heif", "g.eps")))
    found = find_images(tmp_path)
    assert [path.name for path in found.images] == ["a.jfif", "b.GIF", "c.mpo", "d.webp"]
    assert found.left_out == {
        "needing pillow-heif": [tmp_path / "e.HEIC", tmp_path / "f.heif"],
        "of another type": [tmp_path / "g.eps"],
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
    assert found.images == [cat / "a.png", cat / "d.png", cat / "linked" / "c.png"]
    assert found.left_out == {}
