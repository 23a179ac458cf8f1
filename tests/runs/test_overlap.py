"""What a network has seen in training is not passed off as new, whichever run in its history has seen it."""

import json
import re
import shutil
import warnings
from dataclasses import replace

import pytest
from PIL import Image

from netfission.config import RunConfig
from netfission.data import load_data
from netfission.data.load import find_splits
from netfission.runs.folder import RunFolder
from netfission.runs.overlap import images_dependence, validation_dependence, warn_of_held_out_images
from netfission.utils.files import write_json


@pytest.fixture
def begun(tmp_path):
    """Starts runs, each from the one before, and returns the settings of the last."""

    def start(*changes):
        config, previous = None, None
        for number, change in enumerate(changes):
            config = RunConfig.from_dict({"data": "digits", "weights": previous} | change)
            folder = RunFolder(tmp_path / str(number))
            folder.claim(config, resume=False)
            previous = str(folder.path)
        return config

    return start


def test_a_run_is_told_of_held_out_images_that_any_run_before_it_was_trained_on(begun, tmp_path):
    config = begun({"seed": 0}, {"seed": 1}, {"seed": 1})
    message = (
        r"^\d+ of 145 validation images of digits \(such as row \d+\) have the same content as training "
        f"images of {tmp_path / '0'}, from which the network starts, so its calibration is too confident; "
        r"seed=0 and validation=0\.1, as in that run, keep them apart$"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        warn_of_held_out_images(config)
    assert len(warned) == 1  # the run between has the same splits


@pytest.mark.parametrize("changes", [[{}], [{}, {}], [{"limit_per_class": 5}, {"limit_per_class": 5}]])
def test_runs_with_the_same_splits_need_no_warning(begun, changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_held_out_images(begun(*changes))


def test_copies_of_images_in_another_folder_are_found(begun, tmp_path):
    shades = {"a/train": (10, 200), "a/test": (30, 220), "b/train": (20, 210), "b/test": (10, 230)}
    for split, of_split in shades.items():
        for label, shade in zip(("dark", "light"), of_split, strict=True):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("L", (8, 8), shade).save(tmp_path / split / label / "image.png")
    config = begun(*({"validation": 0.0, "data": str(tmp_path / name)} for name in "ab"))
    message = (
        r"^1 of 2 test images of b \(such as test/dark/image.png\) has the same content as training "
        f"images of {tmp_path / '0'}, from which the network starts, so it looks better on the test split "
        "than it is on new images$"
    )
    with pytest.warns(UserWarning, match=message):
        warn_of_held_out_images(config)


def test_a_data_set_of_an_earlier_run_that_is_gone_is_said_not_to_be_checked(begun, tmp_path):
    config = begun({"data": str(tmp_path / "gone")}, {"data": "digits"})
    message = (
        f"^whether held-out images of digits are training images of {tmp_path / '0'} was not checked, as the "
        f"run's own data set cannot be read \\(data folder {tmp_path / 'gone'} does not exist\\)$"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        warn_of_held_out_images(config)
    assert len(warned) == 1


def test_images_that_an_earlier_run_was_trained_on_promise_nothing(begun, tmp_path):
    config = begun({"seed": 0}, {"seed": 1})
    unseen = find_splits("digits", seed=1)["validation"]
    found = images_dependence("digits", [unseen], config)
    assert found.endswith(f"as training images of {tmp_path / '0'}, from which the network started")
    assert not images_dependence("digits", [find_splits("digits", seed=0)["test"]], config)


def write_pets(folder, names):
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for name in names:
            Image.new("L", (8, 8), ord(name) - 40).save(folder / label / f"{name}.png")
    return folder


@pytest.fixture
def moved(begun, tmp_path):
    """Starts a run on photographs in `old` from another, and gives its settings with them in `new`."""

    def start(before, *, summary=True, **run):
        old = write_pets(tmp_path / "old", "abcdefgh")
        config = begun(
            {"data": str(old), "validation": 0.2} | before, {"data": str(old), "validation": 0.2} | run
        )
        first = RunFolder(tmp_path / "0")
        if summary:
            data = first.load_config().data
            write_json(first.data_summary, load_data(str(old), validation=data.validation).summary.to_json())
        return replace(config, data=replace(config.data, data=str(tmp_path / "new")))

    return start


@pytest.mark.parametrize("left", ["old new", "new", "old new alone", "new alone", "old alone", ""])
@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ({"patience": 3}, "epoch patience chose on validation images of the same data set"),
        ({"validation": 0.3}, "another validation split of the same data set"),
        ({}, ""),
    ],
)
def test_validation_images_of_a_run_before_promise_nothing_where_they_are_now(
    before, reason, left, moved, tmp_path
):
    config = moved(before, summary="alone" not in left)
    if "new" in left:
        shutil.copytree(tmp_path / "old", tmp_path / "new")
    if "old" not in left:
        shutil.rmtree(tmp_path / "old")
    found = validation_dependence(config)
    assert reason in found if reason else not found


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("names", ["ijklmnop", "abcdefghi", "i"])
def test_validation_images_of_another_data_set_promise_what_they_do(names, is_there, moved, tmp_path):
    config = moved({"patience": 3})
    write_pets(tmp_path / "new", names)
    if not is_there:
        shutil.rmtree(tmp_path / "old")
    assert not validation_dependence(config)
    (tmp_path / "new" / "dog").rename(tmp_path / "new" / "fox")
    assert not validation_dependence(config)


def test_a_data_set_that_was_replaced_is_known_by_what_the_run_recorded(moved, tmp_path):
    config = moved({"patience": 3})
    (tmp_path / "old").rename(tmp_path / "new")
    write_pets(tmp_path / "old", "ijklmnop")
    assert validation_dependence(config)
    summary = RunFolder(tmp_path / "0").data_summary
    content = json.loads(summary.read_text("utf-8"))
    content["train"]["digest"] = "0"
    del content["checksum"]
    write_json(summary, json.dumps(content))
    assert validation_dependence(config)  # a part is the same
    summary.unlink()
    assert not validation_dependence(config)  # both can be read, and differ
    summary.write_text("{")
    assert validation_dependence(config)


@pytest.mark.parametrize("is_there", [True, False])
def test_without_recorded_digests_a_place_that_is_gone_may_have_held_the_same(is_there, moved, tmp_path):
    config, folder = moved({"patience": 3}), RunFolder(tmp_path / "0")
    write_pets(tmp_path / "new", "ijklmnop")
    if not is_there:
        shutil.rmtree(tmp_path / "old")
    of_older_version = folder.data_summary.read_text("utf-8").replace('"digest"', '"was"')
    of_older_version = re.sub(r',\s*"was": "\w+"|,\s*"checksum": "[^"]*"', "", of_older_version)
    folder.data_summary.write_text(of_older_version)
    assert bool(validation_dependence(config)) != is_there
    (tmp_path / "new" / "dog").rename(tmp_path / "new" / "fox")
    assert not validation_dependence(config)


def test_masks_of_a_run_before_that_are_gone_may_be_the_same(moved, tmp_path):
    config = moved({"patience": 3, "task": "segmentation"}, task="segmentation")
    write_pets(tmp_path / "new", "i")
    assert not validation_dependence(config)
    shutil.rmtree(tmp_path / "old")
    assert validation_dependence(config)


def test_a_data_set_by_name_is_no_other_that_has_moved(begun, tmp_path):
    assert not validation_dependence(
        begun({"data": "digits", "patience": 3}, {"data": str(tmp_path / "new")})
    )
