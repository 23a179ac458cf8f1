"""What commands share: the parser, the settings of runs, and checks of plain values."""

from collections.abc import Set
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from netfission.fission import FissionConfig
from netfission.training.config import DataConfig, MethodConfig, ModelConfig, RunConfig, TrainingConfig

PARTS = (DataConfig, ModelConfig, FissionConfig, MethodConfig, TrainingConfig)


class Parser(ArgumentParser):
    """Raises what argparse would print and exit with."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(exit_on_error=False, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise ArgumentError."""
        raise ArgumentError(None, message) from ex


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


def from_one(name: str, value: int | None) -> None:
    """ValueError where a number is below 1."""
    if value is not None and value < 1:
        raise ValueError(f"{name}={value}: takes a whole number from 1")
