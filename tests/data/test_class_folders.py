from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from netfission.data.class_folders import check_names
from netfission.data.folders import read_folder

COUNTED = " ".join(f"im_{number:03}" for number in range(10))
NAMED = "ann bob carl dora eve fred"
NOISE = np.random.default_rng(0).integers(0, 256, (400, 12, 12, 3), dtype=np.uint8)


def write(folder: Path, files: str, of: str = "") -> Path:
    """Write images of noise with the names, all different, or black and white below a folder `of`."""
    for number, name in enumerate(files.split()):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = NOISE[number]
        Image.fromarray((pixels[:, :, 0] > 99) if path.parent.name == of else pixels).save(path)
    return folder


def every(folders: str, names: str) -> str:
    return " ".join(f"{folder}/{name}" for folder in folders.split() for name in names.split())


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        ("fold1 fold2", "cat, dog in each of fold1, fold2"),
        ("2022 2023", "cat, dog in each of 2022, 2023"),
        ("original augmented", "cat, dog in each of augmented, original"),
        ("Site_a Site_b Site_c", "cat, dog in each of Site_a, Site_b, Site_c"),
    ],
)
def test_folders_that_hold_the_classes_again_are_refused(tmp_path: Path, folders: str, found: str) -> None:
    write(tmp_path, every(folders, every("cat dog", "1 2")))
    with pytest.raises(ValueError, match=f"must be a folder with one folder per class, .*, got {found}; if"):
        read_folder(tmp_path)


def test_more_classes_inside_than_outside_are_refused_but_for_one_that_all_have(tmp_path: Path) -> None:
    write(tmp_path / "a", every("paris rome", every("cat dog emu", "1")) + " rome/fox/1")
    with pytest.raises(ValueError, match="got cat, dog, emu in each of paris, rome; if"):
        read_folder(tmp_path / "a")
    write(tmp_path / "b", every("n01 n02", every("images", "1")))
    assert read_folder(tmp_path / "b").remarks == []


def test_folders_that_may_be_attributes_of_the_classes_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a", every("cat dog", every("day night", "1")))
    contents = read_folder(tmp_path / "a")
    assert contents.classes == ["cat", "dog"]
    assert contents.remarks == ["each of cat, dog holds day, night, which may be the classes"]
    write(tmp_path / "b", every("benign malignant", every("40X 100X 200X", "1")))
    assert read_folder(tmp_path / "b").classes == ["benign", "malignant"]
    write(tmp_path / "c", every("fold1 fold2", every("cat dog", "1")) + " fold1/2")
    assert read_folder(tmp_path / "c").remarks == []


def test_copies_of_the_classes_beside_them_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", every("cat dog", "1 2") + " " + every("originals", every("cat dog", "1 2")))
    with pytest.raises(ValueError, match=r"got originals, which holds cat, dog again; move it elsewhere$"):
        read_folder(tmp_path / "a")
    classes = every("cat", "a b c d") + " " + every("dog", "e f g h")
    write(tmp_path / "b", f"{classes} {every('everything', 'a b c d e f g h')}")
    assert read_folder(tmp_path / "b").remarks == [
        "everything holds images of the same names as all other folders: are they copies?"
    ]
    for file in (tmp_path / "b").glob("[cd]*/*"):
        (tmp_path / "b" / "everything" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="got copies: everything holds images of the same names as all"):
        read_folder(tmp_path / "b")


@pytest.mark.parametrize("names", [COUNTED, NAMED])
def test_images_and_masks_of_the_same_names_are_refused(tmp_path: Path, names: str) -> None:
    write(tmp_path, every("photographs shapes", names), of="shapes")
    with pytest.raises(ValueError, match="got photographs, shapes; they look like images and their masks"):
        read_folder(tmp_path)


def test_names_that_mark_masks_are_refused_or_named(tmp_path: Path) -> None:
    write(tmp_path / "a", f"{every('x', COUNTED)} {every('y', COUNTED).replace(' ', '_mask ')}_mask")
    with pytest.raises(ValueError, match="got x, y; they look like images and their masks"):
        read_folder(tmp_path / "a")
    write(tmp_path / "b", "benign/1 benign/1_mask benign/2 malignant/3 malignant/3_mask malignant/gt")
    assert read_folder(tmp_path / "b").remarks == ["2 images may be masks of others, such as 1_mask.png"]


@pytest.mark.parametrize(
    ("folders", "names", "remarks"),
    [
        ("cat dog", COUNTED, []),
        ("cat dog emu", "1 2 3 4", []),
        ("low high", COUNTED, ["all classes hold images of the same names, such as im_000: are they pairs?"]),
        ("real fake", NAMED, ["all classes hold images of the same names, such as ann: are they pairs?"]),
    ],
)
def test_classes_with_images_of_the_same_names(
    tmp_path: Path, folders: str, names: str, remarks: list[str]
) -> None:
    contents = read_folder(write(tmp_path, every(folders, names)))
    assert contents.classes == sorted(folders.split())
    assert contents.remarks == remarks


def test_drawings_of_few_colours_in_all_classes_are_classes(tmp_path: Path) -> None:
    write(tmp_path / "a", every("0", COUNTED), of="0")
    write(tmp_path / "a", every("1", COUNTED), of="1")
    assert read_folder(tmp_path / "a").classes == ["0", "1"]


@pytest.mark.parametrize("names", ["original ground_truth", "rgb gt", "input target", "Images Targets"])
def test_pairs_are_refused_by_their_names(names: str) -> None:
    with pytest.raises(ValueError, match="they look like parts of a data set for segmentation"):
        check_names(Path("data"), names.split())


@pytest.mark.parametrize("names", ["original fake", "target decoy", "raw ripe rotten", "input menu target"])
def test_other_classes_of_such_names_are_classes(names: str) -> None:
    check_names(Path("data"), names.split())
