import signal
import sys
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from netfission.data import Augmentation, Batches, StreamedSplit, TensorSplit
from netfission.data.splits import ArrayRecords, CorruptImageError, FileRecords

PAPER = Augmentation(crop_padding=4, flip=True)
PHOTOGRAPH = Augmentation(crop_scale=0.3, flip=True, rand_augment=9, color_jitter=0.4, erase=0.5)


def _splits(count: int = 23) -> tuple[TensorSplit, StreamedSplit]:
    """Return the same data held and streamed; the label of a row is its number."""
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    labels = np.arange(count)
    streamed = StreamedSplit(ArrayRecords(images, labels), np.arange(count), (8, 8))
    return TensorSplit(torch.from_numpy(images)[:, None], torch.from_numpy(labels)), streamed


def _batches(split: Any, batch_size: int = 5, **options: Any) -> Batches:
    return Batches(split, batch_size, **{"mean": (0.4,), "std": (0.2,), "classes": len(split)} | options)


def _rows(batches: Batches) -> list[int]:
    return [row for _, labels in batches for row in labels.tolist()]


def test_normalised_and_in_order() -> None:
    held, streamed = _splits()
    for split in (held, streamed):
        batches = list(_batches(split))
        assert [len(labels) for _, labels in batches] == [5, 5, 5, 5, 3]
        images = torch.cat([images for images, _ in batches])
        labels = torch.cat([labels for _, labels in batches])
        torch.testing.assert_close(images, (held.images / 255 - 0.4) / 0.2)
        assert images.dtype == torch.float32
        assert torch.equal(labels, held.labels)
    assert held.images.dtype == torch.uint8


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    world_size=st.integers(1, 5),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
@example(count=1, batch_size=1, world_size=3, shuffle=False, drop_last=False)
@example(count=1, batch_size=1, world_size=3, shuffle=True, drop_last=True)
def test_ranks_share_the_rows(
    count: int, batch_size: int, world_size: int, shuffle: bool, drop_last: bool
) -> None:
    split, _ = _splits(count)
    options = {"shuffle": shuffle, "world_size": world_size}
    everything = []
    for rank in range(world_size):
        shared = _batches(split, batch_size, rank=rank, **options)
        assert len(list(shared)) == len(shared)
        rows = _rows(shared)
        everything.append(rows)
        full = len(rows) // batch_size
        if drop_last and not full:
            with pytest.raises(ValueError, match=r"^batch_size must be at most .* with drop_last"):
                _batches(split, batch_size, rank=rank, drop_last=True, **options)
        elif drop_last:
            dropping = _batches(split, batch_size, rank=rank, drop_last=True, **options)
            assert len(dropping) == full
            assert _rows(dropping) == rows[: full * batch_size]
    assigned = sorted(chain.from_iterable(everything))
    assert set(assigned) == set(range(count))
    if shuffle:
        assert len({len(rows) for rows in everything}) == 1
        assert len(assigned) - count < world_size
    else:
        assert assigned == list(range(count))


@pytest.mark.parametrize("kind", ["held", "streamed"])
@pytest.mark.parametrize(
    "augment",
    [*(Augmentation(crop_padding=2, flip=True, mix=mix) for mix in ("none", "cutmix", "mixup")), PHOTOGRAPH],
    ids=["none", "cutmix", "mixup", "photograph"],
)
def test_an_epoch_repeats_exactly_and_leaves_the_global_state(kind: str, augment: Augmentation) -> None:
    split = _splits()[kind == "streamed"]
    batches = _batches(split, shuffle=True, augment=augment, seed=3)
    before = torch.random.get_rng_state()

    def epoch(number: int, source: Batches = batches) -> tuple[torch.Tensor, torch.Tensor]:
        source.set_epoch(number)
        images, labels = zip(*source, strict=True)
        return torch.cat(images), torch.cat(labels)

    first, second = epoch(0), epoch(1)
    torch.manual_seed(99)  # of no effect
    resumed = epoch(1, _batches(split, shuffle=True, augment=augment, seed=3))
    other = epoch(1, _batches(split, shuffle=True, augment=augment, seed=4))
    torch.random.set_rng_state(before)
    assert torch.equal(epoch(0)[0], first[0])
    assert torch.equal(torch.random.get_rng_state(), before)
    for value, expected in zip(resumed, second, strict=True):
        assert torch.equal(value, expected)
    assert not torch.equal(first[1], second[1])
    assert not torch.equal(other[1], second[1])
    assert not torch.equal(other[0], second[0])


@pytest.mark.parametrize("kind", ["held", "streamed"])
def test_drop_last_leaves_full_batches_only(kind: str) -> None:
    batches = _batches(_splits()[kind == "streamed"], drop_last=True)
    assert [len(labels) for _, labels in batches] == [5] * 4
    assert len(batches) == 4


