"""The grids that come with the project: one YAML file each, and the settings that several of them share."""

from importlib.resources import files

SHARED = "scales"  # settings that several grids share, by scale


def named_grids() -> list[str]:
    """Return the names of the grids, in alphabetical order.

    Example:
        >>> named_grids()[:3]
        ['ablation-distillation', 'augmentation', 'branching']
    """
    names = (file.name for file in files(__name__).iterdir())
    return sorted(stem for name in names if (stem := name.removesuffix(".yaml")) not in (name, SHARED))


def grid_text(name: str) -> str:
    """Return the YAML text of a grid's file."""
    return (files(__name__) / f"{name}.yaml").read_text("utf-8")
