"""What a network has seen in training is not passed off as new, whichever run in its history has seen it."""

import warnings

import pytest
from PIL import Image

from netfission.config import RunConfig
from netfission.data.load import find_splits
from netfission.runs.folder import RunFolder
from netfission.runs.overlap import images_dependence, warn_of_held_out_images


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