@pytest.mark.parametrize("augment", [PAPER, PHOTOGRAPH], ids=["paper", "photograph"])
def test_held_and_streamed_give_the_same_batches(augment: Augmentation) -> None:
    options = {"shuffle": True, "augment": augment, "seed": 1}
    for held, streamed in zip(*(_batches(split, **options) for split in _splits()), strict=True):
        assert torch.equal(held[0], streamed[0])
        assert torch.equal(held[1], streamed[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class Interruptible(StreamedSplit):
    """Labels 1 where Ctrl-C is answered."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, _ = super().__getitem__(index)
        return image, signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.skipif(sys.platform == "win32", reason="needs masks of signals as POSIX has them")
@pytest.mark.parametrize("workers", [0, 1])
def test_workers_leave_interruptions_to_the_main_process(workers: int) -> None:
    _, streamed = _splits()
    split = Interruptible(streamed.records, streamed.rows, streamed.size)
    assert set(_rows(_batches(split, workers=workers))) == {workers == 0}
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("kind", ["held", "streamed"])
@pytest.mark.parametrize("augment", [PAPER, PHOTOGRAPH], ids=["paper", "photograph"])
def test_workers_change_nothing(kind: str, augment: Augmentation) -> None:
    split = _splits()[kind == "streamed"]
    options = {"shuffle": True, "augment": augment}
    alone, helped = (list(_batches(split, workers=n, **options)) for n in (0, 2))
    for expected, value in zip(alone, helped, strict=True):
        assert torch.equal(value[0], expected[0])
        assert torch.equal(value[1], expected[1])


@pytest.mark.parametrize("augment", [PAPER, Augmentation(color_jitter=0.9)], ids=["paper", "colour"])
def test_ranks_augment_differently(augment: Augmentation) -> None:
    split = TensorSplit(torch.full((64, 1, 8, 8), 9, dtype=torch.uint8), torch.zeros(64).long())
    images = [
        next(iter(_batches(split, 32, shuffle=True, augment=augment, rank=rank, world_size=2)))[0]
        for rank in range(2)
    ]
    assert not torch.equal(*images)


def test_the_border_is_black_not_the_mean() -> None:
    split = TensorSplit(torch.full((64, 1, 8, 8), 255, dtype=torch.uint8), torch.zeros(64).long())
    images, _ = next(iter(_batches(split, 64, augment=Augmentation(crop_padding=4))))
    assert images.unique().tolist() == pytest.approx([(0 - 0.4) / 0.2, (1 - 0.4) / 0.2])


def test_mixed_labels_are_soft() -> None:
    held, _ = _splits()
    _, labels = next(iter(_batches(held, augment=Augmentation(mix="mixup"))))
    assert labels.shape == (5, 23)
    assert labels.is_floating_point()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "^batch_size must be a positive integer, got 0$"),
        ({"rank": 2, "world_size": 2}, "^rank must be at least 0 and below world_size=2, got 2$"),
        ({"std": (0.1, 0.2)}, r"^std must be of the same length as mean \(1\), got 2$"),
        ({"batch_size": 24, "drop_last": True}, "^batch_size must be at most 23 with drop_last, .*, got 24$"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _batches(_splits()[0], **options)


def test_a_sampler_draws_each_class_equally_often_anew_in_each_epoch() -> None:
    images = torch.zeros(1000, 1, 2, 2, dtype=torch.uint8)
    split = TensorSplit(images, torch.tensor([0] * 900 + [1] * 100))
    batches = _batches(split, 50, classes=2, shuffle=True, balance="sampler")
    first = torch.cat([labels for _, labels in batches])
    assert len(first) == 1000
    assert 420 < first.sum() < 580  # of 500, with a standard deviation of 16
    assert torch.equal(first, torch.cat([labels for _, labels in batches]))
    batches.set_epoch(1)
    assert not torch.equal(first, torch.cat([labels for _, labels in batches]))


def test_weights_and_smoothing_make_labels_soft_after_mixing() -> None:
    split = TensorSplit(torch.zeros(40, 1, 4, 4, dtype=torch.uint8), torch.tensor([0] * 30 + [1] * 10))
    batches = _batches(split, 40, classes=2, shuffle=True, balance="weights")
    ((_, labels),) = batches
    assert sorted(set(map(tuple, labels.tolist()))) == [(0.0, 2.0), (pytest.approx(2 / 3), 0.0)]
    augment = Augmentation(mix="mixup", label_smoothing=0.5)
    ((_, labels),) = _batches(split, 40, classes=2, shuffle=True, augment=augment)
    torch.testing.assert_close(labels.sum(1), torch.ones(40))
    assert 0.25 <= labels.min() < labels.max() <= 0.75


def test_random_crops_of_larger_images_keep_their_detail() -> None:
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(16).expand(8, 1, 32, 32)
    augment = Augmentation(crop_scale=0.0626)
    spread = []
    for images, size in (
        (stripes, (8, 8)),
        (F.interpolate(stripes.float(), (8, 8), mode="area").byte(), None),
    ):
        batches = _batches(
            TensorSplit(images, torch.arange(8)), 8, classes=8, augment=augment, crop_size=size
        )
        ((cropped, _),) = batches
        assert cropped.shape == (8, 1, 8, 8)
        spread.append(cropped.std().item())
    assert spread[0] > 0.1 > 1e-3 > spread[1]  # reduced before, the stripes are grey


def test_an_image_drawn_twice_is_transformed_anew() -> None:
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(16, 1, 1, 1)
    split = TensorSplit(images, torch.tensor([0] * 15 + [1]))
    augment = Augmentation(crop_scale=0.1)
    batches = _batches(split, 16, classes=2, shuffle=True, balance="sampler", augment=augment)
    ((images, labels),) = batches
    drawn = images[labels == 1]  # one image
    assert len(drawn) > 4
    assert len(drawn.unique(dim=0)) > 4


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_vanish_amid_an_epoch_end_it_in_one_line_and_are_read_once_back(tmp_path, workers):
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path in paths:
        Image.new("L", (8, 8)).save(path)
    split = StreamedSplit(FileRecords(paths, np.zeros(4, np.int64), "L"), np.arange(4), (8, 8))
    batches = Batches(split, 2, mean=(0.5,), std=(0.5,), classes=1, workers=workers)
    paths[3].rename(tmp_path / "away.png")
    message = r"^\S*3\.png must be a readable image, got no such file any more; restore it; a training"
    with pytest.raises(CorruptImageError, match=message) as raised:
        list(batches)
    assert "\n" not in str(raised.value)
    (tmp_path / "away.png").rename(paths[3])
    assert len(list(batches)) == 2
