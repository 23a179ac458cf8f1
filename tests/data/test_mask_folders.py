import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from netfission.data.batches import decode_batches
from netfission.data.images import size_within, to_pixels_within
from netfission.data.mask_folders import VOID, load_masks, mask_within
from netfission.data.mask_transforms import MaskTransform
from netfission.data.splits import CorruptImageError

SIZE = (6, 8)  # height and width


def write(folder: Path, split: str, name: str, mask: np.ndarray | None, size: tuple[int, int] = SIZE) -> None:
    for kind in ("images", "masks"):
        (folder / split / kind).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(folder / split / "images" / f"{name}.png")
    if mask is not None:
        Image.fromarray(mask).save(folder / split / "masks" / f"{name}.png")


def mask(*rows: int) -> np.ndarray:
    """A mask whose first rows have these numbers; the others are 0."""
    numbers = np.zeros(SIZE, np.uint8)
    numbers[: len(rows)] = np.array(rows, np.uint8)[:, None]
    return numbers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "train", "a", mask(1, 2))
    write(tmp_path, "train", "b", mask(2, 255, 255))
    write(tmp_path, "val", "c", mask(1))
    write(tmp_path, "test", "d", mask(2))
    return tmp_path


def test_splits_classes_and_pixels(folder: Path) -> None:
    data = load_masks(folder)
    assert data.classes == ["0", "1", "2"]
    assert (len(data.train), len(data.validation or ()), len(data.test)) == (2, 1, 1)
    assert data.shape == (3, *SIZE)
    assert data.pixels == {"train": [56, 8, 16, 16], "validation": [40, 8, 0, 0], "test": [40, 0, 8, 0]}
    pixels, classes = data.train[1]
    assert (pixels.dtype, classes.dtype) == (torch.uint8, torch.int64)
    assert classes[:, 0].tolist() == [2, 255, 255, 0, 0, 0]
    both = torch.stack([pixels for pixels, _ in (data.train[0], data.train[1])]) / 255
    assert data.mean == pytest.approx(both.mean((0, 2, 3)).tolist())
    assert data.std == pytest.approx(both.std((0, 2, 3), correction=0).tolist())


