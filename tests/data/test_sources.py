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
from netfission.data.sources import find_source


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
        ("fine_label", r"must be a data set with a column of type ClassLabel, got img \(Image\)"),
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
    message = r"with fine_label from 0 to 1, got -1 in row 2 of the test split; 2 of 5 labels are out of"
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
    from netfission.data.sources import source_from_arrow

    with pytest.raises(
        ValueError, match=r"^here must be a data set whose splits have the same columns and class names"
    ):
        source_from_arrow(splits, "here")


def test_damaged_parquet(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(
        ValueError, match=r"must be a folder of readable parquet files, got damaged ones \("
    ) as caught:
        load_data(str(tmp_path))
    assert "\n" not in str(caught.value)


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


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data folder .*/nowhere does not exist"):
        load_data(str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^data must be the name of a data set or a folder, got the file"):
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
        ValueError, match=r"/test must be a test split of the 2 training classes, got bird without training"
    ):
        load_data(str(folder))


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
