"""Grids by name, or from a file: what `netfission reproduce` does."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from netfission.experiments.contenders import CONTENDERS, Settings, readable
from netfission.experiments.grid import Grid
from netfission.experiments.grids import SHARED, grid_text, named_grids
from netfission.utils.errors import check_choice
from netfission.utils.typed import typed


@dataclass(frozen=True)
class _Content:
    """What a file holds, as it stands there."""

    contenders: dict[str, dict[str, Any] | None]
    title: str = ""
    reference: str = ""
    seeds: int = 3
    along: str = ""
    settings: dict[str, Any] | None = None
    scales: dict[str, dict[str, Any] | None] | None = None


_KEYS = [key.name for key in fields(_Content)]


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
        common = {**self.scales[check_choice("scale", scale, self.scales)], **changes}
        contenders = dict(_spread(self.contenders))
        check_choice(f"{self.name}: reference", self.reference, contenders)
        if self.along and not any(self.along in own for own in contenders.values()):
            raise ValueError(f"{self.name}: along={self.along!r}: takes a setting of a contender's own")
        title = f"{self.title} ({scale} scale)"
        return Grid(contenders, range(number), common, self.reference, title, self.along)


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
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"grid={name}: cannot be read ({reason})") from error
    check_choice("grid", name, named_grids())
    return read_grid(name, grid_text(name))


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
        check_choice(f"{name}: key", str(key), _KEYS)
    if not content.get("contenders"):
        raise ValueError(f"grid={name}: takes contenders, at least one")
    try:
        said = typed(_Content, content)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    for own in (said.settings, *(said.scales or {}).values(), *said.contenders.values()):
        if "seed" in {**(own or {}), **(own or {}).get("each", {})}:
            raise ValueError(f"{name}: seed: takes seeds, a number of runs of each contender")
    contenders = {key: _own_settings(name, key, value) for key, value in said.contenders.items()}
    shared = yaml.safe_load(grid_text(SHARED))
    scales = said.scales or dict.fromkeys(shared)
    return GridFile(
        name,
        said.title or name,
        said.reference or next(iter(contenders)),
        said.seeds,
        {
            scale: {**shared.get(scale, {}), **(said.settings or {}), **(own or {})}
            for scale, own in scales.items()
        },
        contenders,
        said.along,
    )


def _own_settings(grid: str, name: str, settings: Settings | None) -> Settings:
    """What stands beside a contender's name; of one that is known by its name alone, what is known."""
    if settings is not None:
        for key, values in typed(
            dict[str, list[Any]], settings.get("each", {}), f"{grid}: {name}: each"
        ).items():
            if not values:
                raise ValueError(f"{grid}: {name}: each: {key}: takes one value or more")
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
            words = [name, *(f"{readable(key)} {readable(value)}" for key, value in chosen.items())]
            yield ", ".join(words), {**own, **chosen}
