"""Grids from YAML files: those that come with the project, and a user's own."""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isclose
from pathlib import Path
from typing import Any

import yaml

from netfission.config import RunConfig
from netfission.experiments.contenders import CONTENDERS, Settings, readable
from netfission.experiments.grid import STARTS, Grid
from netfission.experiments.grids import CONTROLS, SCALES, grid_text, named_grids
from netfission.utils.errors import MOST_SEEDS, check_choice, check_positive_integer, did_you_mean, invalid
from netfission.utils.text import printable
from netfission.utils.typed import typed
from netfission.utils.yaml_text import parse_yaml, read_text

_SETTINGS = RunConfig().to_dict()
_SCALE = re.compile(r"\w([\w .-]*\w)?")  # a name of a scale, which is part of a folder's name


@dataclass(frozen=True)
class _Content:
    """The content of a grid's file."""

    contenders: dict[str, dict[str, Any] | None]
    title: str = ""
    reference: str = ""
    seeds: int = 3
    x_axis: str = ""
    settings: dict[str, Any] | None = None
    scales: dict[str, dict[str, Any] | None] | None = None
    controls: bool = False


@dataclass(frozen=True)
class GridFile:
    """A grid as its file describes it.

    Attributes:
        name: its name, for folders.
        title: what it compares.
        reference: the contender that the others are compared with.
        seeds: number of runs of each contender.
        scales: name → the settings of all runs at that scale. Later settings override earlier ones: shared
            by grids at that scale, then the file's own, then the file's own at that scale.
        contenders: name → its own settings; under `each`, a list of values per setting; under `multiply`, a
            factor per setting on the value that all runs have at the scale, such as twice the epochs; under
            `from`, the name of an earlier contender of one exit whose trained network it starts from.
        x_axis: the setting on the picture's x-axis; if empty, the cost.
        controls: the contenders that `controls: true` adds.
    """

    name: str
    title: str
    reference: str
    seeds: int
    scales: Mapping[str, Settings]
    contenders: Mapping[str, Settings]
    x_axis: str
    controls: Collection[str] = ()

    def at(self, scale: str, *, seeds: int | None = None, **changes: Any) -> Grid:
        """Return the grid of runs at a scale.

        Args:
            scale: one of `scales`.
            seeds: number of runs of each contender; by default the file's.
            changes: settings of all runs, such as where the data set is.

        Raises:
            ValueError: the scale or the reference is unknown, `seeds` is not positive, no contender sets the
                setting on the x-axis, a product is not an integer although it must be, or a contender starts
                from one that is not before it, or from weights besides.

        Example:
            >>> grid = find_grid("figure5").at("laptop", seeds=2)
            >>> len(grid.cells()), grid.reference
            (22, 'fission, ratio 1–1–1')
        """
        number = check_positive_integer("seeds", self.seeds if seeds is None else seeds, MOST_SEEDS)
        common = {**self.scales[check_choice("scale", scale, self.scales)], **changes}
        for name in self.controls:
            self._check_control(self.contenders[name], common)
        contenders: dict[str, Settings] = {}
        starts: dict[str, str] = {}
        for name, settings in _expand(self.contenders):
            where = f"{self.name}.contenders.{name}"
            if (start := settings.get("from")) is not None:
                starts[name] = check_choice(f"{where}.from", typed(str, start, f"{where}.from"), contenders)
                for key in STARTS:
                    if key in settings:
                        raise invalid(f"{where}.{key}", "left out with from", settings[key])
            own = {key: value for key, value in settings.items() if key != "from"}
            contenders[name] = _multiplied(f"{where}.multiply", own, common)
        check_choice(f"{self.name}.reference", self.reference, contenders)
        if self.x_axis and not any(self.x_axis in settings for settings in contenders.values()):
            raise invalid(f"{self.name}.x_axis", "a setting under contenders", self.x_axis)
        title = f"{self.title} ({scale} scale)"
        return Grid(contenders, range(number), common, self.reference, title, self.x_axis, starts=starts)

    def _check_control(self, settings: Settings, common: Settings) -> None:
        """Refuse common settings whose products with the factors of a control are not integers."""
        for name, factor in settings.get("multiply", {}).items():
            value, multiple = {**_SETTINGS, **common}[name], Fraction(str(factor)).denominator
            if isinstance(value, int) and value % multiple:
                raise invalid(f"{self.name}: {name}", f"a multiple of {multiple} with controls: true", value)


def find_grid(name: str) -> GridFile:
    """Read a grid that comes with the project, or a user's own.

    Args:
        name: the grid's name, or the path of a YAML file, which ends in .yaml or .yml.

    Raises:
        ValueError: the name is unknown, or the file cannot be read or describes no grid.

    Example:
        >>> find_grid("figure4").x_axis
        'sparsity'
    """
    if name.endswith((".yaml", ".yml")):
        try:
            return read_grid(Path(name).stem, read_text(Path(name)))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise invalid("grid", "a YAML file that can be read", found=f"{name} ({reason})") from error
    names = named_grids()
    if name not in names:
        raise invalid(
            "grid", f"one of {', '.join(names)}, or a .yaml file", name, hint=did_you_mean(name, names)
        )
    return read_grid(name, grid_text(name))