def test_splits_may_be_within_the_folders_of_images_and_masks(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for split in ("train", "val", "test"):
        for kind in ("images", "masks"):
            (other / kind).mkdir(parents=True, exist_ok=True)
            (folder / split / kind).rename(other / kind / split)
    (other / "classes.txt").write_text("road\nsky\ncar\n")
    data = load_masks(other, memory_limit=0)  # decoded at each access
    assert data.classes == ["road", "sky", "car"]
    assert data.pixels["test"] == [40, 0, 8, 0]
    assert data.train[0][1].equal(data.train[0][1])


def test_a_photograph_is_turned_upright_and_keeps_its_mask(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", SIZE).save(folder / "test" / "images" / "d.png", exif=exif)
    pixels, classes = load_masks(folder).test[0]
    assert pixels.shape[1:] == classes.shape == SIZE


def test_masks_of_other_types_hold_numbers_too(folder: Path) -> None:
    palette = Image.fromarray(mask(1))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(folder / "test" / "masks" / "d.png")
    Image.fromarray(mask(1).astype(np.uint16)).save(folder / "val" / "masks" / "c.png")
    data = load_masks(folder)
    assert data.pixels["test"] == data.pixels["validation"] == [40, 8, 0, 0]


def test_a_class_that_never_occurs_is_warned_of(folder: Path) -> None:
    with pytest.warns(UserWarning, match="no training pixel is of sky$"):
        data = load_masks(folder, classes=["road", "tree", "car", "sky"])
    assert data.pixels["train"] == [56, 8, 16, 0, 16]


def test_a_class_that_is_numbered_as_void_is_told_of(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, "a", mask(255, 255))
    told = "255 is void, the number of 16 training pixels: number the classes from 0$"
    with pytest.raises(ValueError, match=f"classes must be two or more, got 1 in .*; {told}"):
        load_masks(tmp_path)
    with pytest.warns(UserWarning, match=f"no training pixel is of object; {told}"):
        load_masks(tmp_path, classes=["back", "object"])


def test_void_pixels_take_memory_too(folder: Path) -> None:
    needed = 4 * 4 * SIZE[0] * SIZE[1]  # bytes of four photographs and masks
    for limit, held in ((needed - 1, False), (needed, True)):
        data = load_masks(folder, memory_limit=limit)
        assert all(
            (split[0][0] is not None) and bool(split._decoded) == held for split in data.splits.values()
        )


@pytest.mark.parametrize("memory_limit", [0, 10**6])
def test_what_is_returned_may_be_changed(folder: Path, memory_limit: int) -> None:
    data = load_masks(folder, memory_limit=memory_limit)
    before = [part.clone() for part in data.train[0]]
    for part in data.train[0]:
        part.zero_()
    assert all(map(torch.equal, data.train[0], before))


@pytest.mark.parametrize("fit", [None, (4, 4)])
def test_a_mask_that_has_changed_since_is_refused(folder: Path, fit: tuple[int, int] | None) -> None:
    split = load_masks(folder, memory_limit=0).train
    write(folder, "train", "a", mask(1), (60, 80))
    with pytest.raises(ValueError, match=r"a.png must be of the size of its photograph \(60×80\), got 6×8$"):
        _ = list(decode_batches(split if fit is None else split.fitted(fit), 1, workers=int(fit is None)))


def test_a_file_that_vanishes_amid_training_is_named_with_what_to_do(folder: Path) -> None:
    split = load_masks(folder, memory_limit=0).train
    for kind in ("masks", "images"):
        (folder / "train" / kind / "a.png").unlink()
        message = (
            rf"{kind}.*a\.png must be a readable image, got no such file any more; restore it; a training"
        )
        with pytest.raises(CorruptImageError, match=message):
            _ = split[0]
        write(folder, "train", "a", mask(1, 2))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_names_of_classes_may_be_written_by_any_editor(folder: Path, encoding: str) -> None:
    (folder / "classes.txt").write_bytes("Straße \r\nsky\r\ncar\r\n\r\n".encode(encoding))
    assert load_masks(folder).classes == ["Straße", "sky", "car"]


def test_a_mask_of_void_alone_is_warned_of(folder: Path) -> None:
    write(folder, "train", "b", mask(*[255] * 6))
    with pytest.warns(UserWarning, match="1 train mask without a labelled pixel"):
        assert len(load_masks(folder).train) == 2


def test_masks_without_a_photograph_are_left_out(folder: Path) -> None:
    (folder / "train" / "images" / "b.png").unlink()
    assert load_masks(folder).left_out == {"masks without a photograph": 1}


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (
            lambda folder: write(folder, "train", "a", mask(1), (12, 8)),
            {},
            r"a.png must be of the size of its photograph \(12×8\), got 6×8$",
        ),
        (
            lambda folder: write(folder, "test", "d", mask(7)),
            {},
            r"d.png must be of class numbers from 0 to 2, or 255 for void pixels, got 7 \(8 pixels\);",
        ),
        (
            lambda folder: write(folder, "val", "c", np.zeros((*SIZE, 3), np.uint8)),
            {},
            r"c.png must be a mask of one channel, whose pixels are class numbers, got .* mode RGB;",
        ),
        (
            lambda folder: write(folder, "train", "z", None),
            {},
            r"masks must be a folder with a mask of each photograph, got none of .*z.png$",
        ),
        (
            lambda folder: write(folder, "test", "d", mask(*[255] * 6)),
            {},
            r"the test masks of .* must be labelled, got void pixels alone$",
        ),
        (
            lambda folder: (folder / "train" / "masks" / "a.png").write_bytes(b"no image"),
            {},
            r"a.png must be a readable image, got data that cannot be read",
        ),
        (
            lambda folder: Image.fromarray(mask(1)).save(folder / "train" / "masks" / "a.tif"),
            {},
            r"masks must be a folder of files with different names up to the ending, got a\.png and a\.tif$",
        ),
        (
            lambda folder: Image.new("RGB", SIZE[::-1]).save(folder / "train" / "images" / "a.bmp"),
            {},
            r"images must be a folder of files with different names up to the ending, got a\.bmp and a\.png$",
        ),
        *(
            (
                lambda folder, kind=kind: Image.fromarray(mask(1)).save(
                    folder / "val" / "masks" / "c.png", **kind
                ),
                {},
                r"c\.png must be a mask in a format without loss, such as PNG, got "
                f"{kind.get('compression', kind['format']).upper()};",
            )
            for kind in (
                {"format": "JPEG", "quality": 100},
                {"format": "JPEG2000"},
                {"format": "TIFF", "compression": "jpeg"},
            )
        ),
        *(
            (
                lambda folder, number=number: Image.fromarray(
                    np.where(mask(1) == 1, number, 0).astype(np.int32)
                ).save(folder / "val" / "masks" / "c.png", format="TIFF"),
                {},
                rf"c\.png must be a mask of numbers from 0 to 255, got {number}$",
            )
            for number in (-1, 256)
        ),
        (lambda folder: None, {"classes": ["road"]}, "classes must be two or more, got 1 in [^;]*$"),
        (lambda folder: None, {"classes": []}, "classes must be two or more, got 0 in [^;]*$"),
        (
            lambda folder: None,
            {"classes": [str(n) for n in range(300)]},
            "classes must be at most 255, got 299",
        ),
        (lambda folder: None, {"classes": "road"}, "classes must be a list of names, got 'road'"),
        (
            lambda folder: None,
            {"classes": ["road", 1]},
            r"classes must be a list of names, got \['road', 1\]",
        ),
        (
            lambda folder: None,
            {"classes": ["road", "sky", "road"]},
            "classes must be names that all differ, got 'road' twice",
        ),
        (
            lambda folder: (folder / "classes.txt").write_text("road\nroad\n"),
            {},
            r"classes.txt must be names that all differ, got 'road' twice",
        ),
        (
            lambda folder: (folder / "classes.txt").write_text("road\n\nsky\ncar\n"),
            {},
            r"classes.txt must be names that all differ, got '' as class 1",
        ),
        (
            lambda folder: (folder / "classes.txt").write_bytes("Straße\nsky\n".encode("latin-1")),
            {},
            r"classes.txt must be a text in UTF-8, got other bytes",
        ),
    ],
)
def test_bad_folders_are_refused(folder: Path, spoil, settings, message: str) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=message) as raised, warnings.catch_warnings(action="ignore"):
        load_masks(folder, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("names", "void", "classes", "numbers"),
    [
        ("VOID\nroad\nsky\n", None, ["road", "sky"], [1, 2]),
        ("road\nvoid\nsky\n", None, ["road", "sky"], [0, 2]),
        ("road\nvoid\nsky\n", 2, ["road", "void"], [0, 1]),
        (None, 1, ["0", "2"], [0, 2]),
    ],
)
def test_void_may_be_any_number(folder: Path, names, void, classes, numbers) -> None:
    if names:
        (folder / "classes.txt").write_text(names)
    write(folder, "train", "b", mask(2))
    data = load_masks(folder, void=void)
    assert (data.classes, data.numbers, data.void) == (classes, numbers, VOID)
    rows = {number: numbers.index(number) if number in numbers else VOID for number in range(3)}
    assert data.train[0][1][:, 0].tolist() == [rows[1], rows[2], *[rows[0]] * 4]
    assert sum(data.pixels["train"]) == 2 * 48
    assert data.present["test"].tolist() == [[number in (0, 2) for number in numbers]]


