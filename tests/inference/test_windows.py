"""Sliding windows: they cover every pixel, average by Gaussian weights, and hold one row of windows."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netfission.inference.windows import Windows, stitched

sides = st.integers(1, 40)


def whole(run, pixels, windows, **settings):
    return torch.cat(list(stitched(run, pixels, windows, **settings)), dim=-2)[0]


@given(size=st.tuples(sides, sides), window=st.tuples(sides, sides), overlap=st.floats(0, 0.95))
@settings(max_examples=60)
def test_windows_cover_an_image_from_edge_to_edge_and_overlap_enough(size, window, overlap):
    windows = Windows(window, overlap)
    for starts, length, side in zip(windows.starts(size), size, window, strict=True):
        assert starts[0] == 0 and starts[-1] == max(0, length - side)
        steps = [after - before for before, after in pairwise(starts)]
        assert all(1 <= step <= max(1, side * (1 - overlap)) for step in steps)


@given(
    size=st.tuples(sides, sides),
    window=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    overlap=st.sampled_from([0, 0.25, 0.6]),
    batch_size=st.integers(1, 4),
)
@settings(max_examples=40)
def test_what_sees_single_pixels_gives_the_same_window_by_window(size, window, overlap, batch_size):
    pixels = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    seen = []

    def run(batch):
        seen.append(len(batch))
        return batch[:, None]  # one exit

    found = whole(run, pixels, Windows(window, overlap), batch_size=batch_size)
    torch.testing.assert_close(found[0], pixels)
    assert max(seen) <= batch_size and sum(seen) == Windows(window, overlap).count(size)


def test_weights_are_gaussians_of_the_distance_from_the_middle():
    """Beside a plain sum over whole images, with the weights of each window and their sum."""
    pixels, windows = torch.rand(1, 13, 17), Windows((5, 6), 0.5)
    values = iter(torch.rand(200).tolist())
    run = {}

    def constant(batch):
        found = torch.tensor([next(values) for _ in batch]).view(-1, 1, 1, 1).expand(-1, 1, 5, 6)
        run.setdefault("values", []).extend(found[:, 0, 0, 0].tolist())
        return found

    found = whole(constant, pixels, windows, batch_size=3)[0]
    y, x = torch.arange(5.0) - 2, torch.arange(6.0) - 2.5
    gaussian = torch.exp(-0.5 * ((y / (5 / 8))[:, None] ** 2 + (x / (6 / 8)) ** 2))
    total, weights = torch.zeros(2, 13, 17)
    rows, columns = windows.starts((13, 17))
    corners = [(top, left) for top in rows for left in columns]
    for (top, left), value in zip(corners, run["values"], strict=True):
        total[top : top + 5, left : left + 6] += value * gaussian
        weights[top : top + 5, left : left + 6] += gaussian
    torch.testing.assert_close(found, total / weights)


@pytest.mark.parametrize("window", [(7, 9), (12, 9), (30, 30)])
def test_one_window_changes_no_bit(window):
    pixels = torch.randn(3, 7, 9)
    network = torch.nn.Conv2d(3, 4, 3, padding=1).eval()
    black = torch.zeros(1, 3, *window)
    black[0, :, :7, :9] = pixels
    with torch.no_grad():
        assert torch.equal(whole(network, pixels, Windows(window)), network(black)[0, :, :7, :9])


def test_rows_are_passed_on_before_later_windows_are_read():
    seen = []
    progress = []
    strips = stitched(
        lambda batch: seen.append(len(batch)) or batch,
        torch.rand(1, 100, 8),
        Windows((10, 8), 0.5),
        progress=lambda done, total: progress.append((done, total)),
    )
    first = next(strips)
    assert first.shape == (1, 1, 5, 8) and len(seen) == 1
    assert sum(strip.shape[2] for strip in strips) == 95 and len(seen) == 19
    assert progress == [(number, 19) for number in range(1, 20)]


@pytest.mark.parametrize(
    ("size", "overlap", "message"),
    [
        ((0, 8), 0.25, "window must be a positive integer, got 0"),
        ((8, 8.0), 0.25, "window must be a positive integer, got 8.0"),
        (8, 0.25, "window must be a height and a width, got 8"),
        ((8, 8), 1, r"overlap must be a share in \[0, 1\), got 1"),
        ((8, 8), -0.1, r"overlap must be a share in \[0, 1\), got -0.1"),
        ((8, 8), float("nan"), r"overlap must be a share in \[0, 1\), got nan"),
    ],
)
def test_windows_that_cannot_be_are_refused(size, overlap, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Windows(size, overlap)


def test_maps_of_another_size_and_empty_images_are_refused():
    with pytest.raises(ValueError, match="a size of which the network gives maps, 4×4 as it is given"):
        next(stitched(lambda batch: batch[..., :2, :2], torch.rand(1, 9, 9), Windows((4, 4))))
    with pytest.raises(ValueError, match="none of them 0"):
        next(stitched(lambda batch: batch, torch.rand(1, 0, 9), Windows((4, 4))))
