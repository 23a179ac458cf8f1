import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from netfission.data import load_data
from netfission.data.sources import find_source, source_from_arrow


def _dataset(labels: list[Any], **columns: Any) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in labels]
    values = {"img": images, "fine_label": labels}
    features = {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["a", "b"])}
    for name, (column, feature) in columns.items():
        values[name], features[name] = column, feature
    return datasets.Dataset.from_dict(values, datasets.Features(features))


def _parquet(folder: Path, **splits: datasets.Dataset) -> str:
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


def test_parquet_shards(tmp_path: Path) -> None:
    train = _dataset([0, 1] * 6)
    halves = {f"train-0000{i}-of-00002": train.shard(2, i, contiguous=True) for i in range(2)}
    for name, half in halves.items():
        half.to_parquet(tmp_path / f"{name}.parquet")
    _parquet(tmp_path, test=_dataset([1, 0, 0]))
    data = load_data(str(tmp_path), validation=0)
    assert data.classes == ["a", "b"]
    assert data.train.labels.tolist() == [0, 1] * 6
    assert data.test.labels.tolist() == [1, 0, 0]
    for row in range(12):
        expected = np.asarray(train[row]["img"]).transpose(2, 0, 1)
        assert np.array_equal(data.train.images[row].numpy(), expected)


@pytest.mark.parametrize("shown", [True, False])
def test_a_progress_bar_is_for_terminals(
    shown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = _parquet(tmp_path, train=_dataset([0, 1] * 10))
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: shown)
    find_source(where)
    assert bool(capsys.readouterr().err) == shown
    assert datasets.is_progress_bar_enabled()


def test_parquet_without_test_split_gets_one_cut(tmp_path: Path) -> None:
    data = load_data(_parquet(tmp_path, train=_dataset([0, 1] * 10)), validation=0)
    assert (len(data.train), len(data.test)) == (16, 4)


def test_fine_labels_before_coarse(tmp_path: Path) -> None:
    coarse = ([1] * 6, datasets.ClassLabel(names=["x", "y", "z"]))
    train = _dataset([0] * 6, coarse_label=coarse)
    train = train.select_columns(["coarse_label", "img", "fine_label"])
    source = find_source(_parquet(tmp_path, train=train))
    assert source.classes == ["a", "b"]
    assert not source.train.labels.any()


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("img", r"must be a data set with a column of type Image, got fine_label \(ClassLabel\)"),
        ("fine_label", r"with a column of type ClassLabel, or one named label of .*, got img \(Image\)$"),
    ],
)
def test_parquet_without_the_columns(tmp_path: Path, removed: str, message: str) -> None:
    folder = _parquet(tmp_path, train=_dataset([0, 1]).remove_columns(removed))
    with pytest.raises(ValueError, match=message):
        load_data(folder)


def test_parquet_without_train_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a data set with a train split, got the splits test"):
        load_data(_parquet(tmp_path, test=_dataset([0, 1])))


def test_labels_out_of_range(tmp_path: Path) -> None:
    folder = _parquet(tmp_path, train=_dataset([0, 1] * 5), test=_dataset([0, 1, -1, 0, None]))
    found = "-1 in row 2 of the test split; 2 of 5 labels are missing or out of range"
    message = f"with fine_label from 0 to 1, got {found}$"
    with pytest.raises(ValueError, match=message):
        load_data(folder)


def test_missing_labels_are_called_missing(tmp_path: Path) -> None:
    folder = _parquet(tmp_path, train=_dataset([0, None, 1, 0]))
    message = r" got no fine_label in row 1 of the train split; 1 of 4 labels are missing or out of range$"
    with pytest.raises(ValueError, match=message):
        load_data(folder)


def test_labels_above_the_classes(tmp_path: Path) -> None:
    table = _dataset([0, 1, 0]).data.table
    column = table.schema.get_field_index("fine_label")
    # As another writer might leave it: `datasets` itself refuses to write such a label.
    table = table.set_column(column, table.schema.field(column), pa.array([0, 1, 2]))
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(
        ValueError, match=r" from 0 to 1, got 2 in row 2 of .*; 1 of 3 labels are out of range"
    ):
        load_data(str(tmp_path))


def test_splits_of_unlike_classes(tmp_path: Path) -> None:
    other = _dataset([0]).cast_column("fine_label", datasets.ClassLabel(names=["a", "c"]))
    splits = datasets.DatasetDict(train=_dataset([0, 1] * 5), test=other)
    with pytest.raises(
        ValueError, match=r"^here must be a data set whose splits have the same columns and class names"
    ):
        source_from_arrow(splits, "here")