@given(side=st.tuples(*[st.integers(1, 40)] * 4))
@settings(max_examples=50)
def test_photograph_and_mask_are_fitted_alike(side: tuple[int, int, int, int]) -> None:
    own, limit = side[:2], side[2:]
    inner = size_within(own, limit)
    assert all(small <= most for small, most in zip(inner, limit, strict=True)) and inner != (0, 0)
    assert inner[0] == limit[0] or inner[1] == limit[1]
    numbers = np.zeros(own, np.uint8)
    numbers[:, own[1] // 2 :] = 1
    pixels = to_pixels_within(Image.fromarray(numbers * 255), "L", limit)[0]
    classes = mask_within(torch.from_numpy(numbers), limit)
    assert pixels.shape == classes.shape == limit
    assert (classes[: inner[0], : inner[1]] != VOID).all()
    assert (classes == VOID).sum() == limit[0] * limit[1] - inner[0] * inner[1]
    assert (pixels[classes == VOID] == 0).all()
    clear = (pixels < 64) | (pixels > 191)  # away from the edge between the classes
    assert ((pixels > 127) == (classes == 1))[clear].all()


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a folder with SPLIT/images and SPLIT/masks, or images/SPL"):
        load_masks(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_masks(tmp_path / "none")
    write(tmp_path, "train", "a", mask(1))
    with pytest.raises(ValueError, match="with a test or validation split, got train"):
        load_masks(tmp_path)


def test_mask_and_photograph_change_alike() -> None:
    numbers = torch.arange(6 * 8).reshape(6, 8)
    pixels = numbers.expand(3, 6, 8).to(torch.uint8)
    transform = MaskTransform((6, 8), scale=(1, 1), void=255)
    seen = set()
    for seed in range(8):
        image, classes = transform(pixels, numbers, seed)
        assert image[0].equal(classes.to(torch.uint8))
        seen.add(bool(classes.equal(numbers)))
    assert seen == {False, True}  # mirrored or not


def test_beyond_the_photograph_is_void() -> None:
    pixels, numbers = torch.full((3, 4, 4), 200, dtype=torch.uint8), torch.ones(4, 4, dtype=torch.int64)
    image, classes = MaskTransform((8, 8), scale=(0.5, 1.5), color_jitter=0.5, void=9)(pixels, numbers, 0)
    assert set(classes.unique().tolist()) == {1, 9}
    assert (image[:, classes == 9] == 0).all()
    again = MaskTransform((8, 8), scale=(0.5, 1.5), color_jitter=0.5, void=9)(pixels, numbers, 0)
    assert image.equal(again[0])
    assert classes.equal(again[1])


def test_what_a_transform_returns_is_a_copy() -> None:
    pair = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.int64)
    for part in MaskTransform((4, 4), scale=(1, 1), flip=False)(*pair, seed=0):
        part += 1
    assert not any(part.any() for part in pair)


@given(size=st.tuples(st.integers(8, 16), st.integers(8, 16)), factor=st.sampled_from([0.25, 0.5, 1.5, 3.0]))
@settings(max_examples=30, deadline=None)
def test_a_scaled_mask_is_where_its_photograph_is(size: tuple[int, int], factor: float) -> None:
    inner = [max(1, round(factor * side)) for side in size]
    ramp = torch.arange(size[0] * size[1]).view(size)
    pixels = ramp.to(torch.uint8).expand(3, *size).contiguous()
    transform = MaskTransform((inner[0], inner[1]), scale=(factor, factor), flip=False)
    _, scaled = transform(pixels, ramp, seed=0)
    places = [((torch.arange(n) + 0.5) * side / n).long() for n, side in zip(inner, size, strict=True)]
    assert scaled.equal(ramp[places[0]][:, places[1]])  # the pixel in whose square each centre lies


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": (2, 1)}, r"scale must be two positive factors, the smaller first, got \(2, 1\)"),
        (
            {"scale": (1, float("inf"))},
            r"scale must be two positive factors, the smaller first, got \(1, inf\)",
        ),
        ({"scale": (1,)}, r"scale must be two positive factors, the smaller first, got \(1,\)"),
        ({"color_jitter": 2}, r"color_jitter must be in \[0, 1\], got 2"),
        ({"size": (0, 8)}, r"size must be a positive height and width, got \(0, 8\)"),
        ({"size": (8,)}, r"size must be a positive height and width, got \(8,\)"),
        ({"size": (8, 8.5)}, r"size must be a positive height and width, got \(8, 8\.5\)"),
    ],
)
def test_bad_transforms_are_refused(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskTransform(**{"size": (8, 8)} | settings)


def test_a_pair_of_different_sizes_is_not_transformed() -> None:
    with pytest.raises(ValueError, match=r"mask must be of the photograph's size \(6×8\), got 8×6"):
        MaskTransform((4, 4))(torch.zeros(3, 6, 8, dtype=torch.uint8), torch.zeros(8, 6).long(), seed=0)
