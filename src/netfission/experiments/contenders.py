"""Methods by the names under which they are compared: each is a few settings of a run."""

from collections.abc import Mapping
from typing import Any

from netfission.words import one_of

Settings = Mapping[str, Any]

CONTENDERS: dict[str, Settings] = {
    "single": {"exits": 1},
    "fission-channels": {"grouping": "channels"},
    "fission-weights": {"grouping": "weights"},
    "deep-ensemble": {"method": "deep-ensemble"},
    "treenet": {"grouping": "copies", "distillation_weight": 0.0},
}


def find_contender(name: str) -> Settings:
    """The settings that make a run one of this contender.

    Raises:
        ValueError: it is not known; names the nearest known ones.
    """
    return CONTENDERS[one_of("methods", name, CONTENDERS)]
