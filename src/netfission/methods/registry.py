"""What a user would pick instead of fission, behind the same logits `(batch, exits, classes)`.

A baseline is one file with one `Method`, entered in `METHODS`.
"""

from netfission.config import FissionConfig, MethodConfig, changed
from netfission.methods.base import Method
from netfission.methods.batch_ensemble import BatchEnsembleMethod
from netfission.methods.deep_ensemble import DeepEnsembleMethod
from netfission.methods.fission import Fission
from netfission.methods.masksembles import MasksemblesMethod
from netfission.methods.mc_dropout import McDropoutMethod
from netfission.methods.mimo import MimoMethod
from netfission.methods.multi_exit import MultiExitMethod
from netfission.methods.narrow import NarrowMethod
from netfission.methods.packed import PackedMethod
from netfission.methods.snapshot import FastGeometric, Snapshot
from netfission.methods.sparse_training import DSTEnsemble, EDSTEnsemble, NeuroTrails
from netfission.utils.text import one_of

METHODS: dict[str, type[Method]] = {
    "batch-ensemble": BatchEnsembleMethod,
    "deep-ensemble": DeepEnsembleMethod,
    "dst-ensemble": DSTEnsemble,
    "edst-ensemble": EDSTEnsemble,
    "fge": FastGeometric,
    "fission": Fission,
    "masksembles": MasksemblesMethod,
    "mc-dropout": McDropoutMethod,
    "mimo": MimoMethod,
    "multi-exit": MultiExitMethod,
    "narrow": NarrowMethod,
    "neurotrails": NeuroTrails,
    "packed": PackedMethod,
    "snapshot": Snapshot,
}


def find_method(config: MethodConfig, fission: FissionConfig | None = None) -> Method:
    """The method that the settings name.

    Args:
        config: the methods' settings.
        fission: those of fission, for a run that is to be made with them.

    Raises:
        ValueError: it is not known, or a setting was given that it does not read.
    """
    kind = METHODS[one_of("method", config.method, METHODS)]
    given = changed(config) | ({} if fission is None else changed(fission))
    for name, value in given.items():
        if not reads(config.method, name):
            readers = " or ".join(method for method in METHODS if reads(method, name))
            raise ValueError(f"{name}={value}: goes with method {readers}, not with {config.method}")
    return kind(config)


def reads(method: str, setting: str) -> bool:
    """Whether a method reads one of the settings of methods or of fission."""
    return setting in {"method", "exits", "seed", *METHODS[method].settings}
