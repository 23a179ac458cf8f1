import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from netfission.classifier import Classifier
from netfission.data.files import find_images as find_image_files
from netfission.prediction import Failure, ImagePrediction, find_images, predict_images


def find_in_folder(folder: Path) -> list[Path]:
    return [Path(path) for path in find_image_files(folder).images]


@pytest.fixture(scope="session")
def files(digit_files) -> list[Path]:
    return find_in_folder(digit_files / "test")[:12]


@pytest.fixture(scope="session")
def expected(classifier, files) -> dict[Path, ImagePrediction]:
    """One image at a time."""
    return {path: next(predict_images(classifier, [path])) for path in files}


def assert_close(own: ImagePrediction, other: ImagePrediction) -> None:
    assert own.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    for name in ("probability", "disagreement", "entropy", "mutual_information"):
        assert getattr(own, name) == pytest.approx(getattr(other, name), abs=1e-5)
    assert own.votes == other.votes


@given(st.permutations(range(12)), st.integers(1, 13), st.sets(st.integers(0, 11), max_size=4))
@settings(max_examples=25, deadline=None)
def test_order_batch_size_and_failures_do_not_matter(classifier, files, expected, order, size, broken):
    images = [Failure(files[index], "broken") if index in broken else files[index] for index in order]
    predictions = list(predict_images(classifier, images, batch_size=size))
    assert [each.image for each in predictions] == [files[index] for index in order]
    for index, each in zip(order, predictions, strict=True):
        if index in broken:
            assert each == Failure(files[index], "broken")
        else:
            assert_close(each, expected[files[index]])


def test_each_field_is_what_the_classifier_says(classifier, files):
    predictions = list(predict_images(classifier, files, limits=classifier.limits(risk=0.2)))
    pixels = torch.stack([classifier.pixels(Image.open(path)) for path in files])
    own, names = classifier.predict(pixels, risk=0.2), classifier.spec.classes
    for row, each in enumerate(predictions):
        assert each.name == names[own.classes[row]]
        assert each.probability == pytest.approx(own.confidence[row].item())
        assert each.votes == [names[vote] for vote in own.votes[row]]
        assert each.disagreement == pytest.approx(own.disagreement[row].item())
        assert each.entropy == pytest.approx(own.entropy[row].item())
        assert each.mutual_information == pytest.approx(own.mutual_information[row].item(), abs=1e-7)
        assert each.abstain is bool(own.abstains[row])
        assert list(each.probabilities.values()) == pytest.approx(own.probabilities[row].tolist())
        assert list(each.probabilities) == names
    assert len({each.abstain for each in predict_images(classifier, files)}) == 1


def test_an_invalid_risk_is_refused_before_any_image_is_read(classifier):
    bare = Classifier(classifier.network, classifier.spec)
    with pytest.raises(
        ValueError, match=r"risk must be left out for a network without calibration, got 0\.1"
    ):
        bare.limits(risk=0.1)
    with pytest.raises(ValueError, match="risk must be a share of wrong answers from 0 to 1, got 2"):
        classifier.limits(risk=2)


def grey_ramp() -> np.ndarray:
    return np.linspace(0, 255, 64).reshape(8, 8).astype(np.uint8)


LOSSLESS = ["png", "bmp", "tiff", "gif", "webp", "ppm", "tga", "jp2", "pcx", "sgi"]


@pytest.mark.parametrize("suffix", [*LOSSLESS, "jpg", "ico", "dds"])
def test_every_format_is_answered(classifier, suffix, tmp_path):
    image = Image.fromarray(grey_ramp()).convert("RGB")
    image.save(tmp_path / "reference.png")
    path = tmp_path / f"image.{suffix}"
    image.save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert find_in_folder(tmp_path) == [path, tmp_path / "reference.png"]
    own, reference = predict_images(classifier, [path, tmp_path / "reference.png"])
    assert isinstance(own, ImagePrediction)
    if suffix in LOSSLESS:
        assert_close(own, reference)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"])
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (300, 7), (2, 2000)])
def test_every_mode_and_size_is_answered(classifier, mode, size, tmp_path):
    grey = Image.fromarray(grey_ramp()).resize(size)
    if mode == "I;16":
        grey = Image.fromarray(np.array(grey).astype(np.uint16) * 257)
    image = (
        grey
        if mode in ("L", "I;16")
        else grey.convert("RGB").convert(mode if mode != "I" else "L").convert(mode)
    )
    assert image.mode == mode
    path = tmp_path / "image.tiff"
    image.save(path)
    (own,) = predict_images(classifier, [path])
    assert isinstance(own, ImagePrediction)
    if mode in ("LA", "RGBA", "I;16"):  # the same picture in other words
        Image.fromarray(grey_ramp()).resize(size).save(tmp_path / "grey.png")
        (plain,) = predict_images(classifier, [tmp_path / "grey.png"])
        assert_close(own, plain)