@pytest.mark.parametrize(
    ("rows", "found"),
    [(None, r"damaged content in test-00000-of-00001.parquet \("), (0, "0 rows in test-00000-of-00001.par")],
    ids=["damaged", "empty"],
)
def test_a_parquet_file_that_cannot_be_read_is_named(
    rows: int | None, found: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = _parquet(tmp_path, train=_dataset([0, 1] * 5), test=_dataset([0, 1]))
    file = tmp_path / "test-00000-of-00001.parquet"
    if rows is None:
        file.write_bytes(b"PAR1 and then nothing")
    else:
        pq.write_table(pq.read_table(file).slice(0, rows), file)
    expected = f"must be a folder of readable parquet files with rows, got {found}"
    with pytest.raises(ValueError, match=expected) as caught:
        load_data(folder)
    assert "\n" not in str(caught.value)
    assert "Failed to read" not in capfd.readouterr().err  # the log of `datasets`


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = _parquet(tmp_path, test=_dataset([0, 1]))
    for number in (0, 3):
        _dataset([0, 1] * 5).to_parquet(tmp_path / f"train-{number:05}-of-00004-ab12.parquet")
    message = (
        "must be a folder of all 4 parquet files of train, got 2, without train-00001-of-00004 and 1 more"
    )
    with pytest.raises(ValueError, match=message):
        load_data(folder)
    for number in (1, 2):
        _dataset([0, 1] * 5).to_parquet(tmp_path / f"train-{number:05}-of-00004.parquet")
    assert load_data(folder, validation=0).summary.train.images == 40


def test_classes_without_images_are_counted(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(20)]
    label = datasets.ClassLabel(names=names)
    train = _dataset([0, 1] * 5).cast_column("fine_label", label)
    test = _dataset([0, 1]).cast_column("fine_label", label)
    line = load_data(_parquet(tmp_path, train=train, test=test), validation=0).summary.line()
    assert line.endswith("; 5 training images per class; no images of 18 classes (c2, c3, c4, c5, …, c19)")
    more = datasets.concatenate_datasets([test, _dataset([1]).cast_column("fine_label", label)])
    more = more.map(lambda row: {"fine_label": 4 if row["fine_label"] else 0}, features=more.features)
    found = r"got none of c4, and no image at all of 17 classes \(c2, c3, c5, c6, …, c19\); add some"
    with pytest.raises(ValueError, match=found):
        load_data(_parquet(tmp_path, test=more), validation=0)


def test_corrupt_parquet_row(tmp_path: Path) -> None:
    broken = _dataset([0, 1] * 5).cast_column("img", datasets.Image(decode=False))
    broken = broken.map(
        lambda row, index: {"img": {"bytes": b"x", "path": None} if index == 3 else row["img"]},
        with_indices=True,
    )
    folder = _parquet(tmp_path, train=broken.cast_column("img", datasets.Image()))
    found = r"data that cannot be read \(not an image of a known format\)"
    with pytest.raises(
        ValueError, match=rf"^row 3 of the train split must be a readable image, got {found}; remove it"
    ):
        load_data(folder, validation=0)


def test_unknown_names() -> None:
    with pytest.raises(
        ValueError, match=r"^data must be one of digits, .*, got 'cifar-100'; did you mean cifar100"
    ):
        load_data("cifar-100")
    with pytest.raises(ValueError, match=r"^data must be one of digits, .*, or a folder, got 'qqq'$"):
        load_data("qqq")
    with pytest.raises(ValueError, match=r"^data must be one of digits, .*, or a folder, got ''$"):
        load_data("")  # not the current folder


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data folder .*/nowhere does not exist"):
        load_data(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"^data table nowhere\.csv does not exist$"):
        load_data("nowhere.csv")
    (tmp_path / "file").touch()
    expected = r"^data must be .*, or a table of paths and labels \(\.csv, \.tsv, \.parquet\), got the file"
    with pytest.raises(ValueError, match=expected):
        load_data(str(tmp_path / "file"))


def test_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"must be a folder of parquet files, or of images .*, got no class folder"
    ):
        load_data(str(tmp_path))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"cat must be a class folder with images, got no image file"):
        load_data(str(tmp_path))


def test_unlike_class_folders(image_folder: Callable[..., Path]) -> None:
    image_folder("train")
    folder = image_folder("test", ("cat", "bird"))
    with pytest.raises(
        ValueError,
        match=r"/test must be a folder whose test images are of the 2 training classes, got bird without",
    ):
        load_data(str(folder))


@pytest.mark.parametrize(
    ("values", "classes"), [(["dog", "cat", "dog"], ["cat", "dog"]), ([7, -1, 7], ["-1", "7"])]
)
def test_any_data_set_of_the_hub_by_its_name(values: list, classes: list[str], monkeypatch) -> None:
    features = datasets.Features(
        {"picture": datasets.Image(), "label": datasets.Dataset.from_dict({"v": values}).features["v"]}
    )
    rows = {"picture": [Image.new("RGB", (8, 8), (40 * n, 0, 0)) for n in range(3)], "label": values}
    split = datasets.Dataset.from_dict(rows, features=features)
    by_name = {("someone/pets", "small"): datasets.DatasetDict(train=split, test=split.select([1]))}
    monkeypatch.setattr("netfission.data.sources.load_from_hub", lambda *place: by_name[place])
    source = find_source("hf/someone/pets/small")
    assert source.classes == classes
    assert source.train.labels.tolist() == [1, 0, 1]
    assert source.test.labels.tolist() == [0]
    assert source.train.open(2).getpixel((0, 0)) == (80, 0, 0)


def test_images_that_a_table_names_are_read_from_their_files(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (name == "cat" and "red") or "blue").save(tmp_path / name / "first.png")
    splits = datasets.load_dataset("imagefolder", data_dir=str(tmp_path))
    records = source_from_arrow(splits, "here").train
    assert [records.open(row).getpixel((0, 0)) for row in (0, 1)] == [(255, 0, 0), (0, 0, 255)]
    assert records.content(0) == str(tmp_path / "cat" / "first.png")


def test_labels_of_text_that_are_missing(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [Image.new("L", (8, 8))] * 3, "label": ["cat", None, "dog"]}
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features))
    with pytest.raises(ValueError, match="got no label in row 1 of the train split"):
        source_from_arrow(splits, "here")


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str) -> datasets.DatasetDict:
        asked.append(name)
        return datasets.DatasetDict(train=_dataset([0, 1] * 5), valid=_dataset([0, 1]))

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    for name in ("cifar10", "cifar100", "tiny-imagenet"):
        assert len(load_data(name).test) == 2
    assert asked == ["uoft-cs/cifar10", "uoft-cs/cifar100", "zh-plus/tiny-imagenet"]
