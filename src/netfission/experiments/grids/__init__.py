"""The grids that come with the project, one YAML file each, and what several of them share."""

from importlib.resources import files
from pathlib import PurePath

SCALES = "scales"  # settings that several grids share, by scale
CONTROLS = "controls"  # contenders that several grids share


def named_grids() -> list[str]:
    """Return the names of the grids, in alphabetical order.

    Example:
        >>> named_grids()[:3]
        ['ablation-distillation', 'augmentation', 'branching']
    """
    names = {PurePath(file.name) for file in files(__name__).iterdir()}
    return sorted({name.stem for name in names if name.suffix == ".yaml"} - {SCALES, CONTROLS})


def grid_text(name: str) -> str:
    """Return the YAML text of a grid's file."""
    return (files(__name__) / f"{name}.yaml").read_text("utf-8")
