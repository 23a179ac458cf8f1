"""From the settings of a fine-tuning to its two runs: the single network, and the ensemble made of it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netfission.classifier.folder import ModelFolder, has_description
from netfission.config import (
    ENSEMBLE_EPOCHS,
    FINETUNE_RECIPE,
    LINEAR_EXITS,
    OF_TRAINED_WEIGHTS,
    DataConfig,
    FissionConfig,
    RunConfig,
)
from netfission.data.load import common_size
from netfission.data.mask_data import fitted_size
from netfission.data.mask_folders import load_masks
from netfission.data.sources import Source, find_targets
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.effects import unmet_condition, with_recipe
from netfission.methods.registry import find_method
from netfission.models import create_model
from netfission.runs.folder import RunFolder, find_run_splits
from netfission.surgery.backbone import cut, late_branches
from netfission.surgery.example import input_size
from netfission.tasks import task_kind
from netfission.utils.errors import check_positive_integer, invalid
from netfission.utils.text import count_noun

# The settings that the single network does not have.
OF_ENSEMBLE = frozenset(
    {
        *({setting.name for setting in fields(FissionConfig)} - {"stages", "seed"}),
        *("temperature", "distillation_weight", "parent_weight", "teacher", "reduction", "pruning_batches"),
    }
)


_STEPS_PER_EPOCH = 8  # the best of 1 to 25 on held-out photographs, for 60 and for 200 training images
_MASKED_CHANNELS = 3  # of photographs with masks
_SMALLEST_BATCH = 8  # batch norms need several images


@dataclass(frozen=True)
class FinetunePlan:
    """The two runs of a fine-tuning.

    Attributes:
        single: settings of the single network.
        ensemble: settings of the ensemble, which starts from the single network.
        finetuned: whether the single network is fine-tuned already, and its weights are the result.
    """

    single: RunConfig
    ensemble: RunConfig
    finetuned: bool = False


def plan_finetuning(
    given: Mapping[str, Any],
    single: Path,
    *,
    recipe: str = FINETUNE_RECIPE,
    ensemble_epochs: int = ENSEMBLE_EPOCHS,
    finetuned: str | None = None,
) -> FinetunePlan:
    """Choose the settings of the two runs of a fine-tuning.

    Settings that are not given are those of the recipe, and of the ensemble `OF_TRAINED_WEIGHTS` in
    `netfission.config`. With few images, batches are smaller, see `batch_size`. Images have the size that the
    model is made for. Those of a network that is
    fine-tuned already are normalised as for that network, or as its model is made for. The network is divided
    if several exits are given, or where they leave. They leave late, and linear exits after the same stage.

    Args:
        given: the user's settings, by the names of `RunConfig`.
        single: folder of the single network, from which the ensemble starts.
        recipe: of both networks, see `netfission.config.RECIPES`.
        ensemble_epochs: epochs of the ensemble; those in `given` are of the single network.
        finetuned: file of the weights, or folder of the run, of a network that is fine-tuned already.

    Raises:
        ValueError: a setting is not valid, the data set cannot be used, the model is unknown or cannot be cut
            so, or there are no validation images to calibrate on.
        OSError: the data set does not exist.

    Example:
        >>> settings = {"data": "digits", "model": "wrn-10-1", "pretrained": False}
        >>> plan = plan_finetuning(settings, Path("run/single"))
        >>> plan.single.fission.linear_exits, plan.ensemble.fission.linear_exits
        (None, [2, 2])
        >>> plan_finetuning(settings | {"exits": 3}, Path("run/single")).ensemble.fission.branch_after
        [2, 2]
    """
    check_positive_integer("ensemble_epochs", ensemble_epochs)
    if given.get("validation") == 0:
        raise invalid("validation", "above 0, as the networks are calibrated on validation images", 0.0)
    run = None if finetuned is None else run_of(finetuned)
    common = _start(given, finetuned, run)
    of_single = {name: value for name, value in common.items() if name not in OF_ENSEMBLE}
    config = _with_recipe(recipe, of_single | {"exits": 1}, given)
    kind = task_kind(config.data.task)
    found = _find_images(config)
    if run is not None:
        _check_channels(run, found)
    if "batch_size" not in common:
        images = _training_images(config, found.source)
        common["batch_size"] = _begun_with(single) or batch_size(images, config.training.batch_size)
    model, shape = _model_and_shape(config, found)
    of_model = _of_model(model, shape, normalisation=finetuned is not None)
    data = config.to_dict() | {name: value for name, value in of_model.items() if common.get(name) is None}
    data["batch_size"] = common["batch_size"]
    config = RunConfig.from_dict(data)
    common |= {name: data[name] for name in of_model}
    defaults = {**OF_TRAINED_WEIGHTS, "exits": _exits(given)}
    settings = {**defaults, **common, "pretrained": False, "weights": str(single), "epochs": ensemble_epochs}
    settings |= _late_exits(settings, given, model, shape)
    settings = _without_vain_defaults(settings, given)
    ensemble = _with_recipe(recipe, settings, given)
    kind.check(ensemble)
    if ensemble.fission.exits + len(ensemble.fission.linear_exits or ()) == 1:
        raise invalid("linear_exits", "one or more unless exits is 2 or more", given["linear_exits"])
    return FinetunePlan(config, ensemble, finetuned is not None)


def _begun_with(single: Path) -> int | None:
    """Return the batch size of a fine-tuning that has begun; None if it has not.

    Earlier versions had one batch size for any number of images.
    """
    ensemble = RunFolder(single.parent)
    begun = single.name == ensemble.single.path.name and ensemble.config.is_file()
    return ensemble.load_config().training.batch_size if begun else None


def batch_size(images: int, largest: int) -> int:
    """Return a batch size that gives an epoch of few images several steps.

    Args:
        images: number of training images.
        largest: the batch size for many images.

    Returns:
        The largest of `largest`, its half, its quarter, … that gives 8 steps per epoch; about 8 if none does.

    Example:
        >>> [batch_size(images, largest=64) for images in (60, 200, 10_000)]
        [8, 16, 64]
    """
    size = largest
    while size > _SMALLEST_BATCH and images / size < _STEPS_PER_EPOCH:
        size //= 2
    return size


def check_ensemble(config: RunConfig) -> None:
    """Build an ensemble that starts from another run, from new weights, before that run is trained.

    What cannot be divided so is refused.

    Raises:
        ValueError: the network cannot be built.
    """
    check_division(config, *_model_and_shape(config, _find_images(config)))


def check_division(config: RunConfig, model: nn.Module, shape: Sequence[int]) -> None:
    """Build the network of a run from a single network with new weights, as if its weights were trained.

    Args:
        config: settings of the run. What is measured or reads data when it is built does not matter.
        model: the single network, on the CPU.
        shape: of an image: channels, height and width.

    Raises:
        ValueError: the network cannot be built.
    """
    fission = replace(
        config.fission,
        criterion="random",
        pruning_steps=None,
        assignment="random",
        reconstruct=False,
        budget=1.0 if config.fission.budget_is_timed else config.fission.budget,
        budget_in="macs",  # a time is measured when the ensemble is built, on the device that it runs on
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the training says the same
        plan = BuildPlan(lambda _: model, fission, torch.zeros(2, *shape), trained=True)
        find_method(config.method).build(plan)


def _start(given: Mapping[str, Any], finetuned: str | None, run: ModelFolder | None) -> dict[str, Any]:
    """Return the settings that are given, with those of what the single network starts from."""
    if finetuned is None:
        return {"pretrained": given.get("weights") is None, **given}
    for name in ("weights", "pretrained", "epochs"):
        if name in given:
            hint = "the single network is not trained"
            raise invalid(name, "left out with finetuned", given[name], hint=hint)
    if run is None:
        _check_normalisation(finetuned, given)
        return {**given, "weights": finetuned, "pretrained": False}
    of_run = _of_run(run, given.get("task", DataConfig().task))
    for name in ("mean", "std"):
        trained, now = of_run[name], given.get(name, of_run[name])
        if trained != now:
            warnings.warn(
                f"{finetuned} was trained on images normalised by {name}={trained}, not {name}={now}",
                stacklevel=3,
            )
    return {**of_run, **given, "weights": finetuned, "pretrained": False}


def _with_recipe(name: str, settings: Mapping[str, Any], given: Mapping[str, Any]) -> RunConfig:
    """Return settings above those of a recipe, of which those without a meaning for the task are left out."""
    unused = task_kind(settings.get("task", DataConfig().task)).unused
    values = with_recipe(name, settings)
    return RunConfig.from_dict(
        {name: value for name, value in values.items() if name in given or name not in unused}
    )


def run_of(finetuned: str) -> ModelFolder | None:
    """Return the folder of a run, also of its file of weights; None for another file of weights."""
    path = Path(finetuned)
    return ModelFolder(path) if path.is_dir() else ModelFolder.of_weights(path)


def _check_normalisation(finetuned: str, given: Mapping[str, Any]) -> None:
    """Refuse the weights of a run without its description, as images would get another scale."""
    if has_description(Path(finetuned)) and None in (given.get("mean"), given.get("std")):
        raise invalid(
            "finetuned",
            "the folder of its run, which tells how images are normalised",
            found=f"{finetuned}, a copy of its weights alone",
            hint="or give mean and std, as in the config.json of that folder",
        )


def _of_run(run: ModelFolder, task: str) -> dict[str, Any]:
    """Return the model of a run, and the size and normalisation of its images.

    Raises:
        ValueError: it is a run of another task.
    """
    spec = run.load_spec(any_task=True)
    if spec.task != task:
        raise invalid("finetuned", f"a network of task={task}", found=f"{run.path} of task={spec.task}")
    sides = spec.shape[1:]
    is_shorter_side = spec.find_task().targets.masks
    size = min(sides) if is_shorter_side or sides[0] == sides[1] else None
    return {"model": spec.model, "image_size": size, "mean": spec.mean, "std": spec.std}


@dataclass(frozen=True)
class _Images:
    """A data set before its images are read.

    Attributes:
        names: of the classes, or of other targets.
        channels: of the images.
        size: setting `image_size` → height and width of the images.
        source: the data set, unless it is a folder of masks.
    """

    names: Sequence[str]
    channels: int
    size: Callable[[int | None], tuple[int, int]]
    source: Source | None = None


def _find_images(config: RunConfig) -> _Images:
    """Find the images of a run."""
    data, targets = config.data, task_kind(config.data.task).targets
    if targets.masks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what loads the images says the same
            masks = load_masks(data.data, void=data.void, memory_limit=0)
        return _Images(masks.classes, _MASKED_CHANNELS, partial(fitted_size, masks))
    source = find_targets(data.data, targets)
    records = source.train

    def size(side: int | None) -> tuple[int, int]:
        return common_size(records, data.data) if side is None else (side, side)

    return _Images(source.classes, len(records.mode), size, source)


def _check_channels(run: ModelFolder, images: _Images) -> None:
    """Refuse the network of a run for images of other channels."""
    channels, wanted = run.load_spec(any_task=True).shape[0], images.channels
    if channels != wanted:
        expected = f"a network for images of {count_noun(wanted, 'channel')}, as these have"
        raise invalid("finetuned", expected, found=f"{run.path}, for {count_noun(channels, 'channel')}")


def _of_model(model: nn.Module, shape: tuple[int, int, int], *, normalisation: bool) -> dict[str, Any]:
    """Return the size, and the normalisation if it is asked for, of the images that a model is made for."""
    made_for: dict[str, Any] = {}
    if input_size(model) is not None:
        made_for["image_size"] = min(shape[1:])
    settings = getattr(model, "pretrained_cfg", None) or {}
    for name in ("mean", "std") if normalisation else ():
        if len(values := settings.get(name, ())) == shape[0]:
            made_for[name] = list(values)
    return made_for


def _training_images(config: RunConfig, source: Source | None) -> int:
    """Return the number of training images, readable or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what loads the images says the same
        splits = find_run_splits(config, source)
    return len(splits["train"].rows)


