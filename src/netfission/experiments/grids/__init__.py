"""The grids that come with the project: one YAML file each, and what several of them have in common."""

from importlib.resources import files

SHARED = "scales"  # settings that several grids have in common, by scale


def named_grids() -> list[str]:
    """Their names."""
    names = (file.name for file in files(__name__).iterdir())
    return sorted(stem for name in names if (stem := name.removesuffix(".yaml")) not in (name, SHARED))


def grid_text(name: str) -> str:
    """The content of one's file."""
    return (files(__name__) / f"{name}.yaml").read_text("utf-8")
