import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from netfission.data import load_data, matched
from netfission.data.matched import load_matched
from netfission.data.splits import ArrayRecords

Folders = Callable[..., Path]


def labels(images) -> list[int]:
    return [label for split in images.splits for _, label in split]


def test_classes_are_matched_by_name_in_any_order_and_may_be_a_part(image_folder: Folders) -> None:
    folder = image_folder(classes=("cat", "elk"), count=2)
    images = load_matched(str(folder), ["elk", "dog", "cat"], (3, 8, 8))
    assert labels(images) == [2, 2, 0, 0]
    assert images.classes == ["elk", "cat"]


def test_a_folder_without_a_test_split_is_loaded_whole(image_folder: Folders) -> None:
    images = load_matched(str(image_folder(count=7)), ["cat", "dog"], (3, 8, 8))
    assert (len(images), images.part, images.name) == (14, "all", str(image_folder().resolve()))
    assert str(images) == "all 14 images of images"


def test_a_test_split_is_loaded_alone_unless_another_part_is_asked_for(image_folder: Folders) -> None:
    image_folder("train", count=5)
    folder = str(image_folder("test", count=3))
    found = {part: load_matched(folder, ["cat", "dog"], (3, 8, 8), part=part) for part in ("train", "all")}
    default = load_matched(folder, ["cat", "dog"], (3, 8, 8))
    assert {part: len(images) for part, images in found.items()} == {"train": 10, "all": 16}
    assert (len(default), str(default)) == (6, "6 test images of images")
    preferred = load_matched(folder, ["cat", "dog"], (3, 8, 8), preferred=("train",))
    assert preferred.part == "train"
    with pytest.raises(ValueError, match=r"^split must be one of train, test, all, got 'validation'$"):
        load_matched(folder, ["cat", "dog"], (3, 8, 8), part="validation")


def test_images_have_the_networks_size_and_channels(image_folder: Folders) -> None:
    folder = str(image_folder(size=(6, 8)))
    for shape in ((1, 5, 4), (3, 16, 16)):
        pixels, _ = load_matched(folder, ["cat", "dog"], shape).splits[0][0]
        assert tuple(pixels.shape) == shape


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (["Cat", "dog"], r"knows \(Cat, dog\), got \S+ with cat; did you mean Cat\?$"),
        (["bird", "fish"], r"knows \(bird, fish\), got \S+ with cat, dog; classes are matched by name$"),
        (["0", "1"], r"with cat, dog; classes are matched by name, and the network's names are numbers$"),
    ],
)
def test_a_class_that_the_network_lacks_is_refused_by_name(
    known: list[str], message: str, image_folder: Folders
) -> None:
    with pytest.raises(ValueError, match=r"^data must be a data set of classes that .*" + message):
        load_matched(str(image_folder()), known, (3, 8, 8))


@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="names of files are not UTF-8 here")
@pytest.mark.parametrize("known", [["ros\xe9", "dog"], ["rose\u0301", "dog"]])
def test_classes_are_matched_in_any_unicode_form(known: list[str], image_folder: Folders) -> None:
    folder = image_folder(classes=("ros\xe9", "dog", "rose\u0301"), count=2)
    images = load_matched(str(folder), known, (3, 8, 8))
    assert images.classes == known
    assert sorted(labels(images)) == [0, 0, 0, 0, 1, 1]


def test_classes_of_other_sources_are_matched_in_any_unicode_form(monkeypatch: pytest.MonkeyPatch) -> None:
    records = ArrayRecords(np.zeros((2, 8, 8), np.uint8), np.array([1, 0]))
    monkeypatch.setattr(matched, "find_labelled", lambda name: (["rose\u0301", "dog"], {"train": records}))
    assert labels(load_matched("digits", ["dog", "ros\xe9"], (1, 8, 8))) == [0, 1]


@pytest.mark.parametrize("layout", ["folders", "parquet"])
@pytest.mark.parametrize("splits", [["test"], ["val"], ["val", "test"]])
def test_a_data_set_without_a_training_split_is_loaded(
    layout: str, splits: list[str], image_folder: Folders
) -> None:
    for split in splits:
        folder = image_folder(split, count=3)
    if layout == "parquet":
        label = datasets.ClassLabel(names=["cat", "dog"])
        features = datasets.Features({"image": datasets.Image(), "label": label})
        for split in splits:
            files = sorted((folder / split).rglob("*.png"))
            images = [{"bytes": file.read_bytes(), "path": None} for file in files]
            rows = {"image": images, "label": [file.parent.name for file in files]}
            shutil.rmtree(folder / split)
            datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")
    part = "test" if "test" in splits else "validation"
    preferred = ("test", "validation")
    images = load_matched(str(folder), ["dog", "elk", "cat"], (3, 8, 8), preferred=preferred)
    assert (len(images), images.part, images.classes) == (6, part, ["dog", "cat"])
    assert labels(images) == [2, 2, 2, 0, 0, 0]
    every = load_matched(str(folder), ["dog", "elk", "cat"], (3, 8, 8), part="all")
    assert len(every) == 6 * len(splits)
    with pytest.raises(ValueError, match="must be a data set with a train split, got the splits"):
        load_data(str(folder))


def test_a_folder_beside_that_of_a_split_makes_the_data_set_unclear(image_folder: Folders) -> None:
    folder = image_folder("test")
    (folder / "photographs").mkdir()
    with pytest.raises(ValueError, match=r"must be a data set with a train split, got the splits test$"):
        load_matched(str(folder), ["cat", "dog"], (3, 8, 8))


def test_only_classes_with_images_in_the_part_count() -> None:
    digits = load_matched("digits", list("0123456789"), (1, 8, 8))
    assert digits.classes == list("0123456789")
    with pytest.raises(ValueError, match=r"with 9; did you mean"):
        load_matched("digits", [*"012345678", "90"], (1, 8, 8))


def test_damaged_images_are_counted_or_refused(image_folder: Folders) -> None:
    folder = image_folder(count=3)
    (folder / "cat" / "RGB001.png").write_bytes(b"no image")
    images = load_matched(str(folder), ["cat", "dog"], (3, 8, 8), corrupt="skip")
    assert (len(images), images.left_out, labels(images)) == (5, 1, [0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match=r"RGB001\.png must be a readable image"):
        labels(load_matched(str(folder), ["cat", "dog"], (3, 8, 8)))
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^data must be a data set of readable images, got 6 damaged ones"):
        load_matched(str(folder), ["cat", "dog"], (3, 8, 8), corrupt="skip")
