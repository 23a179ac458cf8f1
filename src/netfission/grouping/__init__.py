"""How a stage is divided among the paths that run through it: one grouping per file.

A new grouping is a subclass of `Grouping` in a file of its own, and an entry in `GROUPINGS`.
"""

from netfission.config import FissionConfig
from netfission.grouping.base import Grouping, RepeatedLayer, Stage, StageSplit
from netfission.grouping.channels import ChannelGrouping
from netfission.grouping.copies import CopyGrouping
from netfission.grouping.weights import WeightGrouping
from netfission.utils.errors import check_choice

__all__ = [
    "GROUPINGS",
    "ChannelGrouping",
    "CopyGrouping",
    "Grouping",
    "RepeatedLayer",
    "Stage",
    "StageSplit",
    "WeightGrouping",
    "find_grouping",
]

GROUPINGS: dict[str, type[Grouping]] = {
    "channels": ChannelGrouping,
    "copies": CopyGrouping,
    "weights": WeightGrouping,
}


def find_grouping(grouping: str | Grouping, config: FissionConfig) -> Grouping:
    """Return the grouping of a name with the settings of `config`; a `Grouping` is returned as it is.

    Raises:
        ValueError: there is no grouping of that name.

    Example:
        >>> find_grouping("weights", FissionConfig(keep_shortcuts=True))
        WeightGrouping(keep_shortcuts=True)
    """
    if isinstance(grouping, Grouping):
        return grouping
    return GROUPINGS[check_choice("grouping", grouping, GROUPINGS)].from_config(config)
