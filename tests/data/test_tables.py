"""Tables of paths and labels as data sets."""

import re
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow.parquet import write_table

from netfission.cli import main
from netfission.data.load import load_data
from netfission.data.matched import load_matched
from netfission.data.sources import find_source, fingerprint
from netfission.data.unlabelled import load_unlabelled

CLASSES = ("cat", "dog", "fox")


def write_images(folder: Path, count: int = 8, size: int = 12) -> list[tuple[str, str]]:
    """Write images, and return the relative path and class of each."""
    rows = []
    for number in range(count * len(CLASSES)):
        label = CLASSES[number % len(CLASSES)]
        name = f"photographs/{number}.png"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        rows.append((name, label))
    return rows


def write_csv(path: Path, rows: list[tuple[str, ...]], header: str = "path,label") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *map(",".join, rows)]))
    return path


def write_parquet(path: Path, rows: list[tuple[str, ...]], *names: str) -> Path:
    columns = map(list, zip(*rows, strict=True))
    write_table(pyarrow.table(dict(zip(names, columns, strict=True))), path)
    return path


def labels_of(records) -> dict[str, int]:
    return {Path(path).name: int(label) for path, label in zip(records.paths, records.labels, strict=True)}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_paths_are_relative_to_the_table_and_splits_are_read(tmp_path: Path, kind: str) -> None:
    rows = [(f"../{name}", label) for name, label in write_images(tmp_path)]
    rows[0] = (str(tmp_path / "photographs" / "0.png"), "cat")  # an absolute path
    splits = [(*row, "train" if number < 18 else "test") for number, row in enumerate(rows)]
    (tmp_path / "tables").mkdir()
    if kind == "csv":
        table = write_csv(tmp_path / "tables" / "all.csv", splits, "path,label,split")
    else:
        table = write_parquet(tmp_path / "tables" / "all.parquet", splits, "path", "label", "split")
    source = find_source(str(table))
    assert source.classes == list(CLASSES)
    assert labels_of(source.train) == {f"{number}.png": number % 3 for number in range(18)}
    assert labels_of(source.test) == {f"{number}.png": number % 3 for number in range(18, 24)}
    data = load_data(str(table))
    assert (len(data.train) + len(data.validation), len(data.test)) == (18, 6)
    assert data.shape == (3, 12, 12)


def test_a_table_without_splits_is_all_training_and_evaluates_whole(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "all.csv", write_images(tmp_path))
    data = load_data(str(table))
    assert len(data.train) + len(data.validation) + len(data.test) == 24
    assert str(load_matched(str(table), CLASSES, (3, 12, 12))) == "all 24 images of all.csv"


def test_numbers_in_parquet_are_classes_and_rows_without_a_label_are_left_out(tmp_path: Path) -> None:
    rows = [
        (name, None if number == 5 else float(number % 3))
        for number, (name, _) in enumerate(write_images(tmp_path))
    ]
    source = find_source(str(write_parquet(tmp_path / "all.parquet", rows, "file", "label")))
    assert source.classes == ["0", "1", "2"]
    assert len(source.train.labels) == 23
    assert source.left_out == {"without a label in all.parquet": 1}


def test_the_fingerprint_is_that_of_rows_and_files(tmp_path: Path) -> None:
    rows = write_images(tmp_path)
    table = write_csv(tmp_path / "all.csv", rows)
    first = fingerprint(str(table))
    assert fingerprint(str(write_csv(tmp_path / "again.csv", rows))) == first
    assert fingerprint(str(write_csv(tmp_path / "other.csv", rows[1:]))) != first
    (tmp_path / rows[0][0]).write_bytes(b"")
    assert fingerprint(str(table)) not in (first, None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("photographs/0.png", "cat"), ("gone.png", "dog"), ("0.png", "dog")],
            "a table of files that exist, got no gone.png (row 3); 2 of 3 files are missing; paths "
            "are relative to {folder}",
        ),
        (
            [("photographs/0.png", "cat"), ("./photographs/0.png", "dog")],
            "a table with one label per image, got cat and dog for ./photographs/0.png",
        ),
        ([("photographs/0.png", "")], "a table with labels of images, got none"),
        ([], "a table with labels of images, got none"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, rows: list[tuple[str, str]], message: str) -> None:
    write_images(tmp_path)
    table = write_csv(tmp_path / "all.csv", rows)
    message = f"{table} must be {message.format(folder=tmp_path)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_data(str(table))


def test_a_table_of_one_class_is_refused(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "all.csv", [(name, "cat") for name, _ in write_images(tmp_path)])
    message = f"{table} must be a data set of at least 2 classes, got 1 (cat)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_data(str(table))


def test_a_damaged_parquet_file_and_one_of_images_are_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "all.parquet"
    damaged.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"all\.parquet must be a table of labels, got damaged content \("):
        load_data(str(damaged))
    images = write_parquet(tmp_path / "images.parquet", [({"bytes": b"x"}, 1)], "image", "label")
    with pytest.raises(ValueError, match=r"got values of type struct<.*> in the column image; if these are"):
        load_data(str(images))


