import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from netfission.data import StreamedSplit, TensorSplit, load_data
from netfission.data.load import find_splits
from netfission.data.sources import Source
from netfission.data.splits import ArrayRecords

SHARED = Path(__file__).parents[2] / "../shared/data"


def _rows(split: Any) -> set[bytes]:
    """Return what tells the images of a split apart."""
    return {split.images[i].numpy().tobytes() for i in range(len(split))}


def test_digits() -> None:
    data = load_data("digits")
    assert data.classes == [str(digit) for digit in range(10)]
    assert data.shape == (1, 8, 8)
    assert data.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (1293, 145, 359)
    assert isinstance(data.train, TensorSplit)
    assert data.train.images.shape == (1293, 1, 8, 8)
    assert (data.train.images.min(), data.train.images.max()) == (0, 255)
    scaled = data.train.images.double() / 255
    assert data.mean == pytest.approx([scaled.mean().item()])
    assert data.std == pytest.approx([scaled.std(correction=0).item()])
    for split, share in ((data.validation, 0.1 * 0.8), (data.test, 0.2)):
        counts = Counter(split.labels.tolist())
        assert all(abs(counts[digit] - share * 180) < 3 for digit in range(10))


def test_the_seed_moves_validation_but_never_test() -> None:
    first, again, other = (load_data("digits", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.test.images, other.test.images)
    assert torch.equal(first.validation.images, again.validation.images)
    assert not torch.equal(first.validation.labels, other.validation.labels)
    assert _rows(first.train) | _rows(first.validation) == _rows(other.train) | _rows(other.validation)


def test_no_validation() -> None:
    data = load_data("digits", validation=0)
    assert data.validation is None
    assert len(data.train) == 1438


def test_limit_per_class_nests_and_leaves_validation() -> None:
    full, more, fewer = (load_data("digits", limit_per_class=k) for k in (None, 20, 5))
    assert set(Counter(fewer.train.labels.tolist()).values()) == {5}
    assert _rows(fewer.train) < _rows(more.train) < _rows(full.train)
    assert torch.equal(fewer.validation.images, full.validation.images)


def test_image_size() -> None:
    data = load_data("digits", image_size=12, limit_per_class=2)
    assert data.shape == (1, 12, 12)
    assert data.train.images.shape == (20, 1, 12, 12)


def test_above_the_memory_limit_it_streams() -> None:
    held = load_data("digits")
    streamed = load_data("digits", memory_limit=1797 * 64 - 1)
    assert isinstance(load_data("digits", memory_limit=1797 * 64).train, TensorSplit)
    for part in ("train", "validation", "test"):
        held_split, streamed_split = getattr(held, part), getattr(streamed, part)
        assert isinstance(streamed_split, StreamedSplit)
        assert torch.equal(held_split.labels, streamed_split.labels)
        assert torch.equal(held_split.images[7], streamed_split[7][0])
    assert streamed.mean == pytest.approx(held.mean, abs=0.01)
    assert streamed.std == pytest.approx(held.std, abs=0.01)


def test_random_crops_have_larger_images_and_nothing_else_changes(image_folder: Callable[..., Path]) -> None:
    folder = str(image_folder(size=(40, 60)))
    plain = load_data(folder, image_size=8)
    data = load_data(folder, image_size=8, crop_scale=0.25)
    assert plain.crops is None and isinstance(data.crops, TensorSplit) and isinstance(data.train, TensorSplit)
    assert data.crops.images.shape[1:] == (3, 16, 16) and data.crops.labels.equal(data.train.labels)
    assert data.crops.images.equal(load_data(folder, image_size=16).train.images)
    for part in ("train", "validation", "test"):
        assert getattr(data, part).images.equal(getattr(plain, part).images)
    assert (data.mean, data.std, data.shape) == (plain.mean, plain.std, (3, 8, 8))
    least = 20 * 3 * 8 * 8  # bytes of all splits
    streamed = load_data(folder, image_size=8, crop_scale=0.25, memory_limit=least)
    assert isinstance(streamed.train, TensorSplit) and isinstance(streamed.crops, StreamedSplit)
    assert streamed.crops[3][0].equal(data.crops.images[3])


@pytest.mark.parametrize(
    ("image_size", "crop_scale", "size"), [(20, 0.01, 40), (40, 0.5, None), (50, 0.5, None)]
)
def test_images_are_not_enlarged_for_random_crops(
    image_folder: Callable[..., Path], image_size: int, crop_scale: float, size: int | None
) -> None:
    crops = load_data(
        str(image_folder(size=(40, 60))), image_size=image_size, crop_scale=crop_scale, checks=False
    ).crops
    assert size is None if crops is None else crops.images.shape[2:] == (size, size)


def test_image_folder(image_folder: Callable[..., Path]) -> None:
    image_folder("train", count=9)
    image_folder("train", count=3, mode="L")
    image_folder("train", count=1, mode="RGBA")
    folder = image_folder("val", count=4)
    data = load_data(str(folder), validation=0.25)
    assert data.classes == ["cat", "dog"]
    assert data.shape == (3, 6, 8)
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 6, 8)
    assert data.test.labels.tolist() == [0] * 4 + [1] * 4
    assert (load_data(str(folder), image_size=4).shape) == (3, 4, 4)


