import re
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml

from netfission.config import DataConfig, RunConfig, TrainingConfig


def test_yaml_round_trip():
    config = RunConfig.from_dict({"exits": 2, "ratio": [2.0, 1.0], "data": "cifar100", "clip": 1.0})
    assert RunConfig.from_dict(yaml.safe_load(config.to_yaml())) == config
    assert config.fission.exits == 2
    assert config.training.clip == 1.0


def test_no_setting_stands_in_two_parts():
    names = [setting.name for part in fields(RunConfig) for setting in fields(part.default_factory)]
    assert len(names) == len(set(names))


def test_unknown_setting_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"^setting must be one of .*, got 'exit'; did you mean exits"):
        RunConfig.from_dict({"exit": 3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": "3"}, 'epochs must be an integer, got "3"'),
        ({"epochs": True}, "epochs must be an integer, got true"),
        ({"flip": 1}, "flip must be true or false, got 1"),
        ({"ratio": [1, "a"]}, 'ratio[1] must be a number, got "a"'),
        ({"branch_after": [1, 0.5]}, "branch_after[1] must be an integer or text, got 0.5"),
        ({"branch_after": "soon"}, "branch_after must be one of auto, late, got 'soon'"),
        ({"mix": "cutout"}, "mix must be one of none, cutmix, mixup, got 'cutout'; did you mean cutmix?"),
        ({"model": None}, "model must be text, got null"),
    ],
)
def test_values_of_another_type_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RunConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("crop_scale", 0.0, "crop_scale must be a share of an image's area, in (0, 1], got 0.0"),
        ("rand_augment", 31, "rand_augment must be an integer from 0 to 30, got 31"),
        ("color_jitter", 1.5, "color_jitter must be a number in [0, 1], got 1.5"),
        ("erase", -0.1, "erase must be a number in [0, 1], got -0.1"),
        ("label_smoothing", 1.0, "label_smoothing must be a share in [0, 1), got 1.0"),
        ("warmup", 1.0, "warmup must be a number in [0, 1), got 1.0"),
        ("layer_decay", 1.0, "layer_decay must be a factor between 0 and 1, such as 0.75, got 1.0"),
        ("patience", 0, "patience must be a positive integer, got 0"),
    ],
)
def test_settings_of_fine_tuning_are_checked(setting, value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RunConfig.from_dict({setting: value})


def test_whole_numbers_are_numbers_and_so_is_what_yaml_takes_for_text():
    read = RunConfig.from_dict(yaml.safe_load("learning_rate: 1e-3\nbranch_after: [1, 1]"))
    assert read.training.learning_rate == 0.001
    assert RunConfig.from_dict({"branch_after": (1, 1)}).fission == read.fission
    assert RunConfig.from_dict({"branch_after": "late"}).fission.branch_after == "late"
    assert RunConfig.from_dict({"exits": 2, "learning_rate": 1, "ratio": [2, 1]}).training.learning_rate == 1


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", 0), ("batch_size", -1), ("learning_rate", 0.0), ("clip", -1.0), ("ema", 1.0), ("devices", 0)],
)
def test_impossible_values_are_refused(setting, value):
    with pytest.raises(ValueError, match=rf"^{setting} must be a .*, got {value}$"):
        TrainingConfig(**{setting: value})


@pytest.mark.parametrize(
    ("kind", "setting", "value", "expected"),
    [
        (TrainingConfig, "temperature", 0.0, "a positive number"),
        (TrainingConfig, "temperature", 1e160, "at most 1,000,000"),
        (TrainingConfig, "learning_rate", 1e300, "at most 1,000,000"),
        (DataConfig, "std", [1e-38], "a positive number per channel, from 1e-06 to 1,000,000"),
        (DataConfig, "mean", [1e300], "a finite number per channel, of at most 1,000,000"),
        (TrainingConfig, "weight_decay", -0.1, "a finite number of at least 0"),
        (TrainingConfig, "distillation_weight", float("nan"), "a finite number of at least 0"),
        (TrainingConfig, "momentum", 1.0, "a number in [0, 1)"),
        (DataConfig, "image_size", 0, "a positive integer"),
        (DataConfig, "image_size", 2_000_000, "at most 16,384 pixels"),
        (DataConfig, "limit_per_class", 0, "a positive integer"),
        (DataConfig, "validation", 1.0, "a share of the training images, in [0, 1)"),
        (DataConfig, "validation", float("nan"), "a share of the training images, in [0, 1)"),
        (DataConfig, "mean", [0.5, float("nan")], "a finite number per channel, of at most 1,000,000"),
        (DataConfig, "std", [0.5, 0.0], "a positive number per channel, from 1e-06 to 1,000,000"),
        (DataConfig, "crop_padding", -1, "an integer of at least 0"),
        (DataConfig, "workers", -1, "an integer of at least 0"),
        (DataConfig, "mix_alpha", 1e-4, "a number from 0.1 to 1000"),
    ],
)
def test_values_out_of_range_are_refused(kind, setting, value, expected):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{setting} must be {expected}, got {value}')}$"):
        kind(**{setting: value})


def test_settings_need_neither_torch_nor_yaml():
    code = "import sys, netfission.config; print({'torch', 'yaml'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_setting_whose_name_is_no_text_is_refused():
    with pytest.raises(ValueError, match=r"setting must be one of .*, got 1$"):
        RunConfig.from_dict({1: 2})
