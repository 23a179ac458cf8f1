"""What a user would pick instead of fission, behind the same logits `(batch, exits, classes)`.

A baseline is one file with one `Method`, entered in `METHODS`.
"""

from dataclasses import fields

from netfission.baselines.batch_ensemble import BatchEnsembleMethod
from netfission.baselines.deep_ensemble import DeepEnsembleMethod
from netfission.baselines.masksembles import MasksemblesMethod
from netfission.baselines.mc_dropout import McDropoutMethod
from netfission.baselines.mimo import MimoMethod
from netfission.baselines.multi_exit import MultiExitMethod
from netfission.baselines.narrow import NarrowMethod
from netfission.baselines.packed import PackedMethod
from netfission.baselines.snapshot import FastGeometric, Snapshot
from netfission.baselines.sparse_training import DSTEnsemble, EDSTEnsemble, NeuroTrails
from netfission.training.config import MethodConfig
from netfission.training.method import Fission, Method
from netfission.words import one_of

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


def find_method(config: MethodConfig) -> Method:
    """The method that the settings name.

    Raises:
        ValueError: it is not known, or a setting was given that it does not read.
    """
    kind = METHODS[one_of("method", config.method, METHODS)]
    for setting in fields(config):
        value = getattr(config, setting.name)
        if setting.name not in {"method", *kind.settings} and value != setting.default:
            readers = [name for name, other in METHODS.items() if setting.name in other.settings]
            raise ValueError(
                f"{setting.name}={value}: goes with method {' or '.join(readers)}, not with {config.method}"
            )
    return kind(config)
