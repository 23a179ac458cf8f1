"""How a stage is dealt out to the paths that run through it: one grouping a file."""

from netfission.grouping.base import Grouping, RepeatedLayer, StageSplit
from netfission.grouping.channels import ChannelGrouping
from netfission.grouping.copies import CopyGrouping
from netfission.grouping.weights import WeightGrouping

__all__ = [
    "GROUPINGS",
    "ChannelGrouping",
    "CopyGrouping",
    "Grouping",
    "RepeatedLayer",
    "StageSplit",
    "WeightGrouping",
]

GROUPINGS: dict[str, type[Grouping]] = {
    "channels": ChannelGrouping,
    "copies": CopyGrouping,
    "weights": WeightGrouping,
}
