"""What commands share: the parser, the settings of runs, and checks of plain values."""

import re
from collections.abc import Set
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from netfission.config import DataConfig, FissionConfig, MethodConfig, ModelConfig, RunConfig, TrainingConfig
from netfission.utils.typed import PLAIN

PARTS = (DataConfig, ModelConfig, FissionConfig, MethodConfig, TrainingConfig)


# How jsonargparse says that a value is of another type.
_UNFIT = re.compile(r'Parser key "(\w+)":.*(?:Got value|Given value): (.*)', re.DOTALL)


class Parser(ArgumentParser):
    """Raises what argparse would print and exit with."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(exit_on_error=False, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise ArgumentError; of a value of another type than its argument's, in our words."""
        unfit = _UNFIT.search(message)
        kinds = {action.dest: getattr(action, "_typehint", None) for action in self._actions}
        if unfit and (kind := kinds.get(unfit[1])) is not None:
            message = f"{unfit[1]}={unfit[2]}: takes {_takes(kind)}"
        raise ArgumentError(None, message.replace('Parser key "config":', "config:")) from ex


def _takes(kind: Any) -> str:
    """A type in words."""
    own = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(filter(None, (", ".join(own[:-1]), own[-1])))
    if get_origin(kind) is list:
        return f"a list [a, b, …], each {_takes(own[0])}"
    if own:  # of a union
        return " or ".join(_takes(each) for each in own if each is not NoneType)
    return PLAIN.get(kind, str(kind))


def run_config(settings: Namespace) -> RunConfig:
    """The settings of the run that `train` is asked for."""
    return RunConfig.from_dict(chosen(settings, {"resume"}))


def chosen(settings: Namespace, others: Set[str]) -> dict[str, Any]:
    """The settings of runs among those of a command, which has `others` as well."""
    flat: dict[str, Any] = settings.as_dict()
    own = {name: value for name, value in flat.items() if name not in {"config", "out", *others}}
    return own | {"data": found(own["data"])}


def found(data: str) -> str:
    """A data set's name as it is; a folder's path in full, so that the run is found from anywhere."""
    from netfission.data.sources import NAMES

    return data if data in NAMES or not Path(data).exists() else str(Path(data).resolve())


def check_positive(name: str, value: int | None) -> None:
    """ValueError where a number is below 1."""
    if value is not None and value < 1:
        raise ValueError(f"{name}={value}: takes a whole number from 1")
