"""Every method by its name. A baseline is one file with one `Method`, entered in `METHODS`."""

from collections.abc import Iterator, Mapping
from importlib import import_module

from netfission.config import FissionConfig, MethodConfig, changed
from netfission.methods.base import Method
from netfission.utils.errors import check_choice


class MethodRegistry(Mapping[str, type[Method]]):
    """Name → method. A method's file is imported when the method is first asked for.

    Args:
        places: name → `file:class`, in the package `netfission.methods`.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)
        self._loaded: dict[str, type[Method]] = {}

    def __getitem__(self, name: str) -> type[Method]:
        if name not in self._loaded:
            file, _, kind = self._places[name].partition(":")
            self._loaded[name] = getattr(import_module(f"netfission.methods.{file}"), kind)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def register(self, name: str, kind: type[Method]) -> None:
        """Enter a method of your own for the rest of the process."""
        self._places[name] = f"{kind.__module__}:{kind.__qualname__}"
        self._loaded[name] = kind


METHODS = MethodRegistry(
    {
        "batch-ensemble": "batch_ensemble:BatchEnsembleMethod",
        "deep-ensemble": "deep_ensemble:DeepEnsembleMethod",
        "dst-ensemble": "sparse_training:DSTEnsembleMethod",
        "edst-ensemble": "sparse_training:EDSTEnsembleMethod",
        "fge": "snapshot:FastGeometricMethod",
        "fission": "fission:FissionMethod",
        "masksembles": "masksembles:MasksemblesMethod",
        "mc-dropout": "mc_dropout:McDropoutMethod",
        "mimo": "mimo:MimoMethod",
        "multi-exit": "multi_exit:MultiExitMethod",
        "narrow": "narrow:NarrowMethod",
        "neurotrails": "sparse_training:NeuroTrailsMethod",
        "packed": "packed:PackedMethod",
        "snapshot": "snapshot:SnapshotMethod",
    }
)


def find_method(config: MethodConfig, fission: FissionConfig | None = None) -> Method:
    """The method that the settings name.

    Args:
        config: the methods' settings.
        fission: those of fission, for a run that is to be made with them.

    Raises:
        ValueError: it is not known, or a setting was given that it does not read.
    """
    kind = METHODS[check_choice("method", config.method, METHODS)]
    given = changed(config) | ({} if fission is None else changed(fission))
    for name, value in given.items():
        if not reads_setting(config.method, name):
            readers = " or ".join(method for method in METHODS if reads_setting(method, name))
            raise ValueError(f"{name}={value}: goes with method {readers}, not with {config.method}")
    return kind(config)


def reads_setting(method: str, setting: str) -> bool:
    """Whether a method reads one of the settings of methods or of fission."""
    return setting in {"method", "exits", "seed", *METHODS[method].settings}
