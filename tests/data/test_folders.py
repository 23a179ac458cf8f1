import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from netfission.config import RunConfig
from netfission.data import load_data
from netfission.data.folders import FolderContents, find_test_folder, read_folder
from netfission.data.sources import fingerprint
from netfission.runs.folder import RunFolder


def write_files(folder: Path, names: str) -> Path:
    """Write empty files with the names, which are separated by blanks."""
    for name in names.split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def labels(contents: FolderContents) -> dict[str, dict[str, str]]:
    """Return split → name of the file → class."""
    return {
        split: {
            Path(image).relative_to(contents.folder).as_posix(): label for image, label in part.labels.items()
        }
        for split, part in contents.splits.items()
    }


def write_images(folder: Path, counts: dict[str, int]) -> Path:
    """Write as many images of 2×2 random pixels into each folder, as files of fixed content."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.bmp")
    return folder


@pytest.mark.parametrize(
    ("counts", "digests", "files"),
    [
        (
            {"b": 7, "a/deep": 4, "C": 9, "10": 6},
            ["44ac4114b2d2", "fbba042a418d", "0ca1a1dc2d50"],
            "8926dab1091a",
        ),
        (
            {"train/b": 7, "train/a": 4, "test/b": 2, "test/a": 3},
            ["fca037b79c3a", "e1b6ef351040", "4e59d7de9524"],
            "8183299caa40",
        ),
        (
            {"train/b": 7, "train/a": 4, "val/b": 2, "val/a": 3},
            ["fca037b79c3a", "e1b6ef351040", "4e59d7de9524"],
            "7c33aa06138e",
        ),
    ],
    ids=["classes", "splits", "validation as test"],
)
def test_plain_folders_keep_their_splits(
    tmp_path: Path, counts: dict[str, int], digests: list[str], files: str
) -> None:
    # Written down before folders were read by names of splits: runs and records depend on it.
    name = str(write_images(tmp_path, counts))
    data = load_data(name, validation=0.2, seed=1, limit_per_class=3)
    assert data.validation is not None
    contents = [
        split.images.numpy().tobytes() + split.labels.numpy().tobytes()
        for split in (data.train, data.validation, data.test)
        if isinstance(split.labels, torch.Tensor)
    ]
    assert [hashlib.sha256(content).hexdigest()[:12] for content in contents] == digests
    assert fingerprint(name) == files


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [("Training", "Valid", "Testing"), ("TRAIN", "validation", "TEST"), ("train", "Val", "Test")],
)
def test_splits_by_their_usual_names_in_any_case(
    tmp_path: Path, train: str, validation: str, test: str
) -> None:
    write_files(tmp_path, f"{train}/cat/1.png {train}/dog/2.png {validation}/cat/3.png {test}/dog/4.png")
    assert labels(read_folder(tmp_path)) == {
        "train": {f"{train}/cat/1.png": "cat", f"{train}/dog/2.png": "dog"},
        "validation": {f"{validation}/cat/3.png": "cat"},
        "test": {f"{test}/dog/4.png": "dog"},
    }


def test_the_validation_folder_is_the_validation_split(tmp_path: Path) -> None:
    name = str(
        write_images(tmp_path, {f"{split}/{c}": 3 for split in ("train", "val", "test") for c in "ab"})
    )
    data = load_data(name)
    assert data.validation is not None
    assert [len(split) for split in (data.train, data.validation, data.test)] == [6, 6, 6]
    assert data.summary.validation is not None
    assert "6 validation (val), 6 test;" in data.summary.line()
    with pytest.warns(UserWarning, match=r"^validation=0\.5 has no effect, as .* has a validation split$"):
        assert len(load_data(name, validation=0.5).validation) == 6
    without = load_data(name, validation=0)
    assert without.validation is None
    assert without.summary.left_out == {"of the validation split, which is not used": 6}


@pytest.mark.parametrize(
    ("files", "root"),
    [
        ("base/train/cat/1.png base/train/dog/2.png base/test/cat/3.png notes.txt", "base"),
        ("flowers/flowers/cat/1.png flowers/flowers/dog/2.png", "flowers/flowers"),
        ("train/train/cat/1.png train/train/dog/2.png test/test/cat/3.png", ""),
    ],
)
def test_a_folder_too_many_is_looked_through(tmp_path: Path, files: str, root: str) -> None:
    contents = read_folder(write_files(tmp_path, files))
    assert contents.classes == ["cat", "dog"]
    assert contents.folder == tmp_path / root
    assert len(contents.splits["train"].labels) == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            "images/1.png masks/1.png",
            "got images, masks; they look like parts of a data set for segmentation",
        ),
        (
            "Images/1.png Annotations/1.png other/1.png",
            "got Annotations, Images, other; they look like parts",
        ),
        (
            "train/images/1.png train/labels/1.png",
            "/train must be .* got images, labels; they look like parts",
        ),
        (
            "seg_pred/1.png seg_test/a/1.png seg_train/a/1.png train2/1.png",
            "must be a folder with one folder per class",
        ),
        (
            "training_set/a/1.png test_set/a/1.png",
            "got test_set, training_set; rename the folders of splits to",
        ),
        ("a/train/1.png a/test/1.png b/train/1.png", "got a train folder in each of a, b; give one of them"),
        ("train/a/1.png Training/a/1.png", "must be a data set with one train split, got Training and train"),
        ("test/a/1.png test/b/1.png", "must be a data set with a train split, got the splits test"),
        ("a/1.png b/1.png test/1.png", "must be a data set with a train split, got the splits test"),
        ("train/1.png test/1.png", "/train must be a folder of parquet files, .*, got no class folder"),
        ("a/1.png b/notes.txt", r"/b must be a class folder .*, got no image file \(1 of another type\)$"),
        ("a/1.png b/2.heic b/3.heic", r"got no image file \(2 needing pillow-heif\)$"),
        ("train/a/1.png train/b/1.png test/a/1.png test/Bee/1.png", "/test must be .*, got Bee without"),
    ],
)
def test_other_layouts_are_refused(tmp_path: Path, files: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_folder(write_files(tmp_path, files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "found"),
    [("", "no image file"), ("test/notes.txt test/.hidden.png", r"no image file \(1 hidden, 1 of another")],
)
def test_the_folder_of_a_split_without_images_is_refused(tmp_path: Path, files: str, found: str) -> None:
    write_files(tmp_path, f"train/a/1.png train/b/2.png {files}")
    (tmp_path / "test").mkdir(exist_ok=True)
    message = rf"/test must be a folder of test images, got {found}.*; add some, or remove the folder$"
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


def test_a_test_class_in_another_case_is_hinted_at(tmp_path: Path) -> None:
    write_files(tmp_path, "train/Daisy/1.png train/rose/1.png test/daisy/1.png")
    with pytest.raises(ValueError, match="got daisy without training images; did you mean Daisy"):
        read_folder(tmp_path)


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    contents = read_folder(write_files(tmp_path, "bus/1.png car/1.png train/1.png"))
    assert contents.classes == ["bus", "car", "train"]


def test_what_netfission_wrote_into_the_data_is_no_class(tmp_path: Path) -> None:
    write_files(tmp_path, "cat/1.png dog/1.png compare/comparison.png compare/records/a.json compare/locks/a")
    before = fingerprint(str(tmp_path))
    RunFolder(tmp_path / "runs" / "first").claim(RunConfig(), resume=False)
    RunFolder(tmp_path / "mine").claim(RunConfig(), resume=False)
    write_files(tmp_path, "mine/cascade.png mine/report/1.png")
    contents = read_folder(tmp_path)
    assert contents.classes == ["cat", "dog"]
    assert contents.left_out == {"written by netfission": 3}
    assert fingerprint(str(tmp_path)) == before


def test_images_without_a_class_are_counted(tmp_path: Path) -> None:
    contents = read_folder(
        write_files(
            tmp_path, "train/cat/1.png train/dog/1.png train/2.png test/3.png test/4.png more/a/5.png"
        )
    )
    assert list(contents.splits) == ["train"]
    assert contents.left_out == {"without a class or split": 4}


def test_folder_of_unlabelled_test_images(tmp_path: Path) -> None:
    assert find_test_folder(write_files(tmp_path, "a/1.png b/2.png")) == tmp_path
    assert find_test_folder(write_files(tmp_path, "Valid/1.png")) == tmp_path / "Valid"
    assert find_test_folder(write_files(tmp_path, "Testing/1.png")) == tmp_path / "Testing"


TABLES = {
    "Hugging Face": (
        "train/1.png train/2.png test/3.png",
        {
            "train/metadata.csv": "file_name,label\n1.png,cat\n2.png,dog\n",
            "test/metadata.csv": "file_name,label\n3.png,cat\n",
        },
        {"train": {"train/1.png": "cat", "train/2.png": "dog"}, "test": {"test/3.png": "cat"}},
    ),
    "one table of all splits": (
        "train/1.png train/2.png test/1.png",
        {"metadata.csv": "file_name,label\ntrain/1.png,cat\ntrain/2.png,dog\ntest/1.png,dog\n"},
        {"train": {"train/1.png": "cat", "train/2.png": "dog"}, "test": {"test/1.png": "dog"}},
    ),
    "Kaggle, test without labels": (
        "train/a1.jpg train/a2.jpg test/b1.jpg",
        {
            "train.csv": "id,breed\na1,cat\na2,dog\n",
            "test.csv": "id\nb1\n",
            "sample_submission.csv": "id,breed\nb1,cat\n",
        },
        {"train": {"train/a1.jpg": "cat", "train/a2.jpg": "dog"}},
    ),
    "train_images": (
        "train_images/1.png train_images/2.png",
        {"train.csv": "image_id,label\n1.png,0\n2.png,1\n"},
        {"train": {"train_images/1.png": "0", "train_images/2.png": "1"}},
    ),
    "flat, two columns": (
        "1.png 2.png",
        {"labels.csv": "Image,Id\r\n1.png,whale\r\n2.png,shark\r\n"},
        {"train": {"1.png": "whale", "2.png": "shark"}},
    ),
    "images below, semicolons": (
        "images/1.png images/2.png",
        {"labels.csv": "\ufefflabel;size;path\ncat;1,5;images\\1.png\ndog;2;/home/me/2.png\n"},
        {"train": {"images/1.png": "cat", "images/2.png": "dog"}},
    ),
    "test images in a table of their own": (
        "1.png 2.png 3.png",
        {"train.csv": "image,class\n1.png,cat\n2.png,dog\n", "test.csv": "image,class\n3.png,dog\n"},
        {"train": {"1.png": "cat", "2.png": "dog"}, "test": {"3.png": "dog"}},
    ),
    "folders that are no classes": (
        "001/1.png 001/2.png 002/3.png",
        {"labels.csv": "filename,label\n001/1.png,cat\n002/3.png,cat\n001/2.png,dog\n"},
        {"train": {"001/1.png": "cat", "002/3.png": "cat", "001/2.png": "dog"}},
    ),
    "a column of splits": (
        "a/1.png a/2.png b/3.png b/4.png",
        {
            "metadata.csv": "file_name,label,split\n"
            "a/1.png,cat,train\na/2.png,dog,train\nb/3.png,cat,Val\nb/4.png,dog,TEST\n"
        },
        {
            "train": {"a/1.png": "cat", "a/2.png": "dog"},
            "validation": {"b/3.png": "cat"},
            "test": {"b/4.png": "dog"},
        },
    ),
}


@pytest.mark.parametrize(("files", "tables", "expected"), TABLES.values(), ids=TABLES)
def test_tables_of_labels(
    tmp_path: Path, files: str, tables: dict[str, str], expected: dict[str, dict[str, str]]
) -> None:
    write_files(tmp_path, files)
    for name, content in tables.items():
        (tmp_path / name).write_bytes(content.encode())
    assert labels(read_folder(tmp_path)) == expected


def test_a_table_above_the_folder(tmp_path: Path) -> None:
    write_files(tmp_path, "pictures/1.png pictures/2.png other/1.png")
    (tmp_path / "labels.csv").write_text("file_name,label\n1.png,cat\n2.png,dog\n")
    (tmp_path / "unrelated.csv").write_text("file_name,label\n1.png,x\n")
    assert labels(read_folder(tmp_path / "pictures")) == {"train": {"1.png": "cat", "2.png": "dog"}}


def test_what_a_table_leaves_out_is_counted(tmp_path: Path) -> None:
    write_files(tmp_path, "1.png 2.png 3.png 4.png notes.txt")
    rows = "file_name,label\n1.png,cat\n2.png,dog\n2.png,dog\n3.png,\n5.png,cat\n6.png,cat\n"
    (tmp_path / "labels.csv").write_text(rows)
    contents = read_folder(tmp_path)
    assert labels(contents) == {"train": {"1.png": "cat", "2.png": "dog"}}
    assert contents.left_out == {
        "without a class or split": 1,
        "without a label in labels.csv": 1,
        "named in labels.csv without a file": 2,
        "named again in labels.csv": 1,
        "of another type": 1,
    }


@pytest.mark.parametrize(
    ("files", "tables", "message"),
    [
        (
            "1.png",
            {"labels.csv": "file_name,class,species\n1.png,a,b\n"},
            "labels.csv must be a table with one column of labels, got class and species; rename or remove",
        ),
        (
            "1.png",
            {"labels.csv": "file_name,width,height\n1.png,3,4\n"},
            r"labels.csv must be a table with a column of labels \(.*\), got the columns file_name, width",
        ),
        (
            "1.png",
            {"labels.csv": "1.png,cat\n"},
            r"must be a table with a column of file names \(.*\), got the columns 1.png, cat",
        ),
        (
            "1.png",
            {"answers.csv": "image,class,probability,exit_0,exit_1\n1.png,cat,1,cat,cat\n"},
            "answers.csv must be a table of labels, got predictions of netfission",
        ),
        (
            "1.png 2.png",
            {"labels.csv": "file_name,label\n8.png,cat\n9.png,dog\n"},
            "labels.csv must be a table that names images below .*, got 2 files elsewhere",
        ),
        (
            "1.png",
            {"labels.csv": "file_name,label\n1.png,cat\n1.png,dog\n"},
            "labels.csv must be a table with one label per image, got cat and dog for 1.png",
        ),
        (
            "1.png 2.png",
            {"labels.csv": "file_name,label,split\n1.png,cat,train\n2.png,dog,train\n1.png,cat,test\n"},
            "labels.csv must be a table with one split per image, got train and test for 1.png",
        ),
        (
            "1.png 2.png 3.png",
            {"labels.csv": 'file_name,label\n1.png,cat\n2.png,"dog\n3.png,cat\n'},
            r"labels.csv must be a table whose cells have one line, got .*; a quotation mark is not closed",
        ),
        (
            "1.png 2.png a/3.png b/4.png",
            {"labels.csv": "file_name,label\n1.png,cat\n2.png,dog\n"},
            "must be a folder of either class folders or images named by labels.csv, got both, with 2 images "
            "beside the folders; move one of them elsewhere",
        ),
        (
            "1.png",
            {"labels.csv": "file_name,label\n1.png,cat\n", "more.csv": "file_name,label\n1.png,cat\n"},
            "must be a folder with one table of labels, got labels.csv and more.csv",
        ),
        (
            "train/1.png test/1.png",
            {"labels.csv": "file_name,label\n1.png,cat\n"},
            "labels.csv must be a table whose .* of one image, got 1.png for .*test/1.png and .*train/1.png;",
        ),
        (
            "1.png 2.png",
            {"train.csv": "id,label\n1,a\n2,b\n", "test.csv": "id,label\n2,b\n"},
            "test.csv must be a table of other images .*, got .*2.png in the train and the test split",
        ),
        (
            "0001/1.png 0001/2.png 0002/3.png",
            {"labels.csv": "file_name,label\n0001/1.png,cat\n0001/2.png,dog\n"},
            "a folder whose images all have a label in labels.csv, got 1 without one; labels.csv contradicts",
        ),
    ],
)
def test_tables_that_leave_a_choice_are_refused(
    tmp_path: Path, files: str, tables: dict[str, str], message: str
) -> None:
    write_files(tmp_path, files)
    for name, content in tables.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_class_folders_go_before_a_table_that_agrees(tmp_path: Path) -> None:
    write_files(tmp_path, "cat/1.png dog/2.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\ncat/1.png,animal\ndog/2.png,animal\n")
    assert read_folder(tmp_path).classes == ["cat", "dog"]


PATIENTS = "001/a.png 001/b.png 002/c.png 002/d.png 003/e.png 003/f.png"


def table(header: str, label: dict[str, str], files: str = PATIENTS) -> str:
    """Return a table that gives each file the label of its folder."""
    return f"{header}\n" + "".join(f"{file},{label[file.split('/')[0]]}\n" for file in files.split())


ONE_EACH = {"001": "1", "002": "2", "003": "3"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "labels.csv",
            table("file_name,class,species", {"001": "a,x", "002": "b,x", "003": "a,x"}),
            "/labels.csv must be a table with one column of labels, got class and species; rename or remove",
        ),
        (
            "train_labels.csv",
            table("file_name,diagnosis,age", {"001": "a,1", "002": "b,1", "003": "a,2"}),
            "/train_labels.csv must be a table with a column of labels .* the columns file_name, diagnosis",
        ),
        (
            "labels.csv",
            table("001/a.png,a", {"001": "a", "002": "b", "003": "a"}),
            r"/labels.csv must be a table with a column of file names .* the columns 001/a.png, a$",
        ),
        (
            "labels.csv",
            "file_name,label\na,1\na,2\n",
            "/labels.csv must be a table with one label per image, got 1 and 2 for a$",
        ),
        (
            "labels.csv",
            "file_name,label\n001/a.png,cat\n002/c.png,dog\n003/e.png,cat\n",
            "images all have a label in labels.csv, got 3 without one; labels.csv contradicts the",
        ),
    ],
)
def test_labels_that_cannot_be_used_are_refused_beside_class_folders(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    write_files(tmp_path, PATIENTS)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("prices.csv", "item,price\n1,2\n", "it must be a table with a column of file names"),
        ("labels.csv", "file_name,label\nq,1\nr,2\n", "it must be a table that names images below"),
        ("labels.csv", "", "it must be a table of labels, got no names of columns"),
        (
            "metadata.csv",
            table("file_name,width,height", {"001": "8,8", "002": "8,9", "003": "8,8"}),
            "it must be a table with a column of labels",
        ),
        (
            "widths.csv",
            table("file_name,width", {"001": "8", "002": "9", "003": "8"}),
            "it must be a table that",
        ),
        (
            "labels.csv",
            table("file_name,label", dict.fromkeys(ONE_EACH, "cat")),
            "it gives all images one label",
        ),
        ("labels.csv", table("file_name,label", ONE_EACH), "it gives the class folders other names"),
        (
            "labels.csv",
            "file_name,label\n001/a.png,001\n001/b.png,\n",
            "it agrees with the folders, and labels 1 of 6 images",
        ),
        (
            "labels.csv",
            table("file_name,label", {name: name for name in ONE_EACH}) + "9.png,001\n",
            "it agrees with the folders, and labels 6 of 6 images; 1 row without an image, such as 9.png",
        ),
    ],
)
def test_other_tables_beside_class_folders_are_named(
    tmp_path: Path, name: str, content: str, reason: str
) -> None:
    write_files(tmp_path, PATIENTS)
    (tmp_path / name).write_text(content)
    contents = read_folder(tmp_path)
    assert contents.classes == ["001", "002", "003"]
    assert list(contents.unused) == [name]
    assert contents.unused[name].startswith(reason)
    assert contents.left_out == {}


@pytest.mark.parametrize(
    "content",
    [
        table("file_name,label", {name: name for name in ONE_EACH}),
        table("photograph,class,species", {name: f"{name},x" for name in ONE_EACH}),
        "file_name,label\n" + "".join(f" {file[4:]},{file[:3]}\n" for file in PATIENTS.split()),
    ],
)
def test_tables_that_agree_with_class_folders_need_no_word(tmp_path: Path, content: str) -> None:
    write_files(tmp_path, PATIENTS)
    (tmp_path / "labels.csv").write_text(content)
    contents = read_folder(tmp_path)
    assert (contents.classes, contents.unused, contents.remarks) == (["001", "002", "003"], {}, [])
    assert contents.left_out == {}  # the table is not "of another type"


@pytest.mark.parametrize(
    ("given", "classes", "differences"),
    [
        ({"001": "cat", "002": "dog", "003": "cat"}, ["cat", "dog"], ""),
        (
            {"001": "002", "002": "001", "003": "003"},
            ["001", "002", "003"],
            " (4 of 6 images differ, such as 002 for 001/a.png)",
        ),
    ],
    ids=["coarser", "swapped"],
)
def test_a_table_that_contradicts_class_folders_is_used_if_complete(
    tmp_path: Path, given: dict[str, str], classes: list[str], differences: str
) -> None:
    write_files(tmp_path, PATIENTS)
    (tmp_path / "labels.csv").write_text(table("file_name,label", given))
    contents = read_folder(tmp_path)
    assert contents.classes == classes
    assert labels(contents)["train"]["001/a.png"] == given["001"]
    assert contents.remarks == [f"the classes are those of labels.csv, not the 3 folders{differences}"]


def test_a_table_that_contradicts_one_split_must_name_all_images_of_the_others(tmp_path: Path) -> None:
    write_files(tmp_path, "train/a/1.png train/a/2.png train/b/3.png train/b/4.png test/a/5.png test/b/6.png")
    rows = "file_name,label\n5.png,b\n6.png,a\n1.png,a\n"
    (tmp_path / "labels.csv").write_text(rows)
    message = (
        "/train must be a folder whose images all have a label in labels.csv, got 3 without one; labels.csv"
    )
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)
    (tmp_path / "labels.csv").write_text(f"{rows}2.png,a\n3.png,b\n4.png,b\n")
    assert labels(read_folder(tmp_path))["test"] == {"test/a/5.png": "b", "test/b/6.png": "a"}


@pytest.mark.parametrize("name", ["Birds", "birds", "METADATA"])
def test_a_table_beside_a_folder_of_images_may_have_its_name_in_any_case(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, "Birds/1.png Birds/2.png")
    (tmp_path / f"{name}.csv").write_text("file_name,label\nBirds/1.png,wren\nBirds/2.png,rook\n")
    assert labels(read_folder(tmp_path / "Birds")) == {"train": {"1.png": "wren", "2.png": "rook"}}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_of_any_unicode_encoding_are_read(tmp_path: Path, encoding: str, end: str) -> None:
    write_files(tmp_path, "1.png 2.png")
    text = end.join(["file_name\tlabel", "1.png\trosé", "2.png\tdaisy", ""])
    mark = "\ufeff" if encoding.startswith("utf-16-") else ""
    (tmp_path / "labels.csv").write_bytes((mark + text).encode(encoding))
    assert labels(read_folder(tmp_path)) == {"train": {"1.png": "rosé", "2.png": "daisy"}}


def test_a_damaged_table_is_refused_in_one_line(tmp_path: Path) -> None:
    write_files(tmp_path, "1.png 2.png")
    (tmp_path / "labels.csv").write_bytes("file_name,label\n1.png,a\n".encode("utf-16") + b"x")
    with pytest.raises(
        ValueError, match=r"/labels\.csv must be a table of labels, got damaged content \("
    ) as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_table_may_differ_for_one_image(tmp_path: Path) -> None:
    write_files(tmp_path, PATIENTS)
    content = table("file_name,label", {name: name for name in ONE_EACH})
    (tmp_path / "labels.csv").write_text(content.replace("003/f.png,003", "003/f.png,001"))
    (remark,) = read_folder(tmp_path).remarks
    assert remark.endswith(" (1 of 6 images differs, such as 001 for 003/f.png)")


def test_nan_as_people_write_it_is_a_class(tmp_path: Path) -> None:
    write_files(tmp_path, "1.png 2.png")
    (tmp_path / "labels.csv").write_text("file_name,label\n1.png,Nan\n2.png,Pita\n")
    assert read_folder(tmp_path).classes == ["Nan", "Pita"]


@pytest.mark.parametrize(("zero", "one"), [("0", "1"), ("0.0", "1.0"), ("0", "1.00")])
def test_whole_numbers_are_classes(tmp_path: Path, zero: str, one: str) -> None:
    write_files(tmp_path, "1.png 2.png")
    (tmp_path / "labels.csv").write_text(f"file_name,label\n1.png,{zero}\n2.png,{one}\n")
    assert labels(read_folder(tmp_path)) == {"train": {"1.png": "0", "2.png": "1"}}


@pytest.mark.parametrize(
    "labels", [["0.5", "1.5", "0.5", "1.5", "2", "2"], ["1.5", "x1", "3", "4", "5", "6"]]
)
def test_numbers_of_few_values_are_classes(tmp_path: Path, labels: list[str]) -> None:
    rows = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
    write_files(tmp_path, " ".join(f"{number}.png" for number in range(6)))
    (tmp_path / "labels.csv").write_text(f"file_name,label\n{rows}")
    assert read_folder(tmp_path).classes == sorted(set(labels))


@pytest.mark.parametrize("layout", ["flat", "folders"])
@pytest.mark.parametrize(
    ("given", "found"),
    [
        (
            ["0.1", "0.2", "0.3", "1", "2", "2e-1"],
            "6 different numbers in 6 rows, such as 0.1; measured values cannot be learned$",
        ),
        (["a", "b", "NaN", "a", "b", "a"], "NaN for 2.png in row 4; leave the cell empty to leave the image"),
    ],
)
def test_labels_that_are_no_classes_are_refused(
    tmp_path: Path, layout: str, given: list[str], found: str
) -> None:
    write_files(
        tmp_path, " ".join(f"{'' if layout == 'flat' else 'ab'[n % 2] + '/'}{n}.png" for n in range(6))
    )
    rows = "".join(f"{number}.png,{label}\n" for number, label in enumerate(given))
    (tmp_path / "labels.csv").write_text(f"file_name,label\n{rows}")
    with pytest.raises(ValueError, match=f"/labels.csv must be a table of classes, got {found}"):
        read_folder(tmp_path)


def test_a_class_without_training_images_is_named_with_its_row(tmp_path: Path) -> None:
    write_files(tmp_path, "train/1.png train/2.png test/3.png test/4.png")
    (tmp_path / "train.csv").write_text("file_name,label\n1.png,a\n2.png,b\n")
    (tmp_path / "test.csv").write_text("file_name,label\n3.png,a\n4.png,bee\n")
    expected = r"/test\.csv must be a table whose test images are of the 2 training classes"
    found = r"bee without training images \(4\.png in row 3\)"
    with pytest.raises(ValueError, match=f"{expected}, got {found}"):
        read_folder(tmp_path)


@pytest.mark.parametrize("folder", ["images", "data/images", "train/images"])
def test_a_single_folder_does_not_hide_why_a_table_is_not_used(tmp_path: Path, folder: str) -> None:
    write_files(tmp_path, f"{folder}/1.png {folder}/2.png")
    (tmp_path / "labels.csv").write_text("file_name,class,species\n1.png,a,x\n2.png,b,x\n")
    with pytest.raises(ValueError, match=r"/labels\.csv must be a table with one column of labels"):
        read_folder(tmp_path)


@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="names of files are not UTF-8 here")
@pytest.mark.parametrize("sign", ["\xe9", "e\u0301"])
def test_names_are_matched_in_any_unicode_form(tmp_path: Path, sign: str) -> None:
    write_files(tmp_path, "ros\xe9.png dog.png cafe\u0301.png")
    rows = f"ros{sign}.png,ros\xe9\ncaf{sign},rose\u0301\ndog,dog\n"
    (tmp_path / "Labels.CSV").write_text(f"file_name,label\n{rows}", encoding="utf-8")
    contents = read_folder(tmp_path)
    assert contents.classes == ["dog", "ros\xe9"]
    assert len(contents.splits["train"].labels) == 3
    write_files(tmp_path / "b", "ros\xe9/1.png rose\u0301/2.png dog/3.png")
    assert read_folder(tmp_path / "b").classes == ["dog", "ros\xe9"]


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        ("train eval", {"test": "eval"}),
        ("Train Tests", {"test": "Tests"}),
        ("train holdout", {"test": "holdout"}),
        ("train dev", {"test": "dev"}),
        ("train dev evaluation", {"validation": "dev", "test": "evaluation"}),
        ("train val eval", {"validation": "val", "test": "eval"}),
        ("train test eval", {"validation": "eval", "test": "test"}),
    ],
)
def test_synonyms_of_splits_count_beside_a_training_split(
    tmp_path: Path, folders: str, splits: dict[str, str]
) -> None:
    for folder in folders.split():
        write_files(tmp_path / folder, "cat/1.png dog/2.png")
    contents = read_folder(tmp_path)
    assert {name: part.origin.name for name, part in contents.splits.items() if name != "train"} == splits
    assert contents.unused == {}


def test_folders_beside_splits_are_named(tmp_path: Path) -> None:
    for folder in ("train", "test", "holdout", "extra"):
        write_files(tmp_path / folder, "cat/1.png dog/2.png")
    write_files(tmp_path, "val/3.png notes/a.txt")
    contents = read_folder(tmp_path)
    assert contents.unused == {
        "extra": "not the name of a split; rename it to val or test to use it",
        "holdout": "not the name of a split; rename it to val or test to use it",
        "val": "its images have no labels",
    }
    assert contents.left_out["without a class or split"] == 5
    write_files(tmp_path / "flat", "train/a/1.png train/b/1.png eval/3.png")
    assert read_folder(tmp_path / "flat").unused == {"eval": "its images have no labels"}
    without = write_files(tmp_path / "classes", "eval/1.png dev/1.png tests/1.png")
    assert read_folder(without).classes == ["dev", "eval", "tests"]


def test_splits_of_a_table_that_are_not_used_are_counted_by_name(tmp_path: Path) -> None:
    write_files(tmp_path, "1.png 2.png 3.png 4.png 5.png 6.png")
    (tmp_path / "labels.csv").write_text(
        "file_name,label,split\n1,a,train\n2,b,train\n3,a,test\n4,a,holdout\n5,b,holdout\n6,a,\n"
    )
    assert read_folder(tmp_path).left_out == {"without a class or split": 1, "of the holdout split": 2}


def test_splits_of_a_table_are_those_of_class_folders_that_agree(tmp_path: Path) -> None:
    write_files(tmp_path, "cat/1.png cat/2.png dog/3.png dog/4.png")
    rows = "cat/1.png,cat,train\ncat/2.png,cat,test\ndog/3.png,dog,train\ndog/4.png,dog,test\n"
    (tmp_path / "metadata.csv").write_text(f"file_name,label,split\n{rows}")
    assert labels(read_folder(tmp_path)) == {
        "train": {"cat/1.png": "cat", "dog/3.png": "dog"},
        "test": {"cat/2.png": "cat", "dog/4.png": "dog"},
    }
    write_files(tmp_path, "dog/5.png")
    with pytest.raises(
        ValueError, match=r"got 1 without one; metadata\.csv has splits: remove it, or complete"
    ):
        read_folder(tmp_path)


def test_numbers_in_a_table_are_no_names_of_several_images(tmp_path: Path) -> None:
    write_files(tmp_path, "cat/1.png cat/2.png dog/1.png dog/2.png")
    (tmp_path / "prices.csv").write_text("id,category\n1,a\n2,b\n")
    assert read_folder(tmp_path).unused["prices.csv"].startswith("it must be a table whose file names")
    (tmp_path / "prices.csv").write_text("id,category\n1.png,a\n2.png,b\n")
    with pytest.raises(
        ValueError, match=r"prices\.csv must be a table whose file names are each of one image"
    ):
        read_folder(tmp_path)


def test_a_table_of_one_split_is_compared_with_its_images_alone(tmp_path: Path) -> None:
    write_files(tmp_path, "train/cat/1.png train/dog/2.png test/cat/2.png test/dog/1.png")
    (tmp_path / "train.csv").write_text("file_name,label\n1.png,cat\n2.png,dog\n")
    contents = read_folder(tmp_path)
    assert contents.classes == ["cat", "dog"]
    assert contents.unused == {}


def test_copies_are_counted_in_splits_that_are_cut_from_training(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 10, "b": 10})
    for file in sorted(tmp_path.glob("*/*.bmp")):
        file.with_name(f"copy of {file.name}").write_bytes(file.read_bytes())
    data = load_data(str(tmp_path), validation=0.0)
    assert len(data.test) == 8
    assert (
        data.summary.test.in_training >= 4
    )  # of pairs, one each in training, unless both are in the test split
    assert data.summary.train.in_training == 0