def _model_and_shape(config: RunConfig, images: _Images) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return the single network with new weights, and the shape of its images.

    Unless the settings have a size, it is that of a model that is made for one, or else the images' own.
    """
    task = task_kind(config.data.task)(images.names)
    create = partial(create_model, config.model.model, task.outputs, in_channels=images.channels)
    model = call_with_seed(create, config.fission.seed)
    size, made_for = config.data.image_size, input_size(model)
    if size is None and made_for is not None:
        size = made_for[1]
    shape = (images.channels, *images.size(size))
    task.check_model(config.model.model, model, shape)
    return model, shape


def _exits(given: Mapping[str, Any]) -> int:
    """Return the number of exits beside the linear ones: by branch points or shares if given, else one."""
    points, shares = given.get("branch_after"), given.get("ratio")
    if isinstance(points, list):
        return len(points) + 1
    if shares is not None:
        return len(shares)
    return FissionConfig().exits if points is not None else 1


def _without_vain_defaults(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ensemble's settings without the defaults that have no effect beside those given."""
    if settings["grouping"] != "channels":
        settings = {name: value for name, value in settings.items() if name != "reconstruct"}
    if settings["exits"] > 1 and "linear_weight" not in given:  # beside paths, linear exits are about as good
        settings = {name: value for name, value in settings.items() if name != "linear_weight"}
    config = RunConfig.from_dict(settings)
    return {
        name: value
        for name, value in settings.items()
        if name in given or name not in OF_TRAINED_WEIGHTS or not unmet_condition(name, config)
    }


def _late_exits(
    settings: Mapping[str, Any],
    given: Mapping[str, Any],
    model: nn.Module,
    shape: tuple[int, int, int],
) -> dict[str, Any]:
    """Return the late branch points and linear exits, unless they are given."""
    exits = settings.get("exits", 1)
    names = cut(model, torch.zeros(2, *shape), settings.get("stages"), exits).stage_names
    late = {
        "branch_after": late_branches(exits, names),
        "linear_exits": [max(1, len(names) - 1)] * LINEAR_EXITS,
    }
    if exits == 1:
        del late["branch_after"]
    return {name: value for name, value in late.items() if given.get(name) is None}
