"""Images that are equal though they should differ are said, in all layouts of data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from netfission.cli import main
from netfission.data import checks, copies, load, load_data
from netfission.runs.evaluate import evaluate
from netfission.runs.folder import RunFolder

CLASSES = ("cat", "dog")


@pytest.fixture(params=["folders", "table", "parquet"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes splits, each a list of images as (number of the content, class)."""

    def file(path: Path, content: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(content).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    def folders(root: Path, split: str, images: list[tuple[int, str]]) -> None:
        for number, (content, label) in enumerate(images):
            file(root / split / label / f"{number}.png", content)

    def table(root: Path, split: str, images: list[tuple[int, str]]) -> None:
        rows = ["file_name,label"]
        for number, (content, label) in enumerate(images):
            rows.append(f"{file(root / split / f'{number}.png', content).name},{label}")
        (root / split / "metadata.csv").write_text("\n".join(rows))

    def parquet(root: Path, split: str, images: list[tuple[int, str]]) -> None:
        root.mkdir(exist_ok=True)
        contents = [
            file(tmp_path / f"{split}{number}.png", content) for number, (content, _) in enumerate(images)
        ]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
        columns = {
            "image": [{"bytes": path.read_bytes(), "path": None} for path in contents],
            "label": [CLASSES.index(label) for _, label in images],
        }
        datasets.Dataset.from_dict(columns, features).to_parquet(root / f"{split}-00000-of-00001.parquet")

    writers = {"folders": folders, "table": table, "parquet": parquet}

    def write_all(**splits: list[tuple[int, str]]) -> Path:
        for split, images in splits.items():
            writers[request.param](tmp_path / "data", split, images)
        return tmp_path / "data"

    return write_all


def test_images_of_two_splits_are_said(write: Callable[..., Path]) -> None:
    train = [(number, CLASSES[number % 2]) for number in range(10)]
    folder = write(
        train=train,
        val=[(0, "cat"), (1, "dog"), (20, "cat"), (21, "dog")],
        test=[(2, "cat"), (20, "cat"), (21, "dog"), (22, "dog"), (23, "cat")],
    )
    summary = load_data(str(folder)).summary
    assert [warning.partition(", such as ")[0] for warning in summary.warnings] == [
        "2 of 4 validation images have the same content as a training image",
        "1 of 5 test images has the same content as a training image",
        "2 of 4 validation images have the same content as a test image",
    ]
    assert summary.validation is not None
    assert (summary.train.in_training, summary.validation.in_training, summary.test.in_training) == (0, 2, 1)


def test_images_of_two_classes_are_said(write: Callable[..., Path]) -> None:
    train = [(number, CLASSES[number % 2]) for number in range(10)]
    folder = write(train=[*train, (0, "dog"), (2, "dog"), (4, "cat")], test=[(6, "dog"), (30, "cat")])
    said = load_data(str(folder), validation=0).summary.warnings
    assert [warning.partition(", such as ")[0] for warning in said] == [
        "1 of 2 test images has the same content as a training image",
        "6 images have the content of an image of another class",
    ]
    assert all(f"({name})" in said[1] for name in CLASSES)


def test_images_that_differ_need_no_word(write: Callable[..., Path]) -> None:
    train = [(number, CLASSES[number % 2]) for number in range(10)]
    summary = load_data(str(write(train=[*train, train[0]], test=[(20, "cat"), (21, "dog")]))).summary
    assert [warning for warning in summary.warnings if "test" in warning or "class" in warning] == []


def test_an_example_is_named_by_its_file(image_folder: Callable[..., Path]) -> None:
    image_folder("train", ("cat", "dog"), count=5)
    folder = image_folder("test", ("cat", "dog"), size=(7, 7))
    shutil.copy(folder / "train" / "cat" / "RGB000.png", folder / "test" / "dog" / "copy.png")
    assert load_data(str(folder), validation=0, image_size=8).summary.warnings == [
        "1 of 21 test images has the same content as a training image, such as test/dog/copy.png and "
        "train/cat/RGB000.png",
        "2 images have the content of an image of another class, such as train/cat/RGB000.png (cat) and "
        "test/dog/copy.png (dog)",
    ]


def test_the_command_says_it_before_the_first_epoch_and_records_it(
    image_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_folder("train", count=6)
    folder = shutil.copytree(image_folder() / "train", tmp_path / "images" / "test").parent
    run = tmp_path / "run"
    options = f"--data {folder} --model wrn-10-1 --exits 2 --epochs 1 --validation 0 --out {run}"
    assert main(["train", *options.split()]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("found 24 images")
    assert shown[1].startswith(
        "warning: 12 of 12 test images have the same content as a training image, such"
    )
    assert json.loads((run / "data.json").read_text("utf-8"))["warnings"] == [
        shown[1].removeprefix("warning: ")
    ]


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_images_of_a_single_colour_are_said_with_the_classes_that_hold_no_others(
    image_folder: Callable[..., Path], memory_limit: int
) -> None:
    image_folder("train", ("cat", "dog", "emu"), count=4)
    folder = image_folder("test", ("cat", "dog", "emu"), count=3, size=(7, 8))
    for number, file in enumerate(sorted(folder.glob("t*/dog/*.png"))):
        Image.new("RGB", (8, 8), (number, 0, 9)).save(file)
    Image.new("RGB", (8, 8), "white").save(folder / "train" / "emu" / "RGB001.png")
    almost = Image.new("RGB", (8, 8), "black")
    almost.putpixel((5, 3), (0, 0, 1))
    almost.save(folder / "train" / "cat" / "RGB001.png")
    said = load_data(str(folder), validation=0, image_size=8, memory_limit=memory_limit).summary.warnings
    sampled = "" if memory_limit else "sampled "
    test = (
        "3 of 9 test images are of a single colour, such as test/dog/RGB000.png; no other test images of dog"
    )
    assert said == [
        f"5 of 12 {sampled}training images are of a single colour, such as train/dog/RGB000.png; "
        f"no other {sampled}training images of dog",
        *([test] if memory_limit else []),
    ]


def test_tiny_and_long_images_are_said(image_folder: Callable[..., Path]) -> None:
    image_folder("train", count=5)
    folder = image_folder("test", count=3, size=(7, 8))
    rng = np.random.default_rng(0)
    for name, size in {"a/1": (1, 1), "a/2": (3, 2), "b/3": (3, 100), "a/4": (4, 1), "a/5": (60, 3)}.items():
        split, number = ("train" if name[0] == "a" else "test"), name[2]
        pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / split / "cat" / f"{number}.png")
    said = load_data(str(folder), validation=0, image_size=8).summary.warnings
    assert [warning for warning in said if "colour" not in warning] == [
        "2 images are smaller than 4×4 pixels, such as train/cat/1.png (1×1)",
        "1 image is more than 20 times as long as wide, such as test/cat/3.png (3×100); only its middle is "
        "used",
        "2 images are enlarged more than 1.5 times, to 8×8 pixels, such as train/cat/4.png (4×1)",
    ]


def test_of_many_images_a_sample_of_sizes_is_read(
    image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder("train", count=30, size=(1, 25))
    monkeypatch.setattr(checks, "_PROBED", 7)
    (said,) = (w for w in load_data(str(folder), validation=0, image_size=8).summary.warnings if "long" in w)
    assert said.startswith("8 probed images are more than 20 times as long")


def test_skipped_images_leave_no_wrong_example(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(count=10)
    (folder / "cat" / "RGB000.png").write_bytes(b"damaged")
    Image.new("RGB", (8, 6), "white").save(folder / "dog" / "RGB003.png")
    with pytest.warns(UserWarning, match="left out 1 corrupt"):
        summary = load_data(str(folder), validation=0, corrupt="skip").summary
    (said,) = summary.warnings
    assert "1 of " in said
    assert said.endswith(" of a single colour") or "such as dog/RGB003.png" in said


def test_copies_in_the_same_split_and_class_are_not_read(
    image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder("train", ("cat", "dog"), count=5)
    folder = image_folder("test", ("cat", "dog"), size=(7, 7))
    shutil.copy(folder / "train" / "cat" / "RGB000.png", folder / "train" / "cat" / "copy.png")
    opened: list[copies.Content] = []
    monkeypatch.setattr(copies, "_digest", lambda content: opened.append(content))
    assert load_data(str(folder), validation=0, image_size=8).summary.warnings == []
    assert opened == []


def test_only_a_training_looks_for_what_is_wrong(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for check in ("compare_splits", "check_sizes", "check_colours"):
        monkeypatch.setattr(load, check, None)
    run = RunFolder(finished_run)
    assert evaluate(run, run.load_config()).n == 359
    with pytest.raises(TypeError):
        load_data("digits")