def test_training_reads_a_table_and_missing_files_end_it_in_one_line(tmp_path: Path, capsys) -> None:
    rows = write_images(tmp_path)
    table = write_csv(tmp_path / "all.csv", rows)
    flags = "--model wrn-10-1 --exits 2 --epochs 1 --image-size 16 --accelerator cpu"
    arguments = ["train", "--data", str(table), *flags.split(), "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    (tmp_path / rows[3][0]).unlink()
    capsys.readouterr()
    assert main([*arguments[:-1], str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "must be a table of files that exist, got no photographs/3.png (row 5); 1 of 24 files" in error


def test_images_smaller_than_the_crop_are_enlarged_and_named(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "all.csv", write_images(tmp_path, size=12))
    data = load_data(str(table), image_size=20)
    assert data.shape == (3, 20, 20)
    remark = "24 images are enlarged more than 1.5 times, to 20×20 pixels, such as photographs/0.png (12×12)"
    assert data.summary.warnings == [remark]
    assert load_data(str(table), image_size=18).summary.warnings == []
    assert load_data(str(table)).summary.warnings == []


def test_a_crop_that_may_miss_the_whole_image_is_refused(tmp_path: Path, capsys) -> None:
    table = write_csv(tmp_path / "all.csv", write_images(tmp_path))
    flags = "--model wrn-10-1 --exits 2 --epochs 1 --crop-padding 12 --accelerator cpu"
    out = tmp_path / "run"
    assert main(["train", "--data", str(table), *flags.split(), "--out", str(out)]) == 2
    message = "netfission: --crop-padding must be less than the images' height and width (12), got 12\n"
    assert capsys.readouterr().err == message
    assert not out.exists()


@pytest.mark.parametrize(("name", "others"), [("label", ["size"]), ("what it shows", [])])
def test_lists_are_no_labels(tmp_path: Path, name: str, others: list[str]) -> None:
    rows = [(path, [label], *([8, 8] for _ in others)) for path, label in write_images(tmp_path)]
    table = write_parquet(tmp_path / "a.parquet", rows, "path", name, *others)
    found = rf"got values of type list<.*string> in the column {name}$"
    with pytest.raises(ValueError, match=f"must be a table of one path and one label per row, {found}"):
        find_source(str(table))


def test_lists_in_other_columns_are_not_read(tmp_path: Path) -> None:
    rows = [(*row, [8, 8]) for row in write_images(tmp_path)]
    table = write_parquet(tmp_path / "a.parquet", rows, "path", "label", "size")
    assert find_source(str(table)).classes == list(CLASSES)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("others", [("train", "foo"), ("foo", "bar")])
def test_an_unknown_split_is_refused_by_its_name(tmp_path: Path, kind: str, others: tuple[str, ...]) -> None:
    rows = [(*row, others[number > 20]) for number, row in enumerate(write_images(tmp_path))]
    if kind == "csv":
        table = write_csv(tmp_path / "a.csv", rows, "path,label,split")
    else:
        table = write_parquet(tmp_path / "a.parquet", rows, "path", "label", "split")
    name, number, count = ("'foo'", 21, 3) if others[0] == "train" else ("'foo'", 0, 24)
    message = (
        f"{table} must be a table whose splits are named train, val or test, got {name} for "
        f"photographs/{number}.png in row {number + 2}; {count} of 24 images have no such split; leave the "
        "cell empty to leave an image out"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_data(str(table))


def test_rows_that_name_a_file_again_are_counted(tmp_path: Path) -> None:
    rows = write_images(tmp_path)
    table = write_csv(tmp_path / "a.csv", [*rows, rows[3], (f"./{rows[3][0]}", rows[3][1]), (rows[4][0], "")])
    source = find_source(str(table))
    assert (len(source.train.labels), source.left_out) == (24, {"named again in a.csv": 3})
    assert "left out: 3 named again in a.csv" in load_data(str(table)).summary.text()


def test_rows_without_a_split_are_counted(tmp_path: Path) -> None:
    rows = write_images(tmp_path)
    splits = [(*row, ["train", "test", ""][number // 9]) for number, row in enumerate(rows)]
    table = write_csv(tmp_path / "a.csv", splits, "path,label,split")
    assert find_source(str(table)).left_out == {"without a class or split": 6}
    summary = load_data(str(table), validation=0.0).summary
    assert "left out: 6 without a class or split" in summary.text()


@pytest.mark.parametrize(
    ("used", "other"),
    [("test", "test"), ("test", "val"), ("val", "val"), ("test", "train"), ("train", "train")],
)
def test_images_without_labels_may_come_from_a_table_of_any_splits(
    tmp_path: Path, used: str, other: str
) -> None:
    rows = write_images(tmp_path)
    splits = [(*row, used if number < 20 else other) for number, row in enumerate(rows)]
    table = write_csv(tmp_path / "a.csv", splits, "path,label,split")
    assert len(load_unlabelled(str(table), (3, 8, 8))) == (24 if used == other else 20)
