"""Folders of labels: an image has the label of each folder that it is in."""

import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from netfission.data.load import load_data
from netfission.data.sources import find_targets
from netfission.data.targets import LABELS, NUMBERS


def draw(path, number):
    """Write a file that is not decoded when it is found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([number]))


def put(folder, images):
    """Write images by name: number → the folders that it is in."""
    for number, labels in images.items():
        for label in labels:
            draw(folder / label / f"{number}.png", number)


def decodable(folder):
    for path in folder.glob("*/*.png"):
        Image.new("L", (4, 4), int(path.stem)).save(path)


def found(folder, **settings):
    source = find_targets(str(folder), LABELS, **settings)
    return source, {
        split: {Path(path).name: row for path, row in zip(part.paths, part.labels.tolist(), strict=True)}
        for split, part in source.splits.items()
    }


@given(
    st.dictionaries(
        st.integers(0, 30), st.sets(st.sampled_from(["bus", "car", "tree"])), min_size=1, max_size=6
    ),
    st.sampled_from(["no-label", "No label", "no_labels"]),
)
@settings(max_examples=20)
def test_an_image_has_the_labels_of_its_folders(tmp_path_factory, images, no_label):
    assume(any(images.values()))
    folder = tmp_path_factory.mktemp("labels")
    put(folder, {number: labels or {no_label} for number, labels in images.items()})
    names = sorted(set().union(*images.values()))
    source, splits = found(folder)
    assert source.classes == names and source.listed
    assert splits["train"] == {
        f"{number}.png": [float(name in labels) for name in names] for number, labels in images.items()
    }
    assert source.left_out == {}
    shutil.rmtree(folder)


def test_links_and_folders_within_count(tmp_path):
    put(tmp_path, {1: ["bus/city"], 2: ["car"]})
    (tmp_path / "car" / "city").mkdir()
    (tmp_path / "car" / "city" / "1.png").symlink_to(tmp_path / "bus" / "city" / "1.png")
    os.link(tmp_path / "car" / "2.png", tmp_path / "bus" / "2.png")
    _, splits = found(tmp_path)
    assert splits["train"] == {"1.png": [1, 1], "2.png": [1, 1]}


def test_splits_are_folders(tmp_path):
    inner = tmp_path / "base"
    put(inner / "train", {1: ["bus", "car"], 2: ["car"], 3: ["no-label"]})
    put(inner / "val", {4: ["bus"]})
    put(inner / "Test", {5: ["no-label"], 6: ["car"]})
    (inner / "val" / "car").mkdir()  # no validation image has the label
    put(inner / "more", {7: ["bus"]})
    (inner / "train" / "notes.txt").touch()
    (inner / "labels.csv").touch()
    source, splits = found(tmp_path)
    assert splits["train"] == {"1.png": [1, 1], "2.png": [0, 1], "3.png": [0, 0]}
    assert (splits["validation"], splits["test"]) == ({"4.png": [1, 0]}, {"5.png": [0, 0], "6.png": [0, 1]})
    assert source.left_out == {"of another type": 2, "without a label or split": 1}
    assert source.unused == {
        "more": "not the name of a split; rename it to val or test to use it",
        "labels.csv": "the folders of splits say the labels; pass the table itself to use it",
    }
    assert source.remarks[0] == "1 of 3 images in train have several labels"
    assert "no image in val is in two folders: if each has one label, leave out the task" in source.remarks


def test_a_folder_is_loaded_as_a_table_is(tmp_path):
    put(tmp_path, {number: ["a", "b"] if number % 2 else ["no-label"] for number in range(20)})
    decodable(tmp_path)
    rows = ["path,a,b"] + [
        f"{'a' if number % 2 else 'no-label'}/{number}.png,{number % 2},{number % 2}" for number in range(20)
    ]
    data = load_data(str(tmp_path), targets=LABELS)
    table = tmp_path / "table.csv"
    table.write_text("\n".join(rows))
    same = load_data(str(table), targets=LABELS)
    assert same.train.labels.tolist() == data.train.labels.tolist()
    assert same.summary.test.digest == data.summary.test.digest


def test_the_folder_of_each_split_may_hold_a_table(tmp_path):
    """As Roboflow writes data sets of several labels."""
    for split, header, rows in (
        ("train", "filename, bus, car", ["1.png, 1, 1", "2.png, 0, 0"]),
        ("valid", "filename, car, bus", ["3.png, 1, 0"]),
    ):
        for row in rows:
            draw(tmp_path / split / row.split(",")[0], 1)
        (tmp_path / split / "_classes.csv").write_text("\n".join([header, *rows]))
    source, splits = found(tmp_path)
    assert source.classes == ["bus", "car"]
    assert splits == {"train": {"1.png": [1, 1], "2.png": [0, 0]}, "test": {"3.png": [0, 1]}}
    (tmp_path / "valid" / "_classes.csv").write_text("filename, bus, tram\n3.png, 1, 0")
    with pytest.raises(ValueError, match=r"a table of the labels of other splits, got a difference in car$"):
        found(tmp_path)
    (tmp_path / "valid" / "_classes.csv").unlink()
    with pytest.raises(
        ValueError,
        match=r"valid must be a folder with one table of labels like _classes.csv in train, got none",
    ):
        found(tmp_path)


def test_a_table_in_the_folder_says_the_labels(tmp_path):
    put(tmp_path, {1: ["images"], 2: ["images"]})
    (tmp_path / "labels.csv").write_text("path,a,b,split\nimages/1.png,1,0,train\nimages/2.png,1,1,test\n")
    source, splits = found(tmp_path)
    assert splits == {"train": {"1.png": [1, 0]}, "test": {"2.png": [1, 1]}}
    assert source.remarks == ["the labels are those of labels.csv"]


def test_other_splits_need_no_training_split(tmp_path):
    put(tmp_path / "test", {1: ["bus"], 2: ["car"]})
    source, splits = found(tmp_path, train_required=False)
    assert source.classes == ["bus", "car"] and list(splits) == ["test"]
    with pytest.raises(ValueError, match="a data set with a train split"):
        found(tmp_path)


def others(folder):
    draw(folder / "car" / "1.png", 99)


def loose(folder):
    draw(folder / "5.png", 5)


def both(folder):
    draw(folder / "no-label" / "1.png", 1)


def unclear(folder):
    draw(folder / "unlabelled" / "5.png", 5)


def misspelt(folder):
    shutil.move(folder, folder.parent / "train")
    shutil.move(folder.parent / "train", folder / "train")
    draw(folder / "test" / "buss" / "5.png", 5)


def masks(folder):
    draw(folder / "images" / "5.png", 5)
    draw(folder / "masks" / "5.png", 5)


def unlabelled(folder):
    shutil.rmtree(folder)
    draw(folder / "no-label" / "1.png", 1)


def empty(folder):
    shutil.rmtree(folder)
    (folder / "bus").mkdir(parents=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (others, "files of one name are one image, got 1.png with other content in bus and in car; give"),
        (
            loose,
            "whose images are in folders, got 5.png beside the folders; put images without any label into",
        ),
        (both, "whose images have labels or none, got 1.png in no-label and in bus"),
        (
            unclear,
            "unlabelled must be a folder with the name of a label, got unlabelled; rename it to no-label",
        ),
        (misspelt, "test images have the 2 labels of training images, got buss; did you mean bus?"),
        (masks, "they look like parts of a data set for segmentation"),
        (unlabelled, "with one folder per label, or with train/LABEL, got no folder of a label"),
        (empty, "with one folder per label, or with train/LABEL, got no image in its folders"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path, spoil, message):
    put(tmp_path / "data", {1: ["bus"], 2: ["bus", "car"]})
    spoil(tmp_path / "data")
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        found(tmp_path / "data")
    assert "\n" not in str(raised.value)


def test_one_label_is_refused_and_numbers_are_in_tables(tmp_path):
    put(tmp_path, {number: ["bus"] for number in range(10)})
    decodable(tmp_path)
    with pytest.raises(ValueError, match="a data set of at least 2 labels, got 1"):
        load_data(str(tmp_path), targets=LABELS)
    with pytest.raises(
        ValueError, match=r"data must be a table of paths and numbers \(\.csv, .*for this task"
    ):
        find_targets(str(tmp_path), NUMBERS)


def test_a_broken_link_is_refused_where_another_folder_has_the_image(tmp_path):
    put(tmp_path, {1: ["bus"], 2: ["car"]})
    (tmp_path / "car" / "3.png").symlink_to("gone.png")
    source, _ = found(tmp_path)
    assert source.left_out == {"missing": 1}
    (tmp_path / "car" / "1.png").symlink_to("gone.png")
    with pytest.raises(ValueError, match=r"images that can be read, got broken link car/1.png; restore"):
        found(tmp_path)


def test_a_split_table_of_names_may_lack_a_rare_label(tmp_path):
    for split, rows in (("train", "1.png,car|bus\n2.png,tree\n"), ("test", "3.png,car\n4.png,\n")):
        for number in range(1, 5):
            draw(tmp_path / split / f"{number}.png", number)
        (tmp_path / split / "labels.csv").write_text(f"path,labels\n{rows}")
    source, splits = found(tmp_path)
    assert source.classes == ["bus", "car", "tree"] and source.listed
    assert splits == {
        "train": {"1.png": [1, 1, 0], "2.png": [0, 0, 1]},
        "test": {"3.png": [0, 1, 0], "4.png": [0, 0, 0]},
    }
    (tmp_path / "test" / "labels.csv").write_text("path,labels\n3.png,cars\n")
    with pytest.raises(
        ValueError, match=r"a table of the 3 labels of training images, got cars; did you mean car\?"
    ):
        found(tmp_path)
    (tmp_path / "train").rename(tmp_path / "valid")
    source, splits = found(tmp_path, train_required=False)
    assert source.classes == ["bus", "car", "cars", "tree"] and splits["test"] == {"3.png": [0, 0, 1, 0]}


def test_other_tables_beside_folders_of_labels_are_not_used(tmp_path):
    put(tmp_path / "flat", {1: ["bus", "car"], 2: ["car"]})
    (tmp_path / "flat" / "notes.csv").write_text("date,camera\n2020,a\n")
    source, splits = found(tmp_path / "flat")
    assert splits["train"] == {"1.png": [1, 1], "2.png": [0, 1]}
    assert source.unused == {"notes.csv": "it has no column of file names"}
    for split in ("train", "test"):
        put(tmp_path / "splits" / split, {1: ["bus", "car"], 2: ["car"]})
    (tmp_path / "splits" / "train" / "metadata.csv").write_text("file_name,width\n1.png,2\n")
    source, splits = found(tmp_path / "splits")
    assert splits["train"] == splits["test"] == {"1.png": [1, 1], "2.png": [0, 1]}
    assert list(source.unused) == ["train/metadata.csv"]


def test_one_folder_named_as_a_split_is_a_label_or_refused(tmp_path):
    put(tmp_path, {1: ["bus"], 2: ["train"], 3: ["tram"]})
    assert found(tmp_path)[0].classes == ["bus", "train", "tram"]
    put(tmp_path, {4: ["train/2020"]})
    with pytest.raises(
        ValueError, match="got train, which may be a label or a split, beside bus; if train is"
    ):
        found(tmp_path)


def test_two_folders_of_images_without_labels_are_one(tmp_path):
    put(tmp_path, {1: ["no-label", "No Label"], 2: ["bus"], 3: ["car"]})
    _, splits = found(tmp_path)
    assert splits["train"]["1.png"] == [0, 0]
    draw(tmp_path / "no-label" / "1.png", 9)
    with pytest.raises(ValueError, match=r"got 1.png with other content in no-label and in no-label; give"):
        found(tmp_path)
