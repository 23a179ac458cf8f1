"""How a stage is dealt out to the paths that run through it: one grouping a file."""

from netfission.grouping.base import Grouping
from netfission.grouping.copies import CopyGrouping
from netfission.grouping.weights import WeightGrouping

__all__ = ["GROUPINGS", "CopyGrouping", "Grouping", "WeightGrouping"]

GROUPINGS: dict[str, type[Grouping]] = {"copies": CopyGrouping, "weights": WeightGrouping}
