"""All methods by name. To add one, write a file with a `Method` and enter it in `METHODS`."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib import import_module

from netfission.config import FissionConfig, MethodConfig, ModelConfig, RunConfig, changed
from netfission.grouping import find_grouping
from netfission.methods.base import Method
from netfission.methods.optimizers import check_optimizer
from netfission.pruning.prune import CRITERIA
from netfission.utils.errors import check_choice, invalid


class MethodRegistry(Mapping[str, type[Method]]):
    """Name → subclass of `Method`. A method's file is imported when the method is first looked up.

    Args:
        locations: name → `file:class`, in the package `netfission.methods`.

    Example:
        >>> registry = MethodRegistry({"packed": "packed:PackedMethod"})
        >>> registry["packed"].__name__
        'PackedMethod'
        >>> class OneNetworkMethod(Method):
        ...     pass
        >>> registry.register("one-network", OneNetworkMethod)
        >>> sorted(registry)
        ['one-network', 'packed']
    """

    def __init__(self, locations: Mapping[str, str]) -> None:
        self._locations = dict(locations)
        self._loaded: dict[str, type[Method]] = {}

    def __getitem__(self, name: str) -> type[Method]:
        if name not in self._loaded:
            file, _, kind = self._locations[name].partition(":")
            self._loaded[name] = getattr(import_module(f"netfission.methods.{file}"), kind)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __len__(self) -> int:
        return len(self._locations)

    def register(self, name: str, kind: type[Method]) -> None:
        """Enter a method that is not part of this library, until the process ends."""
        self._locations[name] = f"{kind.__module__}:{kind.__qualname__}"
        self._loaded[name] = kind


METHODS = MethodRegistry(
    {
        "batch-ensemble": "batch_ensemble:BatchEnsembleMethod",
        "born-again": "born_again:BornAgainMethod",
        "deep-ensemble": "deep_ensemble:DeepEnsembleMethod",
        "dst-ensemble": "sparse_training:DSTEnsembleMethod",
        "edst-ensemble": "sparse_training:EDSTEnsembleMethod",
        "fge": "snapshot:FastGeometricMethod",
        "fission": "fission:FissionMethod",
        "lora-ensemble": "lora_ensemble:LoraEnsembleMethod",
        "masksembles": "masksembles:MasksemblesMethod",
        "mc-dropout": "mc_dropout:McDropoutMethod",
        "mimo": "mimo:MimoMethod",
        "multi-exit": "multi_exit:MultiExitMethod",
        "narrow": "narrow:NarrowMethod",
        "neurotrails": "sparse_training:NeuroTrailsMethod",
        "packed": "packed:PackedMethod",
        "singular-value-ensemble": "singular_value_ensemble:SingularValueEnsembleMethod",
        "snapshot": "snapshot:SnapshotMethod",
        "treenet": "treenet:TreeNetMethod",
    }
)


def find_method(config: MethodConfig, fission: FissionConfig | None = None) -> Method:
    """Create the method that the settings name.

    Args:
        config: the settings of methods.
        fission: the settings of fission, to be checked as well; default unchecked.

    Raises:
        ValueError: the method does not exist, or a setting was changed that it does not read.

    Example:
        >>> find_method(MethodConfig("mimo", repetitions=2)).config.repetitions
        2
        >>> find_method(MethodConfig("mimo", alpha=3.0))
        Traceback (most recent call last):
        ValueError: alpha must be 2.0 unless method=packed, got 3.0
    """
    kind = METHODS[check_choice("method", config.method, METHODS)]
    given = changed(config) | ({} if fission is None else changed(fission))
    defaults = {setting.name: setting.default for setting in (*fields(MethodConfig), *fields(FissionConfig))}
    for name, value in given.items():
        if not reads_setting(config.method, name):
            readers = " or ".join(method for method in METHODS if reads_setting(method, name))
            valid = "left out" if defaults[name] is None else repr(defaults[name])
            raise invalid(name, f"{valid} unless method={readers}", value)
    return kind(config)


def check_settings(config: RunConfig) -> Method:
    """Check how a run's method is built and trained, as far as that is possible without model and data.

    Returns:
        The method.

    Raises:
        ValueError: see `find_method`, `Method.check`, `check_keeps_weights` and `Method.hooks`.

    Example:
        >>> check_settings(RunConfig.from_dict({"method": "treenet", "exits": 1}))
        Traceback (most recent call last):
        ValueError: exits must be at least 2 with method=treenet, got 1
    """
    method, fission = find_method(config.method, config.fission), config.fission
    exits, branch_after = fission.exits, fission.branch_after
    method.check(fission)
    check_keeps_weights(config.model, config.method.method)
    if config.training.parent_weight and config.model.weights is None:
        raise invalid("parent_weight", "0 unless weights is given", config.training.parent_weight)
    check_choice("criterion", fission.criterion, CRITERIA)
    find_grouping(fission.grouping, fission)
    if isinstance(branch_after, list) and len(branch_after) != exits - 1:
        raise invalid("branch_after", f"{exits - 1} stages, one per exit but the first", branch_after)
    if fission.budget_is_timed and config.training.devices * config.training.machines > 1:
        hint = "find it on one device first: its budget.json has the budget in MACs and the stages"
        raise invalid(
            "budget_in", "macs with several devices, which must agree", fission.budget_in, hint=hint
        )
    method.loss(config.training)
    method.schedule(config.training, exits)
    check_optimizer(config.training)
    if config.training.patience is not None:
        _check_may_stop(method, config)
    method.hooks(exits, config.training)
    return method


def _check_may_stop(method: Method, config: RunConfig) -> None:
    """Refuse `patience` without a validation split, and for a training that must reach its end."""
    patience = config.training.patience
    if config.data.validation == 0:
        raise invalid("patience", "left out unless validation is above 0", patience)
    if config.method.one_by_one:
        raise invalid("patience", "left out with one_by_one", patience)
    if not method.may_stop_early:
        reason = f"with method={config.method.method}, whose training must reach its end"
        raise invalid("patience", f"left out {reason}", patience)


def check_keeps_weights(model: ModelConfig, method: str) -> None:
    """Check that a method can keep the trained weights that its network is to start from, if it is to.

    Raises:
        ValueError: it cannot, see `Method.loses_weights`. Or it needs some, see `Method.needs_weights`.

    Example:
        >>> check_keeps_weights(ModelConfig(pretrained=True), "deep-ensemble")
        >>> check_keeps_weights(ModelConfig(pretrained=True), "packed")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: pretrained must be left out with method=packed, got True; its members start from new ...
    """
    reason = METHODS[method].loses_weights
    for setting in ("pretrained", "weights") if reason else ():
        if value := getattr(model, setting):
            raise invalid(setting, f"left out with method={method}", value, hint=reason)
    if (needed := METHODS[method].needs_weights) and not model.trained:
        expected = f"True, or weights a file, with method={method}"
        raise invalid("pretrained", expected, model.pretrained, hint=needed)


def reads_setting(method: str, setting: str) -> bool:
    """Return whether a method reads one of the settings of `MethodConfig` or `FissionConfig`.

    Example:
        >>> reads_setting("packed", "alpha"), reads_setting("mimo", "alpha")
        (True, False)
    """
    return setting in {"method", "exits", "seed", *METHODS[method].settings}
