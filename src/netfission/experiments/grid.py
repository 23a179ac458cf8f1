"""A grid of runs as plain data: contenders × seeds under common settings."""

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from netfission.config import ONE_PREDICTION, DataConfig, FissionConfig, MethodConfig, RunConfig
from netfission.data.sources import is_named
from netfission.experiments.contenders import Settings
from netfission.methods.effects import check_effects, chosen, unmet_condition
from netfission.methods.registry import METHODS, check_settings, reads_setting
from netfission.tasks import task_kind
from netfission.utils.errors import check_choice, invalid, within
from netfission.utils.typed import typed


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        contender: name of the contender that it belongs to.
        config: all settings of the run. With `start`, its `weights` are relative to the grid's folder.
        start: the run whose trained network this one starts from; None if it is no run of the grid.
    """

    contender: str
    config: RunConfig
    start: "Cell | None" = None

    @property
    def seed(self) -> int:
        """Seed of data order, augmentation, initial weights and grouping."""
        return self.config.fission.seed

    @property
    def folder(self) -> str:
        """The run's folder, relative to that of the grid."""
        return f"runs/{self.key}"

    @cached_property
    def key(self) -> str:
        """12 hexadecimal digits that identify the run's settings, and the revision of its method."""
        settings = chosen_settings(self.config)
        if revision := METHODS[self.config.method.method].revision:
            settings["revision"] = revision
        if self.config.model.trained:
            settings["start"] = _START
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Grid:
    """Contenders that run with the same seeds and, apart from their own settings, the same settings.

    Attributes:
        contenders: name → the contender's own settings.
        seeds: each contender runs once per seed.
        common: settings of all contenders; a setting that is left out has its default.
        reference: the contender that the others are compared with.
        title: what is compared; by default the settings.
        x_axis: the setting on the picture's x-axis; if empty, the cost.
        explicit: names of common settings that a user chose even if they have their default.
        starts: contender → the contender whose trained network it starts from, seed by seed.

    Example:
        >>> contenders = {"single": {"exits": 1}, "fission": {"grouping": "channels"}}
        >>> grid = Grid(contenders, range(2), {"data": "digits", "epochs": 3}, reference="single")
        >>> [(cell.contender, cell.seed) for cell in grid.cells()]
        [('single', 0), ('fission', 0), ('single', 1), ('fission', 1)]
        >>> grid.config("fission", seed=1).fission.grouping
        'channels'
    """

    contenders: Mapping[str, Settings]
    seeds: Sequence[int]
    common: Settings
    reference: str
    title: str = ""
    x_axis: str = ""
    explicit: Set[str] = frozenset()
    starts: Mapping[str, str] = field(default_factory=dict)

    @property
    def chosen(self) -> list[str]:
        """The names of the common settings that differ from their defaults or are explicit."""
        different = chosen(self.common)
        return [name for name in self.common if name in different or name in self.explicit]

    def affected(self, setting: str) -> list[str]:
        """Return the contenders on which a common setting has an effect, since they do not have their own.

        Example:
            >>> contenders = {"single": {"exits": 1}, "fission": {}, "mimo": {"method": "mimo"}}
            >>> grid = Grid(contenders, range(1), {"sparsity": 0.5, "teacher": "others"}, "single")
            >>> grid.affected("sparsity"), grid.affected("teacher")
            (['single', 'fission'], ['fission'])
        """
        return [
            name
            for name, own in self.contenders.items()
            if setting not in own
            and not (name in self.starts and setting in STARTS)
            and setting not in self._ignored(name)
            and unmet_condition(setting, self.config(name, self.seeds[0])) is None
        ]

    def cells(self) -> list[Cell]:
        """Return all runs, seed by seed, so that a grid that is stopped early has compared whole seeds.

        Raises:
            ValueError: a setting is unknown or not valid, or has no effect on any contender; or a contender's
                method cannot be trained with its settings or for the task, it has another task than the
                others, or it starts from one of several exits. The message names the contender unless the
                setting is one of all contenders.
        """
        return list(self._cells)

    @cached_property
    def _cells(self) -> list[Cell]:
        cells = [self.cell(name, seed) for seed in self.seeds for name in self.contenders]
        configs = {cell.contender: cell.config for cell in cells}
        effective = {  # on one contender at least: values under `each` may switch each other off
            setting
            for name, own in self.contenders.items()
            for setting in chosen(own)
            if unmet_condition(setting, configs[name]) is None
        }
        for name, start in self.starts.items():
            fission = configs[start].fission
            if fission.exits > 1 or fission.sparsity > 0:
                found = f"{start!r} of {fission.exits} exits" if fission.exits > 1 else f"{start!r}, pruned"
                raise invalid(f"contender {name}: from", "a contender of one exit, not pruned", found=found)
        for name, config in configs.items():
            try:
                check_settings(config)
                check_effects(config, [own for own in chosen(self.contenders[name]) if own not in effective])
            except ValueError as error:
                raise within(f"contender {name}", error) from error
            self._check_task(name, config)
        for name in self.chosen:
            if not self.affected(name) and all(name not in settings for settings in self.contenders.values()):
                raise invalid(name, "left out, since it has no effect on any contender", self.common[name])
        return cells

    def _check_task(self, contender: str, config: RunConfig) -> None:
        """Check that a contender's settings suit the task, which is that of all contenders."""
        own = self.contenders[contender]
        common = self.common.get("task", DataConfig.task)
        if config.data.task != common:
            expected = f"{common!r}, the task of all contenders"
            raise within(f"contender {contender}", invalid("task", expected, config.data.task))
        try:
            task_kind(config.data.task).check(config)
        except ValueError as error:
            if str(error).partition(" ")[0] in own:
                raise within(f"contender {contender}", error) from error
            raise

    def cell(self, contender: str, seed: int) -> Cell:
        """Return one run, and with it the run that it starts from.

        Raises:
            ValueError: a setting is unknown or not valid.
        """
        start = self.cell(self.starts[contender], seed) if contender in self.starts else None
        return Cell(contender, self.config(contender, seed), start)

    def config(self, contender: str, seed: int) -> RunConfig:
        """Return the settings of one run: the common ones that its method reads, and its own."""
        config = self._configs[contender]
        config = replace(config, fission=replace(config.fission, seed=seed))
        if contender not in self.starts:
            return config
        start = self.cell(self.starts[contender], seed)
        return replace(config, model=replace(config.model, weights=start.folder))

    @cached_property
    def _configs(self) -> dict[str, RunConfig]:
        """Contender → its settings, except for what differs from seed to seed."""
        return {name: self._config(name) for name in self.contenders}

    def _config(self, contender: str) -> RunConfig:
        ignored = self._ignored(contender)
        common = {name: value for name, value in self.common.items() if name not in ignored}
        own = self.contenders[contender]
        if contender in self.starts:
            common |= {"pretrained": False, "weights": None}
        try:
            return RunConfig.from_dict({**common, **own, "seed": self.seeds[0]})
        except ValueError as error:
            argument = str(error).partition(" ")[0]
            if argument not in own and own.keys() <= _DEFAULTS.keys():  # it is a setting of all contenders
                raise
            raise within(f"contender {contender}", error) from error

    def _ignored(self, contender: str) -> set[str]:
        """The settings that a contender's method, or its grouping, does not read."""
        settings = {**_DEFAULTS, **self.common, **self.contenders[contender]}
        method = check_choice("method", typed(str, settings["method"], "method"), METHODS)
        of_other_groupings = {
            name for name, grouping in _OF_GROUPING.items() if grouping != settings["grouping"]
        }
        exits = {"exits"} if method in ONE_PREDICTION else set()
        return of_other_groupings | exits | {name for name in _OF_METHODS if not reads_setting(method, name)}


_START = (
    2  # raised when networks start from trained weights in another way, so that older records do not count
)
STARTS = ("pretrained", "weights")  # what a network starts from
_DEFAULTS = RunConfig().to_dict()
_OF_METHODS: Set[str] = {setting.name for part in (MethodConfig, FissionConfig) for setting in fields(part)}
_OF_GROUPING = {
    "assignment": "channels",
    "copy_noise": "copies",
    "exact_partition": "channels",
    "keep_shortcuts": "weights",
    "overlap": "channels",
    "reconstruct": "channels",
}


def chosen_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that differ from their defaults, by name, in alphabetical order.

    A folder of data and a file of weights count by their names alone, since their location does not change
    what is learnt. So a data set of the hub and a folder of the same name count as the same.

    Example:
        >>> chosen_settings(RunConfig.from_dict({"data": "/datasets/cifar100", "exits": 2}))
        {'data': 'cifar100', 'exits': 2}
    """
    if not is_named(config.data.data):
        config = replace(config, data=replace(config.data, data=Path(config.data.data).name))
    if config.model.weights is not None:
        config = replace(config, model=replace(config.model, weights=Path(config.model.weights).name))
    return {name: value for name, value in sorted(config.to_dict().items()) if value != _DEFAULTS[name]}
