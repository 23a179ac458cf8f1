"""Grids by name, or from a file: what `netfission reproduce` does."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from netfission.experiments.contenders import CONTENDERS, Settings, in_words
from netfission.experiments.grid import Grid
from netfission.words import one_of

_KEYS = ("title", "reference", "seeds", "along", "settings", "scales", "contenders")
_SHARED = "scales.yaml"  # settings that several grids have in common, by scale


@dataclass(frozen=True)
class GridFile:
    """A grid as its file says.

    Attributes:
        name: for folders and titles.
        title: what it compares.
        reference: the contender that the others are measured by.
        seeds: how many runs of each.
        scales: name → the settings of all runs at that scale: of those that several grids have in common
            there, the file's own, and its own of that scale, the last counts.
        contenders: name → its own settings; of those under `each`, every value in turn.
        along: the setting along the picture; empty for costs.
    """

    name: str
    title: str
    reference: str
    seeds: int
    scales: Mapping[str, Settings]
    contenders: Mapping[str, Settings]
    along: str

    def at(self, scale: str, *, seeds: int | None = None, **changes: Any) -> Grid:
        """The grid of runs at a scale.

        Args:
            scale: one of `scales`.
            seeds: instead of the file's number.
            changes: settings of all runs, such as where the data are.

        Raises:
            ValueError: the scale is unknown, there are no seeds, or no contender sets what is `along`.
        """
        number = self.seeds if seeds is None else seeds
        if number < 1:
            raise ValueError(f"seeds={number}: takes a whole number from 1")
        common = {**self.scales[one_of("scale", scale, self.scales)], **changes}
        contenders = dict(_spread(self.contenders))
        one_of(f"{self.name}: reference", self.reference, contenders)
        if self.along and not any(self.along in own for own in contenders.values()):
            raise ValueError(f"{self.name}: along={self.along!r}: takes a setting of a contender's own")
        title = f"{self.title} ({scale} scale)"
        return Grid(contenders, range(number), common, self.reference, title, self.along)


def named_grids() -> list[str]:
    """The names of the grids that come with the project."""
    folder = files("netfission.experiments") / "grids"
    names = (file.name for file in folder.iterdir() if file.name.endswith(".yaml"))
    return sorted(name.removesuffix(".yaml") for name in names if name != _SHARED)


def find_grid(name: str) -> GridFile:
    """A grid that comes with the project, or one of your own.

    Args:
        name: its name, or the path of a YAML file, which ends in .yaml.

    Raises:
        ValueError: there is none, or the file is not what it takes; names the nearest known names.
    """
    if name.endswith((".yaml", ".yml")):
        try:
            return read_grid(Path(name).stem, Path(name).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"grid={name}: cannot be read ({error.strerror})") from error
    one_of("grid", name, named_grids())
    return read_grid(name, (files("netfission.experiments") / "grids" / f"{name}.yaml").read_text("utf-8"))


def read_grid(name: str, text: str) -> GridFile:
    """A grid from YAML.

    Raises:
        ValueError: the text is no YAML, or holds something else than a grid; names what.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"grid={name}: is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ValueError(f"grid={name}: takes {', '.join(_KEYS)}")
    for key in content:
        one_of(f"{name}: key", str(key), _KEYS)
    if not content.get("contenders"):
        raise ValueError(f"grid={name}: takes contenders, at least one")
    contenders = {key: _own_settings(name, key, value) for key, value in content["contenders"].items()}
    shared = yaml.safe_load((files("netfission.experiments") / "grids" / _SHARED).read_text("utf-8"))
    settings = content.get("settings") or {}
    scales = content.get("scales") or dict.fromkeys(shared)
    return GridFile(
        name,
        content.get("title", name),
        content.get("reference", next(iter(contenders))),
        content.get("seeds", 3),
        {name: {**shared.get(name, {}), **settings, **(own or {})} for name, own in scales.items()},
        contenders,
        content.get("along", ""),
    )


def _own_settings(grid: str, name: str, settings: Settings | None) -> Settings:
    """What stands beside a contender's name; of one that is known by its name alone, what is known."""
    if settings is not None:
        return settings
    if name not in CONTENDERS:
        raise ValueError(f"{grid}: contender {name!r}: takes settings, or the name of a method that is known")
    return CONTENDERS[name]


def _spread(contenders: Mapping[str, Settings]) -> Iterator[tuple[str, Settings]]:
    """Each contender, or one for every combination of the values under `each`."""
    for name, settings in contenders.items():
        own = dict(settings)
        each: Mapping[str, Sequence[Any]] = own.pop("each", {})
        for values in itertools.product(*each.values()):
            chosen = dict(zip(each, values, strict=True))
            words = [name, *(f"{in_words(key)} {in_words(value)}" for key, value in chosen.items())]
            yield ", ".join(words), {**own, **chosen}
