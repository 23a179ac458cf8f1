"""The methods by the names under which they are compared; each is a few settings of a run."""

from collections.abc import Mapping, Set
from typing import Any

from netfission.config import MethodConfig
from netfission.utils.errors import check_choice

Settings = Mapping[str, Any]

_SPARSE: Settings = {"sparsity": 0.8, "criterion": "erk"}  # FreeTickets (arXiv 2106.14568), table 1

CONTENDERS: dict[str, Settings] = {
    "single": {"exits": 1, "branch_after": None, "ratio": None},
    "born-again": {"method": "born-again", "exits": 1, "branch_after": None, "ratio": None},
    "fission-channels": {"grouping": "channels"},
    "fission-weights": {"grouping": "weights"},
    "deep-ensemble": {"method": "deep-ensemble"},
    "treenet": {"method": "treenet"},
    "multi-exit": {"method": "multi-exit"},
    "narrow": {"method": "narrow"},
    "snapshot": {"method": "snapshot"},
    "fge": {"method": "fge"},
    "mc-dropout": {"method": "mc-dropout"},
    "lora-ensemble": {"method": "lora-ensemble"},
    "singular-value-ensemble": {"method": "singular-value-ensemble"},
    "mimo": {"method": "mimo"},
    "batch-ensemble": {"method": "batch-ensemble"},
    "packed": {"method": "packed"},
    "masksembles": {"method": "masksembles"},
    "dst-ensemble": {"method": "dst-ensemble", **_SPARSE},
    "edst-ensemble": {"method": "edst-ensemble", **_SPARSE},
    "neurotrails": {"method": "neurotrails", **_SPARSE},
}


def find_contender(name: str, *, trained: bool = False) -> Settings:
    """Return the settings of the contender with this name.

    Args:
        name: its name.
        trained: whether it starts from trained weights. The members of a Deep Ensemble, which may start equal
            then, are trained one by one.

    Raises:
        ValueError: the name is unknown; the message suggests the closest known names.

    Example:
        >>> find_contender("treenet")
        {'method': 'treenet'}
    """
    settings = CONTENDERS[check_choice("methods", name, CONTENDERS)]
    return {**settings, "one_by_one": True} if trained and name == "deep-ensemble" else settings


def usual_contenders(methods: Set[str] | None = None) -> list[str]:
    """Return the names of the contenders that are compared by default.

    Args:
        methods: those that can be trained for the task; None for all.

    Example:
        >>> usual_contenders()
        ['single', 'deep-ensemble', 'multi-exit', 'fission-channels']
        >>> usual_contenders({"fission", "treenet"})
        ['single', 'fission-channels']
    """
    return [
        name
        for name in ("single", "deep-ensemble", "multi-exit", "fission-channels")
        if methods is None or CONTENDERS[name].get("method", MethodConfig.method) in methods
    ]


def readable(value: Any) -> str:
    """Return a setting's name or value as contenders' names and pictures show it.

    Example:
        >>> readable("distillation_weight"), readable([2, 1, 1])
        ('distillation weight', '2–1–1')
    """
    return "–".join(map(str, value)) if isinstance(value, list) else str(value).replace("_", " ")
