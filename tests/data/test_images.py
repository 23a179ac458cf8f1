import io

import numpy as np
import pytest
import torch
from PIL import Image, features

from netfission.data.images import to_pixels

COLOURS = np.array([[[200, 30, 90], [10, 220, 40]], [[70, 60, 250], [128, 128, 128]]], dtype=np.uint8)


def rgb(image: Image.Image) -> np.ndarray:
    return to_pixels(image, "RGB", (2, 2)).permute(1, 2, 0).numpy()


def test_colours_are_kept():
    assert np.array_equal(rgb(Image.fromarray(COLOURS)), COLOURS)


@pytest.mark.parametrize(
    "mode", ["L", "LA", "P", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "1", "I", "F"]
)
def test_every_mode_has_three_channels(mode):
    grey = Image.new("L", (5, 3), 255)
    image = grey.convert(mode) if mode not in ("CMYK", "YCbCr", "HSV", "LAB", "I") else None
    if image is None:
        image = Image.new("I", (5, 3), 65535) if mode == "I" else grey.convert("RGB")
        image = image if mode in ("I", "LAB") else image.convert(mode)
    pixels = to_pixels(image, "RGB", (3, 5))
    assert pixels.shape == (3, 3, 5)
    assert (pixels == 255).all()


def test_sixteen_bits_become_eight():
    grey = np.array([[0, 256], [32768, 65535]], dtype=np.uint16)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    with Image.open(file) as image:
        pixels = to_pixels(image, "L", (2, 2))
    assert pixels.tolist() == [[[0, 1], [128, 255]]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([-3, 0, 128, 255], [0, 0, 128, 255]), ([0, 256, 65535, 70000], [0, 1, 255, 255])],
)
def test_thirty_two_bits_are_read_by_what_they_hold(values, expected):
    pixels = to_pixels(Image.fromarray(np.array([values], dtype=np.int32)), "L", (1, 4))
    assert pixels.flatten().tolist() == expected


@pytest.mark.parametrize(
    ("values", "pixels"),
    [
        ([0.0, 0.25, 0.5, 1.0], [0, 64, 128, 255]),  # as most programs write them
        ([0.0, 0.25, 128.0, 255.0], [0, 0, 128, 255]),
        ([-7.0, 0.5, 255.0, 300.0], [0, 0, 255, 255]),
        ([-0.5, 0.0, 0.5, 1.0], [0, 0, 0, 1]),
    ],
)
def test_floating_point_runs_to_1_or_to_255(values, pixels):
    file = io.BytesIO()
    Image.fromarray(np.array(values, dtype=np.float32).reshape(2, 2)).save(file, "TIFF")
    with Image.open(file) as image:
        assert image.mode == "F"
        assert to_pixels(image, "L", (2, 2)).flatten().tolist() == pixels


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match=r"^pixels must be finite, got NaN or infinity$"):
        to_pixels(Image.fromarray(np.array([[0.5, value]], dtype=np.float32)), "L", (1, 2))


def test_what_is_transparent_lies_on_white():
    seen = rgb(Image.fromarray(np.dstack([COLOURS, np.array([[255, 0], [0, 255]], dtype=np.uint8)])))
    assert np.array_equal(seen[0, 0], COLOURS[0, 0])
    assert (seen[0, 1] == 255).all()


def test_a_palettes_transparent_colour_lies_on_white():
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=1)
    with Image.open(file) as image:
        assert (rgb(image) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation):
    turned = Image.fromarray(COLOURS)
    undo = {  # by the definition of the EXIF tag: what was done to the scene before it was stored
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = turned if undo is None else turned.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    with Image.open(file) as image:
        assert np.array_equal(rgb(image), COLOURS)


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow reads no WebP")
def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    with Image.open(file) as image:
        pixels = to_pixels(image, "RGB", (4, 4))
    assert torch.equal(pixels[:, 0, 0], torch.tensor([255, 0, 0], dtype=torch.uint8))