def test_an_image_turned_by_exif_is_seen_upright(classifier, files, tmp_path):
    upright = Image.open(files[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    turned, reference = predict_images(classifier, [tmp_path / "turned.png", files[0]])
    assert_close(turned, reference)


def test_damaged_files_are_named_and_the_others_answered(classifier, files, expected, tmp_path):
    whole = files[0].read_bytes()
    bad = {
        "cut.png": whole[: len(whole) // 2],
        "noise.jpg": bytes(range(256)) * 4,
        "empty.gif": b"",
        "header.png": whole[:20],
        "text.bmp": b"BM" + b"\0" * 10,
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.png").mkdir()
    names = [str(tmp_path / name) for name in (*bad, "folder.png", "nowhere.png")]
    predictions = list(
        predict_images(classifier, find_images([str(files[0]), *names, str(files[1])]), batch_size=3)
    )
    assert_close(predictions[0], expected[files[0]])
    assert_close(predictions[-1], expected[files[1]])
    errors = {each.image.name: each.error for each in predictions[1:-1]}
    assert set(errors) == {*bad, "folder.png", "nowhere.png"}
    assert errors["nowhere.png"] == "no such file or directory"
    assert errors["folder.png"] == "the folder holds no images"
    assert errors["noise.jpg"] == errors["empty.gif"] == "not an image of a known format"
    assert all(error and "\n" not in error for error in errors.values())


@pytest.mark.parametrize("limit", [100, 60])  # above the limit Pillow warns, above its double it refuses
def test_a_decompression_bomb_is_an_error_of_that_image(
    classifier, files, expected, limit, tmp_path, monkeypatch
):
    Image.new("RGB", (12, 12)).save(tmp_path / "bomb.png")
    Image.new("RGB", (5, 5)).save(tmp_path / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    predictions = list(predict_images(classifier, [tmp_path / "bomb.png", tmp_path / "small.png"]))
    assert isinstance(predictions[0], Failure)
    assert "decompression bomb" in predictions[0].error
    assert isinstance(predictions[1], ImagePrediction)


def test_the_first_of_several_frames_is_taken(classifier, files, tmp_path):
    first, second = (Image.open(path).convert("RGB") for path in files[:2])
    first.save(tmp_path / "two.tiff", save_all=True, append_images=[second])
    own, reference = predict_images(classifier, [tmp_path / "two.tiff", files[0]])
    assert_close(own, reference)


def test_folders_are_searched_in_order_and_hidden_files_left_out(tmp_path):
    for name in (
        "b/2.png",
        "b/10.JPG",
        "b/a/x.webp",
        "a.png",
        "b/.hidden.png",
        "b/.git/y.png",
        "b/notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match="left out") as left_out:
        found = find_images([str(tmp_path / "b"), str(tmp_path / "b/notes.txt"), str(tmp_path)])
    text = "left out: 1 of another type, such as notes.txt; name a file itself to have it tried"
    messages = [str(warning.message) for warning in left_out]
    assert messages == [f"{tmp_path}{folder}: {text}" for folder in ("/b", "")]
    names = [str(path.relative_to(tmp_path)) for path in found]
    below = ["b/10.JPG", "b/2.png", "b/a/x.webp"]
    assert names == [*below, "b/notes.txt", "a.png", *below]


def test_a_pipe_is_not_waited_for_and_a_link_is_followed(classifier, files, expected, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(files[0])
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    names = ("pipe.png", "link.png", "loop.png")
    pipe, link, loop = predict_images(classifier, [tmp_path / name for name in names])
    assert pipe == Failure(tmp_path / "pipe.png", "not a regular file")
    assert loop == Failure(tmp_path / "loop.png", "too many levels of symbolic links")
    assert_close(link, expected[files[0]])
    assert find_images([str(tmp_path)]) == [tmp_path / name for name in sorted(names)]
    assert find_in_folder(tmp_path) == [tmp_path / "link.png"]