def test_image_folder_without_test_split(image_folder: Callable[..., Path]) -> None:
    data = load_data(str(image_folder()), validation=0.25)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 4, 4)
    nested = load_data(str(image_folder("train")), validation=0.25)
    assert (len(nested.train), len(nested.validation), len(nested.test)) == (12, 4, 4)


def test_a_class_of_one_image_stays_in_training(image_folder: Callable[..., Path]) -> None:
    image_folder()
    folder = image_folder(classes=("rare",), count=1)
    data = load_data(str(folder))
    assert data.classes == ["cat", "dog", "rare"]
    assert [split.labels.tolist().count(2) for split in (data.train, data.test)] == [1, 0]


def test_a_constant_channel_can_still_be_divided_by(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.new("RGB", (4, 4), (255, 0, 9)).save(tmp_path / name / f"{index}.png")
    data = load_data(str(tmp_path), validation=0)
    assert data.mean == pytest.approx((1, 0, 9 / 255))
    assert data.std == pytest.approx((1 / 255,) * 3)


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_corrupt_files_are_skipped_with_a_count(image_folder: Callable[..., Path], memory_limit: int) -> None:
    folder = image_folder()
    (folder / "cat" / "RGB004.png").write_bytes(b"no image")
    (folder / "dog" / "RGB002.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out 2 corrupt images of"):
        data = load_data(str(folder), validation=0, corrupt="skip", memory_limit=memory_limit)
    assert len(data.train) + len(data.test) == 18


def test_corrupt_file_is_refused_by_name(image_folder: Callable[..., Path]) -> None:
    folder = image_folder()
    broken = folder / "cat" / "RGB004.png"
    broken.write_bytes(broken.read_bytes()[:60])
    message = r"cat/RGB004\.png must be a readable image, got .*; remove it, or set corrupt to skip"
    with pytest.raises(ValueError, match=message):
        load_data(str(folder))


def test_nothing_readable(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(count=3)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r" must be a data set of readable images, got none, .*RGB000\.png being the"
    ):
        load_data(str(folder), validation=0, corrupt="skip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "^image_size must be a positive integer, got 0$"),
        ({"validation": 1.0}, r"^validation must be a share in \[0, 1\), got 1\.0$"),
        ({"validation": -0.1}, r"^validation must be a share in \[0, 1\), got -0\.1$"),
        (
            {"validation": 0.001},
            r"^validation must be at least 0\.004 to hold out any of 146 training images of a class, got "
            r"0\.001; or add images: 0\.001 takes 625 images of a class$",
        ),
        ({"corrupt": "ignore"}, "^corrupt must be one of refuse, skip, got 'ignore'"),
        ({"limit_per_class": 0}, "^limit_per_class must be a positive integer, got 0$"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data("digits", **options)


def test_images_of_several_sizes_need_a_size(image_folder: Callable[..., Path]) -> None:
    image_folder("", ("cat",), size=(6, 8))
    folder = image_folder("", ("dog",), size=(9, 9))
    with pytest.raises(
        ValueError, match=r"^image_size must be given .*, got None; those of .* are 6×8 and 9×9"
    ):
        load_data(str(folder))
    assert load_data(str(folder), image_size=7).shape == (3, 7, 7)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is absent")
def test_real_cifar100() -> None:
    data = load_data(str(SHARED / "cifar100"), limit_per_class=3, seed=1)
    assert data.classes[:2] + data.classes[-1:] == ["apple", "aquarium_fish", "worm"]
    assert data.shape == (3, 32, 32)
    assert set(Counter(data.validation.labels.tolist()).values()) == {50}
    assert set(Counter(data.test.labels.tolist()).values()) == {100}
    assert len(data.train) == 300
    # The published figures of the training split, from 300 images of it.
    assert data.mean == pytest.approx((0.5071, 0.4865, 0.4409), abs=0.03)
    assert data.std == pytest.approx((0.2673, 0.2564, 0.2762), abs=0.02)


def _damage(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (
            "train",
            r"/images must be a data set with readable training images, got 20 unreadable, .*cat/RGB000\.png",
        ),
        ("val", r"/images must be a data set with readable validation images, got 4 unreadable"),
        (
            "test",
            r"/images must be a data set with readable test images, got 6 unreadable, .*test/cat/RGB000",
        ),
        (
            "train/dog",
            r"/images must be a data set with a readable training image of every class that has images, got "
            r"none of dog; add",
        ),
    ],
)
def test_splits_and_classes_that_become_empty_are_refused(
    image_folder: Callable[..., Path], damaged: str, message: str, memory_limit: int
) -> None:
    image_folder("train")
    image_folder("val", count=2)
    folder = image_folder("test", count=3)
    _damage(folder / damaged)
    with pytest.raises(ValueError, match=message):
        load_data(str(folder), image_size=8, corrupt="skip", memory_limit=memory_limit)


def test_too_few_images_for_a_test_split(image_folder: Callable[..., Path]) -> None:
    message = (
        r" must be a data set with a test split, or with at least 3 images of a class, got at most 2 per"
    )
    with pytest.raises(ValueError, match=message):
        load_data(str(image_folder(count=2)), validation=0)
    assert len(load_data(str(image_folder(count=3)), validation=0).test) == 2


def test_too_few_images_for_a_validation_split(image_folder: Callable[..., Path]) -> None:
    folder = image_folder("train", count=1)
    message = (
        "/images must be a data set with a validation split, or with at least 5 images of a class, got "
        r"only 1 training image of a class; so many because of validation=0\.1$"
    )
    with pytest.raises(ValueError, match=message):
        load_data(str(image_folder("test", count=1)))
    assert load_data(str(folder.parent), validation=0).validation is None


@settings(max_examples=40)
@given(st.integers(1, 60), st.floats(0.01, 0.99), st.booleans())
def test_messages_name_the_least_number_of_images_that_is_enough(
    most: int, validation: float, has_test: bool
) -> None:
    def load(images: int) -> Mapping[str, Any]:
        records = ArrayRecords(np.zeros((images, 1, 1), np.uint8), np.zeros(images, np.int64))
        splits = {"train": records} | ({"test": records} if has_test else {})
        source = Source(["cat"], splits, origins={split: split for split in splits})
        return find_splits("pets", validation=validation, source=source)

    try:
        splits = load(most)
    except ValueError as error:
        (least,) = map(int, re.findall(r"(\d+) images of a class", str(error)))
        assert least > most
        with pytest.raises(ValueError, match=rf" {least} images of a class"):
            load(least - 1)
        splits = load(least)
    assert len(splits["validation"].rows) > 0 < len(splits["test"].rows)


def test_a_single_class_is_refused(image_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r" must be a data set of at least 2 classes, got 1 \(cat\)$"):
        load_data(str(image_folder(classes=("cat",))))


def test_the_summary_says_what_was_found(image_folder: Callable[..., Path]) -> None:
    image_folder("train", ("cat", "dog"))
    image_folder("train", ("dog", "emu"), count=3, mode="L")
    folder = image_folder("test", ("cat", "dog"), count=2)
    (folder / "train" / "dog" / "RGB004.png").write_bytes(b"")
    (folder / "notes.txt").touch()
    with pytest.warns(UserWarning, match="left out 1 corrupt"):
        summary = load_data(str(folder), corrupt="skip", validation=0.25, limit_per_class=7).summary
    assert summary.classes == ["cat", "dog", "emu"]
    assert summary.train.origin == str(folder / "train")
    assert summary.train.images == sum(summary.train.images_per_class)
    assert summary.test.images_per_class == [2, 2, 0]
    assert summary.validation is not None
    counted = summary.train.images + summary.validation.images + sum(summary.left_out.values())
    assert counted == 26 + 1  # the training images, and the notes
    assert summary.left_out["unreadable"] == 1
    assert summary.left_out["of another type"] == 1
    line = summary.line()
    assert re.match(r"found \d+ images of 3 classes \(cat, dog, emu\) in .*/images: \d+ training, ", line)
    assert "; uneven classes: 2 training images of emu to 7 of cat; no test images of emu; " in line
    assert "; left out: 1 of another type" in line


def test_named_data_sets_have_a_summary() -> None:
    assert load_data("digits", limit_per_class=5, validation=0).summary.line() == (
        "found 409 images of 10 classes (0, 1, 2, 3, …, 9) in digits: 50 training, 359 test "
        "(cut from training); 5 training images per class; left out: 1,388 above the limit per class"
    )


def test_what_splits_share_or_lack_is_said(image_folder: Callable[..., Path]) -> None:
    image_folder("train", ("cat", "dog", "Dog"), count=5)
    image_folder("val", ("cat",), count=6)
    image_folder("test", ("cat", "dog"), size=(8, 8))
    folder = image_folder("extra", ("cat", "dog"))
    copied = folder / "train" / "cat" / "RGB000.png"
    for name in ("1.png", "2.png"):
        (folder / "test" / "dog" / name).write_bytes(copied.read_bytes())
    summary = load_data(str(folder), image_size=8).summary
    assert summary.validation is not None
    assert (summary.train.in_training, summary.validation.in_training, summary.test.in_training) == (0, 6, 2)
    assert summary.line().partition("per class; ")[2] == (
        "no validation images of Dog, dog; no test images of Dog; classes that are almost equal by name: "
        "Dog, dog; left out: 20 without a class or split, extra (not the name of a split; rename it to val "
        "or test to use it)"
    )
    assert summary.text().splitlines() == [
        summary.line(),
        *(f"warning: {warning}" for warning in summary.warnings),
    ]
    assert len(summary.warnings) == 4  # for each two splits, and for a cat's image among the dogs


def test_who_changes_the_digits_changes_no_later_ones() -> None:
    first = load_data("digits")
    pixels = first.train.images.clone()
    first.train.images.zero_()
    first.train.labels.zero_()
    again = load_data("digits")
    assert torch.equal(again.train.images, pixels)
    assert again.classes == [str(digit) for digit in range(10)]
    assert set(again.train.labels.tolist()) == set(range(10))
