from pathlib import Path

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
        "hidden": [tmp_path / "._a.jpg", tmp_path / ".cache"],
        "of another type": [tmp_path / "Thumbs.db", tmp_path / "notes.txt"],
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
