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
from netfission.data import load_data

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
    assert json.loads((run / "data.json").read_text())["warnings"] == [shown[1].removeprefix("warning: ")]
