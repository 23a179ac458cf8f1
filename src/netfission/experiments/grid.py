"""A grid of runs as plain data: contenders × seeds under common settings."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from netfission.config import FissionConfig, MethodConfig, RunConfig
from netfission.data.sources import NAMES
from netfission.experiments.contenders import Settings
from netfission.methods.registry import METHODS, reads_setting
from netfission.utils.errors import check_choice
from netfission.utils.typed import typed


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        contender: whose run it is.
        config: all its settings.
    """

    contender: str
    config: RunConfig

    @property
    def seed(self) -> int:
        """Of data order, augmentation, initial weights and grouping."""
        return self.config.fission.seed

    @property
    def key(self) -> str:
        """What tells the run from others with other settings, whatever they are called."""
        return hashlib.sha256(json.dumps(chosen_settings(self.config)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Grid:
    """Contenders that run with the same seeds and, but for their own settings, the same settings.

    Attributes:
        contenders: name → the settings that are its own.
        seeds: one run each.
        common: settings of all; what is left out takes its default.
        reference: the contender that the others are measured by.
        title: what is compared; default what the settings say.
        along: the setting along the picture; empty for costs.
    """

    contenders: Mapping[str, Settings]
    seeds: Sequence[int]
    common: Settings
    reference: str
    title: str = ""
    along: str = ""

    def cells(self) -> list[Cell]:
        """All runs, seed by seed, so that a grid stopped early has compared whole seeds.

        Raises:
            ValueError: a setting is unknown, not what it takes, or read by no contender's method.
        """
        for name, value in self.common.items():
            read = (self._is_read(name, contender) for contender in self.contenders)
            if value != _DEFAULTS.get(name) and not any(read):
                raise ValueError(f"{name}={value}: no contender reads it")
        return [Cell(name, self.config(name, seed)) for seed in self.seeds for name in self.contenders]

    def config(self, contender: str, seed: int) -> RunConfig:
        """The settings of one run: of the common ones, those that mean something to it."""
        common = {name: value for name, value in self.common.items() if self._is_read(name, contender)}
        return RunConfig.from_dict({**common, **self.contenders[contender], "seed": seed})

    def _is_read(self, setting: str, contender: str) -> bool:
        """Whether a setting means something to a contender's method, and to its way of grouping."""
        if setting not in _OF_METHODS:
            return True
        own = {**_DEFAULTS, **self.common, **self.contenders[contender]}
        method = check_choice("method", typed(str, own["method"], "method"), METHODS)
        return (
            reads_setting(method, setting) and _OF_GROUPING.get(setting, own["grouping"]) == own["grouping"]
        )


_DEFAULTS = RunConfig().to_dict()
_OF_METHODS = {setting.name for part in (MethodConfig, FissionConfig) for setting in fields(part)}
_OF_GROUPING = {"assignment": "channels", "exact_partition": "channels", "keep_shortcuts": "weights"}


def chosen_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that differ from their defaults, by name, in alphabetical order.

    A folder of data stands there by its own name alone: where it lies does not change what is learnt. So a
    data set of the hub and a folder of the same name count as the same.
    """
    if config.data.data not in NAMES:
        config = replace(config, data=replace(config.data, data=Path(config.data.data).name))
    return {name: value for name, value in sorted(config.to_dict().items()) if value != _DEFAULTS[name]}