def read_grid(name: str, text: str) -> GridFile:
    """Read a grid from YAML text.

    Args:
        name: the grid's name.
        text: a mapping with the keys `contenders`, `title`, `reference`, `seeds`, `x_axis`, `settings`,
            `scales` and `controls`, of which only `contenders` is required. If `controls` is true, the
            strongest simple controls are contenders besides, except those whose names the text uses itself.

    Raises:
        ValueError: the text is not YAML, or does not describe a grid.

    Example:
        >>> file = read_grid("mine", "contenders: {single: , fission: {each: {exits: [2, 3]}}}")
        >>> list(file.at("laptop").contenders)
        ['single', 'fission, exits 2', 'fission, exits 3']
    """
    content = _read_content(name, text)
    _check_names(name, content)
    controls = yaml.safe_load(grid_text(CONTROLS)) if content.controls else {}
    missing = {key: controls[key] for key in controls if key not in content.contenders}
    contenders = {
        key: _contender_settings(name, key, value) for key, value in (content.contenders | missing).items()
    }
    each = [settings.get("each", {}) for settings in contenders.values()]
    for settings in (content.settings, *(content.scales or {}).values(), *contenders.values(), *each):
        if settings and "seed" in settings:
            hint = "seeds is the number of runs of each contender"
            raise invalid(f"{name}.seed", "left out", found="a setting", hint=hint)
    places = {f"{name}.scales.{scale}": settings for scale, settings in (content.scales or {}).items()}
    for where, settings in ({f"{name}.settings": content.settings} | places).items():
        for key in settings or {}:
            check_choice(f"setting in {where}", key, _SETTINGS)
    shared = yaml.safe_load(grid_text(SCALES))
    scales = content.scales or dict.fromkeys(shared)
    return GridFile(
        name,
        content.title or name,
        content.reference or next(iter(contenders)),
        content.seeds,
        {
            scale: {**shared.get(scale, {}), **(content.settings or {}), **(settings or {})}
            for scale, settings in scales.items()
        },
        contenders,
        content.x_axis,
        controls=list(missing),
    )


def _read_content(name: str, text: str) -> _Content:
    """Read what stands in a grid's file, every value of its type."""
    try:
        parsed = parse_yaml(text)
    except ValueError as error:
        raise invalid(name, "YAML", found=f"damaged text ({error})") from error
    if not isinstance(parsed, dict):
        found = "nothing" if parsed is None else ""
        raise invalid(f"the YAML file of grid {name}", "a mapping with contenders", parsed, found=found)
    content = typed(_Content, parsed, name)
    if not content.contenders:
        raise invalid(f"{name}.contenders", "an object with at least one contender", content.contenders)
    for shown in (content.title, *content.contenders):
        if printable(shown) != shown:
            raise invalid(name, "a grid whose title and names are text without control characters", shown)
    return content


def _check_names(grid: str, content: _Content) -> None:
    """Refuse contenders without a name, and scales whose names cannot be a part of a folder's name."""
    for name in content.contenders:
        if not name.strip():
            raise invalid(f"name in {grid}.contenders", "text that is not empty", name)
    for name in content.scales or {}:
        if not _SCALE.fullmatch(name):
            expected = "letters and digits, with spaces, hyphens, underscores and points between them"
            raise invalid(f"name in {grid}.scales", expected, name)


def _contender_settings(grid: str, name: str, settings: Settings | None) -> Settings:
    """The settings beside a contender's name, or, if there are none, those of the known contender."""
    if settings is None:
        check_choice(f"name in {grid}.contenders without settings", name, CONTENDERS)
        return CONTENDERS[name]
    each_name = f"{grid}.contenders.{name}.each"
    for key, values in typed(dict[str, list[Any]], settings.get("each", {}), each_name).items():
        if not values:
            raise invalid(f"{each_name}.{key}", "a list of at least one value", values)
    return settings


def _multiplied(where: str, settings: Settings, common: Settings) -> Settings:
    """Return settings with those under `multiply` as products with the common values."""
    factors = typed(dict[str, float], settings.get("multiply", {}), where)
    remaining = {name: value for name, value in settings.items() if name != "multiply"}
    products: dict[str, int | float] = {}
    for name, factor in factors.items():
        value = {**_SETTINGS, **common}.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise invalid(f"{where}.{name}", "a setting that is a number", value)
        if name in remaining:
            raise invalid(f"{where}.{name}", "left out, as the contender sets the value itself", factor)
        product = value * factor
        if isinstance(value, int):
            if not isclose(product, round(product)):
                raise invalid(f"{where}.{name}", f"a factor that makes {value} an integer", factor)
            product = round(product)
        products[name] = product
    return remaining | products


def _expand(contenders: Mapping[str, Settings]) -> Iterator[tuple[str, Settings]]:
    """Each contender, or one for every combination of the values under its `each`."""
    for name, settings in contenders.items():
        fixed = dict(settings)
        each: Mapping[str, Sequence[Any]] = fixed.pop("each", {})
        for values in itertools.product(*each.values()):
            chosen = dict(zip(each, values, strict=True))
            words = [name, *(f"{readable(key)} {readable(value)}" for key, value in chosen.items())]
            yield ", ".join(words), {**fixed, **chosen}
