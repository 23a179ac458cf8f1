import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from netfission.data import Augmentation
from netfission.data.augment import PhotographTransform, class_weights, crop_and_flip, erase, make_mix, soften


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*(st.integers(1, 6) for _ in range(4))),
    padding=st.integers(0, 4),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_image_is_a_window_of_its_padded_self(
    shape: tuple[int, ...], padding: int, flip: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)
    result = crop_and_flip(images, padding, flip, generator)
    assert result.dtype == torch.uint8
    height, width = shape[2:]
    for image, out in zip(images, result, strict=True):
        padded = F.pad(image, (padding,) * 4)
        windows = [
            padded[:, y : y + height, x : x + width]
            for y in range(2 * padding + 1)
            for x in range(2 * padding + 1)
        ]
        if flip:
            windows += [window.flip(2) for window in windows]
        assert any(torch.equal(out, window) for window in windows)


def test_offsets_and_flips_are_uniform_and_independent() -> None:
    images = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(20_000, -1, -1, -1)
    result = crop_and_flip(images, 1, True, torch.Generator().manual_seed(0))
    outcomes, counts = result.flatten(1).unique(dim=0, return_counts=True)
    assert len(outcomes) == 3 * 3 * 2
    expected = 20_000 / 18
    # χ² with 17 degrees of freedom exceeds 40.8 once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 40.8


def test_nothing_asked_for_changes_nothing() -> None:
    images = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8)
    assert torch.equal(crop_and_flip(images, 0, False, torch.Generator()), images)


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_mix_makes_labels_soft_in_proportion(kind: str) -> None:
    mix = make_mix(Augmentation(mix=kind), classes=5)
    assert mix is not None
    labels = torch.arange(4)
    # Image i is constant i + 1, so that its pixels tell which share of whom it holds.
    images = (labels + 1.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    before = torch.random.get_rng_state()
    mixed, soft = mix(images, labels, torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert soft.shape == (4, 5)
    torch.testing.assert_close(soft.sum(1), torch.ones(4))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(1.0, 6.0))
    assert ((soft > 0).sum(1) == 2).all()
    again = mix(images, labels, torch.Generator().manual_seed(1))
    other = mix(images, labels, torch.Generator().manual_seed(2))
    assert torch.equal(again[1], soft)
    assert not torch.equal(other[1], soft)


def test_no_mix() -> None:
    assert make_mix(Augmentation(crop_padding=4, flip=True), classes=5) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_padding": -1}, "^crop_padding must be an integer of at least 0, got -1$"),
        ({"mix": "cutup"}, "mix must be one of none, cutmix, mixup, got 'cutup'"),
        ({"mix_alpha": 0.05}, "^mix_alpha must be a number from 0.1 to 1000, got 0.05$"),
        ({"mix_alpha": float("nan")}, "^mix_alpha must be a number from 0.1 to 1000, got nan$"),
    ],
)
def test_bad_settings(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


def test_soft_labels_are_those_of_pytorch_s_cross_entropy():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 2, 2])
    soft = soften(labels, 4, smoothing=0.2)
    torch.testing.assert_close(
        F.cross_entropy(logits, soft), F.cross_entropy(logits, labels, label_smoothing=0.2)
    )
    weights = class_weights(labels, 4)
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 2.0, 1.0, 0.0]))
    assert weights[labels].mean() == 1
    weighted = F.cross_entropy(logits, labels, weight=weights)  # divided by the sum of weights, here 6
    torch.testing.assert_close(F.cross_entropy(logits, soften(labels, 4, weights=weights)), weighted)
    # The label stays the largest, even if another class has a much larger weight.
    uneven = soften(torch.tensor([0, 1]), 2, smoothing=0.4, weights=torch.tensor([0.1, 9.0]))
    assert uneven.argmax(1).tolist() == [0, 1]


def ramp(size: int) -> torch.Tensor:
    """An image whose pixels say where they are."""
    return torch.stack([torch.arange(size).repeat(size, 1), torch.arange(size)[:, None].repeat(1, size)])[
        [0, 1, 0]
    ].to(torch.uint8)


def test_a_crop_keeps_the_share_of_the_image_that_is_asked_for() -> None:
    transform = PhotographTransform(Augmentation(crop_scale=0.25), (100, 100))
    shares = []
    for seed in range(50):
        crop = transform(ramp(100), seed)
        assert crop.shape == (3, 100, 100)
        width, height = (int(axis.max()) - int(axis.min()) + 1 for axis in crop[:2])
        shares.append(width * height / 100**2)
    assert 0.2 < min(shares) < 0.4 < 0.8 < max(shares)


@pytest.mark.parametrize(
    "settings",
    [{"crop_scale": 0.2}, {"rand_augment": 20}, {"color_jitter": 0.5}],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_transform_changes_images_by_its_seed(settings: dict[str, float], channels: int) -> None:
    transform = PhotographTransform(Augmentation(**settings), (32, 32))
    image = ramp(32)[:channels]
    results = [transform(image, seed) for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(results[0], results[1])
    assert len(torch.stack(results).unique(dim=0)) >= 3
    assert results[0].dtype == torch.uint8
    assert results[0].shape == (channels, 32, 32)


def test_rectangles_are_erased_with_their_probability() -> None:
    generator = torch.Generator().manual_seed(0)
    erased = (erase(torch.ones(400, 3, 16, 16), 0.25, generator) == 0).flatten(1).float().mean(1)
    assert 70 < (erased > 0).sum() < 130
    assert erased.max() < 0.4
