"""When each setting of a run has an effect, so that one without an effect is refused or named."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from netfission.config import ONE_PREDICTION, RECIPES, DataConfig, FissionConfig, MethodConfig, RunConfig
from netfission.methods.optimizers import has_momentum
from netfission.methods.registry import METHODS, check_settings, reads_setting
from netfission.pruning.prune import CRITERIA
from netfission.utils.errors import check_choice, invalid


@dataclass(frozen=True)
class Condition:
    """What must hold for a setting to have an effect.

    Attributes:
        words: what else it must be, after "must be left out": "unless …" or "with …".
        holds: whether a run's settings meet it.
    """

    words: str
    holds: Callable[[RunConfig], bool]


def _joint(config: RunConfig) -> bool:
    return METHODS[config.method.method].joint


def _other_network_teaches(config: RunConfig) -> bool:
    return config.method.method in ONE_PREDICTION


def _weight(config: RunConfig) -> float:
    """Return the factor on the distillation term."""
    return METHODS[config.method.method].distillation_weight(config.training)


def _transforms_photographs(data: DataConfig) -> bool:
    """Return whether images are transformed one by one, in worker processes."""
    return data.crop_scale is not None or data.rand_augment is not None or data.color_jitter > 0


_ANY: tuple[Condition, ...] = ()
_READ = Condition("with method={method}", lambda run: True)  # stands for `reads_setting`
_FILES = Condition("with data=digits", lambda run: run.data.data != "digits")
_HELPED = Condition(_FILES.words, lambda run: _FILES.holds(run) or _transforms_photographs(run.data))
_PADDED = Condition("with crop_scale", lambda run: run.data.crop_scale is None)
_MIXED = Condition("unless mix=cutmix or mix=mixup", lambda run: run.data.mix != "none")
_SEVERAL = Condition("unless exits is 2 or more", lambda run: run.fission.exits > 1)
_PRUNED = Condition("unless sparsity is above 0", lambda run: run.fission.sparsity > 0)
_SCORED = Condition(
    "unless sparsity is above 0 or assignment=importance",
    lambda run: run.fission.sparsity > 0 or run.fission.assignment == "importance",
)
_READS_BATCHES = Condition(
    f"unless criterion={' or criterion='.join(name for name in CRITERIA if CRITERIA[name].needs == 'data')}",
    lambda run: CRITERIA[run.fission.criterion].needs == "data",
)
_DIVIDED = Condition(
    "unless exits is 2 or more, or sparsity is above 0",
    lambda run: run.fission.exits > 1 or run.fission.sparsity > 0,
)
_SHARED_OUT = Condition("with grouping=copies", lambda run: run.fission.grouping != "copies")
_BY_WEIGHTS = Condition("unless grouping=weights", lambda run: run.fission.grouping == "weights")
_BY_CHANNELS = Condition("unless grouping=channels", lambda run: run.fission.grouping == "channels")
_TIMED = Condition("with budget_in=macs", lambda run: run.fission.budget_is_timed)
_COPIED = Condition("unless grouping=copies", lambda run: run.fission.grouping == "copies")
_MOMENTUM = Condition(
    "unless optimizer=sgd or another with momentum", lambda run: has_momentum(run.training.optimizer)
)
_SCHEDULED = Condition(
    "with method={method}, which has its own",
    lambda run: METHODS[run.method.method].follows_schedule,
)
_NO_RISE = Condition("with schedule=one_cycle", lambda run: run.training.schedule != "one_cycle")
_JOINT = Condition("with method={method}, which trains with one prediction per image", _joint)
_TOGETHER = Condition("with one_by_one", lambda run: not run.method.one_by_one)
_TAUGHT = Condition(_JOINT.words, lambda run: _joint(run) or _other_network_teaches(run))
_PREDICTIONS = Condition(_SEVERAL.words, lambda run: run.fission.predictions > 1)
_HAS_TEACHER = Condition(_SEVERAL.words, lambda run: _PREDICTIONS.holds(run) or _other_network_teaches(run))
_KNOWS_PARENT = Condition("unless weights is given", lambda run: run.model.weights is not None)
_NO_OTHER_PARENT = Condition(
    "with method={method}, which has its own teacher", lambda run: not _other_network_teaches(run)
)
_DISTILS = Condition("unless distillation_weight is above 0", lambda run: _weight(run) > 0)
_LINEAR = Condition("unless linear_exits are given", lambda run: run.fission.linear > 0)
_VALIDATED = Condition("unless validation is above 0", lambda run: run.data.validation > 0)
_WHOLE = Condition(
    "with method={method}, whose training must reach its end",
    lambda run: METHODS[run.method.method].may_stop_early,
)


def _or(holds: Callable[[RunConfig], bool], words: str = "") -> Callable[[Condition], Condition]:
    """Return the function that makes a condition hold in other runs as well, with words for a message."""
    return lambda condition: Condition(
        condition.words + words, lambda run: holds(run) or condition.holds(run)
    )


_or_parent = _or(lambda run: run.training.parent_weight > 0)
_or_fitted = _or(lambda run: bool(run.fission.reconstruct and run.fission.linear_exits))
_or_reconstruct = _or(lambda run: run.fission.reconstruct, ", or reconstruct is true")

# Setting → what must hold for it to have an effect. A method must also read what is part of `MethodConfig` or
# `FissionConfig`.
EFFECTS: Mapping[str, tuple[Condition, ...]] = {
    "data": _ANY,
    "task": _ANY,
    "void": _ANY,
    "image_size": _ANY,
    "mean": _ANY,
    "std": _ANY,
    "validation": _ANY,
    "limit_per_class": _ANY,
    "corrupt": (_FILES,),
    "crop_padding": (_PADDED,),
    "crop_scale": _ANY,
    "flip": _ANY,
    "rand_augment": _ANY,
    "color_jitter": _ANY,
    "erase": _ANY,
    "mix": _ANY,
    "mix_alpha": (_MIXED,),
    "label_smoothing": _ANY,
    "balance": _ANY,
    "workers": (_HELPED,),
    "model": _ANY,
    "pretrained": _ANY,
    "weights": _ANY,
    "exits": _ANY,
    "branch_after": (_SEVERAL,),
    "linear_exits": _ANY,
    "linear_weight": (_LINEAR,),
    "stages": _ANY,
    "grouping": (_or_fitted(_DIVIDED),),
    "keep_shortcuts": (_BY_WEIGHTS, _SEVERAL),
    "exact_partition": (_BY_CHANNELS, _SEVERAL),
    "budget": (_BY_CHANNELS, _SEVERAL),
    "budget_in": (_BY_CHANNELS, _SEVERAL),
    "budget_batch_size": (_BY_CHANNELS, _SEVERAL, _TIMED),
    "assignment": (_BY_CHANNELS, _SEVERAL),
    "overlap": (_BY_CHANNELS, _SEVERAL),
    "ratio": (_SEVERAL, _SHARED_OUT),
    "reconstruct": (_BY_CHANNELS, _or_fitted(_DIVIDED)),
    "copy_noise": (_COPIED, _SEVERAL),
    "sparsity": _ANY,
    "criterion": (_SCORED,),
    "pruning_steps": (_PRUNED,),
    "seed": _ANY,
    "method": _ANY,
    "alpha": _ANY,
    "branch_groups": _ANY,
    "cycling": _ANY,
    "dropout_layers": _ANY,
    "dropout_rate": _ANY,
    "gamma": _ANY,
    "generations": _ANY,
    "one_by_one": _ANY,
    "rank": _ANY,
    "regrow": _ANY,
    "regrow_every": _ANY,
    "regrow_share": _ANY,
    "repetitions": _ANY,
    "rho": _ANY,
    "scale": _ANY,
    "epochs": _ANY,
    "batch_size": _ANY,
    "optimizer": _ANY,
    "learning_rate": _ANY,
    "momentum": (_MOMENTUM,),
    "weight_decay": _ANY,
    "layer_decay": _ANY,
    "schedule": (_SCHEDULED,),
    "warmup": (_SCHEDULED, _NO_RISE),
    "temperature": tuple(map(_or_parent, (_TAUGHT, _TOGETHER, _HAS_TEACHER, _DISTILS))),
    "distillation_weight": (_TAUGHT, _TOGETHER, _HAS_TEACHER),
    "parent_weight": (_KNOWS_PARENT, _NO_OTHER_PARENT),
    "teacher": (_JOINT, _TOGETHER, _PREDICTIONS, _DISTILS),
    "reduction": (_JOINT, _TOGETHER, _PREDICTIONS),
    "pruning_batches": tuple(map(_or_reconstruct, (_SCORED, _READS_BATCHES))),
    "precision": _ANY,
    "channels_last": _ANY,
    "compile": _ANY,
    "accumulate": _ANY,
    "clip": _ANY,
    "ema": _ANY,
    "drop_path": _ANY,
    "patience": (_VALIDATED, _WHOLE, _TOGETHER),
    "accelerator": _ANY,
    "devices": _ANY,
    "machines": _ANY,
}

_READ_BY_METHODS = {setting.name for part in (FissionConfig, MethodConfig) for setting in fields(part)}
_OFF: Mapping[str, Any] = {
    "sparsity": 0,
    "distillation_weight": 0,
    "warmup": 0,
}  # values that ask for nothing


def unmet_condition(name: str, config: RunConfig) -> Condition | None:
    """Return the condition for which a setting has no effect on a run; None if it has one.

    Example:
        >>> unmet_condition("mix_alpha", RunConfig()).words
        'unless mix=cutmix or mix=mixup'
        >>> unmet_condition("mix_alpha", RunConfig.from_dict({"mix": "cutmix"}))
    """
    if name in _READ_BY_METHODS and not reads_setting(config.method.method, name):
        return _READ
    return next((condition for condition in EFFECTS[name] if not condition.holds(config)), None)


def check_effects(config: RunConfig, given: Iterable[str]) -> None:
    """Check that each setting that a user gave has an effect on the run.

    Args:
        config: all settings.
        given: names of those that the user gave. One that is None, or asks for nothing, is left out.

    Raises:
        ValueError: a setting has no effect beside the others.

    Example:
        >>> check_effects(RunConfig.from_dict({"exits": 1, "reduction": "mean"}), ["exits", "reduction"])
        Traceback (most recent call last):
        ValueError: reduction must be left out unless exits is 2 or more, got 'mean'
    """
    values = config.to_dict()
    for name in given:
        value = values[name]
        condition = None if value is None or value == _OFF.get(name) else unmet_condition(name, config)
        if condition is not None:
            raise invalid(name, f"left out {condition.words.format(method=config.method.method)}", value)


_OF_OPTIMIZER = ("learning_rate", "weight_decay")  # of a recipe, for its own optimiser alone


def with_recipe(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a user's settings, and below them those of a recipe that have an effect beside them.

    Args:
        name: of the recipe, see `netfission.config.RECIPES`.
        given: the user's settings.

    Raises:
        ValueError: the recipe does not exist, or the user's settings are not valid.

    Example:
        >>> settings = with_recipe("finetune", {"epochs": 3, "schedule": "one_cycle"})
        >>> settings["epochs"], settings["optimizer"], "warmup" in settings
        (3, 'adamw', False)
    """
    check_settings(RunConfig.from_dict(given))
    recipe = RECIPES[check_choice("recipe", name, RECIPES)]
    if given.get("optimizer", recipe["optimizer"]) != recipe["optimizer"]:
        recipe = {key: value for key, value in recipe.items() if key not in _OF_OPTIMIZER}
    settings = {**recipe, **given}
    config = RunConfig.from_dict(settings)
    return {key: value for key, value in settings.items() if key in given or not unmet_condition(key, config)}


def chosen(settings: Mapping[str, Any]) -> list[str]:
    """Return the names of the known settings that differ from their defaults.

    Example:
        >>> chosen({"exits": 3, "mix": "cutmix"})
        ['mix']
    """
    return [name for name, value in settings.items() if value != _DEFAULTS.get(name, value)]


_DEFAULTS = RunConfig().to_dict()
