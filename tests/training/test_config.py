import re
from dataclasses import fields

import pytest
import yaml

from netfission.training.config import RunConfig, TrainingConfig


def test_yaml_round_trip():
    config = RunConfig.from_dict({"exits": 2, "ratio": [2.0, 1.0], "data": "cifar100", "clip": 1.0})
    assert RunConfig.from_dict(yaml.safe_load(config.to_yaml())) == config
    assert config.fission.exits == 2
    assert config.training.clip == 1.0


def test_no_setting_stands_in_two_parts():
    names = [setting.name for part in fields(RunConfig) for setting in fields(part.default_factory)]
    assert len(names) == len(set(names))


def test_unknown_setting_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="setting='exit' is not known; did you mean exits"):
        RunConfig.from_dict({"exit": 3})


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", 0), ("batch_size", -1), ("learning_rate", 0.0), ("clip", -1.0), ("ema", 1.0), ("devices", 0)],
)
def test_impossible_values_are_refused(setting, value):
    with pytest.raises(ValueError, match=re.escape(f"{setting}={value}: takes")):
        TrainingConfig(**{setting: value})
