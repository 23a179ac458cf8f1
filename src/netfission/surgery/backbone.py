"""Cut any traceable classifier of images, or of their pixels, into stem → stages → head.

A *cut* is a point of the forward pass after which only one tensor is live, or several if a model has too few
such points. The model is traced twice with torch.fx. The first trace goes into every module, to find the
cuts. The second goes only as deep as the chosen cuts need, so that everything between them runs as the
model's own modules, in train or eval mode.
"""

import copy
import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from netfission.surgery.features import Features, map_tensors, tensors_of
from netfission.surgery.masks import prunable_weights
from netfission.surgery.one_input import with_one_input
from netfission.surgery.plain import check_plain, logits_hint
from netfission.surgery.splitting import not_a_classifier, split
from netfission.surgery.stages import FEWEST, find_stages
from netfission.surgery.tracing import MAIN_OUTPUT, attempts
from netfission.utils.errors import describe, first_line, invalid
from netfission.utils.inputs import Inputs, as_inputs, cloned, map_inputs, row_count, tensors_in
from netfission.utils.modes import in_mode, input_errors, trial_copy
from netfission.utils.seeds import seeded

_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")  # attributes that turn it on
_OWN_PARTS = "a netfission.Backbone of your own parts"


class Backbone(nn.Module):
    """A classifier of images, or of their pixels, as a sequence `stem → stages → head`, run in turn.

    `cut` makes one from a model. A model that cannot be traced can be passed to `fission` as a Backbone of
    its parts. Parts that `cut` makes keep parameter names: `layer1.0.conv1.weight` of the model is
    `layer1.0.conv1.weight` of the part that holds it.

    Attributes:
        stem: images → features; what comes before the first stage.
        stages: modules, each of which reads only the output of the one before: a tensor, or a tuple of
            tensors, each with the batch first.
        head: features of the last stage → logits `(batch, classes)`, or `(batch, classes, height, width)`.
        stage_names: a name for each stage; `cut` takes the name of the module that ends the stage.

    Example:
        >>> stem = nn.Conv2d(3, 8, 3, padding=1)
        >>> stages = [nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2)]
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        >>> backbone = Backbone(stem, stages, head, ["first", "second"])
        >>> backbone(torch.zeros(4, 3, 16, 16)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        head: nn.Module,
        stage_names: Sequence[str],
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.head = head
        self.stage_names = tuple(stage_names)
        self.training = any(part.training for part in (stem, *stages, head))

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(batch, channels, height, width)` to logits `(batch, classes)`."""
        features = self.stem(images)
        for stage in self.stages:
            features = stage(features)
        logits: Tensor = self.head(features)
        return logits


def resolve_branches(
    branch_after: Sequence[int | str] | Literal["late"] | None, exits: int, stage_names: Sequence[str]
) -> list[int]:
    """Return how many stages each exit but exit 0 shares with exit 0.

    Args:
        branch_after: one stage per exit but exit 0, by name or 1-based number, or "late", see
            `late_branches`; default 1, 2, …. In a network of two stages, three exits share the branch point.
        exits: number of exits.
        stage_names: names of the backbone's stages, in the order they run.

    Raises:
        ValueError: there are too few stages, or `branch_after` is not such a list.

    Example:
        >>> resolve_branches(["layer1", 3], exits=3, stage_names=["layer1", "layer2", "layer3", "layer4"])
        [1, 3]
    """
    last = len(stage_names) - 1
    if branch_after == "late" or (branch_after and last == 0 and exits > 1):
        return late_branches(exits, stage_names)
    if branch_after is None:
        if exits - 1 > last and not (last and exits <= FEWEST):
            raise invalid(
                "exits",
                f"at most {last + 1}, one per stage ({', '.join(stage_names)})",
                exits,
                hint="name more stages (stages=[…])"
                + (" or let exits share a branch point (branch_after=[…])" if last else ""),
            )
        return [min(branch, last) for branch in range(1, exits)]
    branches = _stage_numbers(branch_after, stage_names)
    if len(branches) != exits - 1 or not all(branch in range(1, last + 1) for branch in branches):
        names = f" or one of {', '.join(stage_names[:-1])}" if last else ""
        raise invalid(
            "branch_after", f"{exits - 1} stages, each a number from 1 to {last}{names}", list(branch_after)
        )
    return branches


def late_branches(exits: int, stage_names: Sequence[str]) -> list[int]:
    """Return branch points that leave most of a trained network whole: after the last stage but one.

    Args:
        exits: number of exits.
        stage_names: names of the backbone's stages, in the order they run.

    Returns:
        One stage per exit but exit 0, by its 1-based number.

    Raises:
        ValueError: several exits of a network of one stage, which has no branch point.

    Example:
        >>> late_branches(exits=3, stage_names=["layer1", "layer2", "layer3", "layer4"])
        [3, 3]
    """
    last = len(stage_names) - 1
    if exits > 1 and not last:
        expected = f"1 for a network of one stage ({stage_names[0]}), which no exit can leave earlier"
        raise invalid("exits", expected, exits, hint="name more stages (stages=[…])")
    return [last] * (exits - 1)


def resolve_linear_exits(linear_exits: Sequence[int | str] | None, stage_names: Sequence[str]) -> list[int]:
    """Return how many stages each linear exit shares with exit 0.

    Args:
        linear_exits: one stage per linear exit, by name or 1-based number; none by default.
        stage_names: names of the backbone's stages, in the order they run.

    Raises:
        ValueError: there is no such stage.

    Example:
        >>> resolve_linear_exits(["layer2", 1], stage_names=["layer1", "layer2"])
        [2, 1]
    """
    found = _stage_numbers(linear_exits or (), stage_names)
    if not all(number in range(1, len(stage_names) + 1) for number in found):
        expected = f"stages, each a number from 1 to {len(stage_names)} or one of {', '.join(stage_names)}"
        raise invalid("linear_exits", expected, list(linear_exits or ()))
    return found


def _stage_numbers(stages: Sequence[int | str], stage_names: Sequence[str]) -> list[int]:
    """Return the 1-based numbers of stages; 0 for an unknown name."""
    numbers = {name: number for number, name in enumerate(stage_names, start=1)}
    return [
        numbers.get(stage, 0) if isinstance(stage, str) else int(stage) if isinstance(stage, Integral) else 0
        for stage in stages
    ]


def cut(
    model: nn.Module, example_input: Inputs, stages: Sequence[str] | None = None, exits: int = 1
) -> Backbone:
    """Cut a copy of `model` into stem, stages and head.

    By default, a stage ends where the spatial size of the features changes: `layer1` … `layer4` of a
    ResNet. The equal blocks of a vision transformer or mixer are divided into three equal groups, or
    `exits` if that is more. What comes before the first stage is the stem. See
    `netfission.surgery.stages.find_stages`.

    Args:
        model: images → logits `(batch, classes)`, or `(batch, classes, height, width)` for pixels, or a
            dictionary with these logits as `"out"`; not changed. See `with_one_input` for other inputs.
        example_input: images `(batch, channels, height, width)` on the model's device, or other inputs.
        stages: names of the modules that end the stages, in the order they run; default found as above.
        exits: number of exits that the stages are for.

    Returns:
        A backbone whose output equals the model's bit for bit, checked in train and in eval mode. None of
        its stages overwrites its input. Auxiliary heads, which run in train mode only or give other entries
        of a dictionary, are left out. A network of maps may read the size of its images: it goes for images
        of other sizes, too, unless its code branches on shapes.

    Warns:
        UserWarning: the model has auxiliary heads.

    Raises:
        ValueError: the model cannot be traced, a name is unknown or does not end a stage, or the output of
            the cut model differs from the model's. The message says what to pass instead.

    Example:
        >>> from netfission.models import create_model
        >>> backbone = cut(create_model("wrn-10-1", 10), torch.zeros(1, 3, 32, 32))
        >>> backbone.stage_names
        ('block1', 'block2', 'bn')
    """
    check_plain("model", model)
    example_input = as_inputs("example_input", example_input)
    if row_count(example_input) == 1:  # batch norm on 1 × 1 features needs two values to train
        example_input = map_inputs(lambda tensor: torch.cat([tensor, tensor.flip(-1)]), example_input)
    if not isinstance(model, Backbone):
        model = with_one_input(model, example_input)
    with input_errors("example_input", example_input):
        trial = trial_copy(model)
        output = _run(trial, example_input, training=False)
    main = main_output(output.output) if isinstance(output.output, dict) else output.output
    _check_logits(model, main, training=False)
    if main is not output.output:
        _warn_of_auxiliary_heads([name for name in output.output if name != MAIN_OUTPUT])
    root = copy.deepcopy(model)
    if isinstance(root, Backbone):
        if stages is not None:
            raise invalid("stages", "None for a Backbone, which has its own", list(stages))
        return _checked(root, root, example_input, {False: output, True: _run(trial, example_input, True)})
    with input_errors("example_input", example_input):
        in_training = _run(trial, example_input, training=True)
    if not isinstance(in_training.output, Tensor | dict):
        _warn_of_auxiliary_heads(_drop_auxiliary_heads(root, example_input))
        in_training = _run(trial_copy(root), example_input, training=True)
    with _without_checkpointing(root):
        return _cut_copy(root, example_input, {False: output, True: in_training}, stages, exits)


@dataclass(frozen=True)
class _Result:
    """What a network returned, and the state of Python's global generator afterwards."""

    output: Any
    drawn: object


_Results = Mapping[bool, _Result]  # whether in train mode → of the model, for the example images


def checkpointed(network: nn.Module) -> list[nn.Module]:
    """Return the modules in which timm's or Hugging Face's gradient checkpointing is on."""
    names = _CHECKPOINTING
    return [part for part in network.modules() if any(getattr(part, name, None) is True for name in names)]


@contextmanager
def _without_checkpointing(root: nn.Module) -> Iterator[None]:
    """Turn gradient checkpointing off: code that runs blocks by functions hides them from a trace.

    At the end it is on again in the modules that stay whole.
    """
    on = [
        (part, name)
        for part in checkpointed(root)
        for name in _CHECKPOINTING
        if getattr(part, name, None) is True
    ]
    for part, name in on:
        setattr(part, name, False)
    try:
        yield
    finally:
        for part, name in on:
            setattr(part, name, True)


def _cut_copy(
    root: nn.Module, example_input: Inputs, outputs: _Results, stages: Sequence[str] | None, exits: int
) -> Backbone:
    try:
        names = find_stages(root, example_input, exits) if stages is None else list(stages)
    except Exception as error:  # a user's model may raise anything while it is traced
        raise _untraceable(root, error) from error
    if not names and stages is None:
        others = stages_of_layers(root, example_input, _of_several_layers)
        others = others or stages_of_layers(root, example_input)
        raise invalid(
            "model",
            "a network in which stages are found",
            found=f"{type(root).__name__} without any",
            hint=(f"pass stages={others!r}, or " if others else "pass ") + _OWN_PARTS,
        )
    modules = dict(root.named_modules())
    unknown = [name for name in names if name not in modules or not name]
    if unknown or not names or len(set(names)) < len(names):
        hint = f"there is no {unknown[0]!r}, {_offer(root, example_input)}" if unknown else ""
        raise invalid("stages", f"distinct names of modules of {type(root).__name__}", names, hint=hint)
    offer = (lambda: "") if stages is None else cache(partial(_offer, root, example_input))
    ways = [cache(attempt) for attempt in attempts(root, example_input, names)]
    refused: list[ValueError] = []
    untraceable: list[ValueError] = []
    for several, way in itertools.product((False, True), ways):
        try:
            tracer, graph = way()
        except Exception as error:  # a user's model may raise anything while it is traced
            untraceable.append(_untraceable(root, error))
            continue
        try:
            stem, *parts, head = split(root, tracer, graph, names, offer, several=several)
            return _checked(root, Backbone(stem, parts, head, names), example_input, outputs)
        except ValueError as error:
            refused.append(error)
    raise refused[-1] if refused else untraceable[0]


def stages_of_layers(
    model: nn.Module, example_input: Inputs, accept: Callable[[Backbone], bool] = lambda backbone: True
) -> list[str]:
    """Return names of single layers that can end two or three stages; none if there are no such layers.

    Args:
        model: the model.
        example_input: images `(batch, channels, height, width)`.
        accept: returns whether the stages of a cut model will do.
    """
    layers = [name for name, part in model.named_modules() if name and _is_layer(part)][:-1]  # not the head
    for count in range(min(FEWEST, len(layers)), 1, -1):
        names = [layers[(index + 1) * len(layers) // count - 1] for index in range(count)]
        with suppress(ValueError):  # one cannot end a stage
            if accept(cut(model, example_input, names)):
                return names
    return []


def _of_several_layers(backbone: Backbone) -> bool:
    """Return whether the stages but the first have inner channels, so that every grouping divides them."""
    return all(len(prunable_weights(stage)) > 1 for stage in backbone.stages[1:])


def _is_layer(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and bool(prunable_weights(module))


def _offer(model: nn.Module, example_input: Inputs) -> str:
    """Return what a message says of names that can be passed as stages: those that were tried and work."""
    try:
        return f"try {list(cut(model, example_input).stage_names)!r}"
    except ValueError:
        return f"pass {_OWN_PARTS}"


def _untraceable(root: nn.Module, error: Exception) -> ValueError:
    return invalid(
        "model",
        "traceable by torch.fx",
        found=f"{type(root).__name__} ({first_line(error)})",
        hint=f"pass stages=[names of its modules], so that less of it is traced, or {_OWN_PARTS}",
    )


def _checked(model: nn.Module, backbone: Backbone, example_input: Inputs, outputs: _Results) -> Backbone:
    """Return a backbone that is safe to divide, and repeats the model's output."""
    _check_has_classifier(model, backbone, example_input)
    _check_not_shared(backbone)
    _keep_inputs(backbone, example_input)
    _check_same_output(model, backbone, example_input, outputs)
    return backbone


def _drop_auxiliary_heads(model: nn.Module, example_input: Inputs) -> list[str]:
    """Replace the modules that run in train mode only, whose outputs a model adds to its logits.

    Returns:
        Their names.
    """
    in_eval_mode = _modules_run(model, example_input, training=False)
    heads: list[str] = []
    for name in _modules_run(model, example_input, training=True):
        if name not in in_eval_mode and not any(name.startswith(f"{head}.") for head in heads):
            heads.append(name)
            model.set_submodule(name, nn.Identity())
    return heads


def _warn_of_auxiliary_heads(names: Sequence[str]) -> None:
    if names:
        listed = ", ".join(names)
        warnings.warn(
            f"the model's auxiliary heads ({listed}) are left out: exits replace them", stacklevel=3
        )


def _modules_run(model: nn.Module, example_input: Inputs, training: bool) -> list[str]:
    """Return the names of the modules that run, in the order they start."""
    ran: list[str] = []
    trial = trial_copy(model)
    for name, module in trial.named_modules():
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: ran.append(name))
    _run(trial, example_input, training)
    return ran


def main_output(output: Any) -> Any:
    """Return the logits of an output that may hold those of auxiliary heads too.

    Example:
        >>> main_output({"out": 1, "aux": 2}), main_output((1, 2)), main_output(1)
        (1, 1, 1)
    """
    if isinstance(output, tuple | list) and output:
        return output[0]
    return output.get(MAIN_OUTPUT, output) if isinstance(output, dict) else output


def _check_has_classifier(model: nn.Module, backbone: Backbone, images: Inputs) -> None:
    """Refuse a feature extractor, whose features would be taken for logits.

    It is one if timm says so, or if the head has no layer with a weight matrix and the last parameters that
    are used belong to a normalisation layer. A convolution at the end may be a classifier.
    """
    find_classifier = getattr(model, "get_classifier", None)  # of timm's models
    if getattr(model, "num_classes", None) == 0 and callable(find_classifier):
        is_extractor = isinstance(find_classifier(), nn.Identity)
    else:
        is_extractor = not _has_matrix(backbone.head) and not _has_matrix(_last_layer(backbone, images))
    if is_extractor:
        raise invalid(
            "model",
            "a classifier",
            found=f"{type(model).__name__} that ends without a classifying layer",
            hint="give it one (num_classes=N), or end the stages before that layer (stages=[…])",
        )


def _has_matrix(module: nn.Module | None) -> bool:
    """Whether a layer has a weight as linear layers and convolutions have."""
    return module is not None and any(parameter.ndim > 1 for parameter in module.parameters())


def _last_layer(backbone: Backbone, images: Inputs) -> nn.Module | None:
    """Return the module without children that used parameters last."""
    used: list[nn.Module] = []
    layers = (module for module in backbone.modules() if not any(True for _ in module.children()))
    hooks = [
        layer.register_forward_hook(lambda module, *_: used.append(module))
        for layer in layers
        if any(True for _ in layer.parameters())
    ]
    try:
        with torch.no_grad(), in_mode(backbone, training=False):
            backbone(cloned(images))
    finally:
        for hook in hooks:
            hook.remove()
    return used[-1] if used else None


def _check_not_shared(backbone: Backbone) -> None:
    """Check that no parameter or buffer is used in two parts."""
    owner: dict[int, str] = {}
    parts = [backbone.stem, *backbone.stages, backbone.head]
    for label, part in zip(["stem", *backbone.stage_names, "head"], parts, strict=True):
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            if owner.setdefault(id(tensor), label) != label:
                raise invalid(
                    "stages",
                    "such that each parameter is used in one stage",
                    found=f"{name!r}, used in {owner[id(tensor)]!r} and in {label!r}",
                    hint="untie it (a copy for each use), or end the stages so that one holds both uses",
                )


@torch.no_grad()
def _keep_inputs(backbone: Backbone, example_input: Inputs) -> None:
    """Make each stage that overwrites its input (with an in-place activation) copy it first.

    Several paths may read that input.
    """
    device = tensors_in(example_input)[0].device
    trial = trial_copy(backbone).train()  # dropout overwrites in train mode only
    with _seeded_python(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        features = trial.stem(cloned(example_input))
        for name, stage, original in zip(backbone.stage_names, trial.stages, backbone.stages, strict=True):
            tensors = _tensors(features, name, row_count(example_input))
            versions = [tensor._version for tensor in tensors]
            result = stage(features)
            if [tensor._version for tensor in tensors] != versions:
                _copy_input(original, several=isinstance(features, tuple))
            features = result


def _tensors(features: Any, stage: str, batch: int) -> tuple[Tensor, ...]:
    """Return the tensors that a stage reads, if several each with a row per image."""
    tensors = tensors_of(features)
    for tensor in tensors:
        is_tensor = isinstance(tensor, Tensor)
        if not is_tensor or (len(tensors) > 1 and tensor.shape[:1] != (batch,)):
            found = describe(tensor) if is_tensor else type(tensor).__name__
            expected = "modules that pass on tensors with a row per image"
            raise invalid("stages", expected, found=f"{stage!r}, which reads {found}")
    return tensors


def _copy_input(stage: nn.Module, *, several: bool) -> None:
    if not isinstance(stage, fx.GraphModule):
        stage.register_forward_pre_hook(_clone)
        return
    (features,) = (node for node in stage.graph.nodes if node.op == "placeholder")  # keeps no hooks in copies
    for tensor in list(features.users) if several else [features]:
        with stage.graph.inserting_after(tensor):
            clone = stage.graph.call_method("clone", (tensor,))
        tensor.replace_all_uses_with(clone, delete_user_cb=lambda user, clone=clone: user is not clone)
    stage.recompile()


def _clone(_stage: nn.Module, inputs: tuple[Features]) -> Features:
    return map_tensors(Tensor.clone, inputs[0])


def _check_same_output(
    model: nn.Module, backbone: Backbone, example_input: Inputs, outputs: _Results
) -> None:
    """Check that the backbone repeats the model's logits in both modes, and what it draws at random."""
    trial = trial_copy(backbone)
    for training, result in outputs.items():
        expected = main_output(result.output)
        _check_logits(model, expected, training)
        if isinstance(expected, Tensor) and expected.isnan().any():
            found = f"{type(model).__name__} with NaN in {_mode(training)}"
            hint = "its weights may be damaged, or too large"
            raise invalid("model", "a network whose outputs are numbers", found=found, hint=hint)
        repeated = _run(trial, example_input, training)
        logits = repeated.output
        if result.drawn != repeated.drawn:
            found = f"{type(model).__name__}, which draws from Python's random in {_mode(training)}"
            hint = f"draw within a block that runs, or is skipped, as a whole, or pass {_OWN_PARTS}"
            raise invalid(
                "model", "independent of random numbers outside its modules", found=found, hint=hint
            )
        if not isinstance(logits, Tensor) or not torch.equal(expected, logits):
            if expected is not result.output:
                kind = type(result.output).__name__
                hint = logits_hint(result.output)
                if hasattr(model, "set_distilled_training"):  # of timm
                    hint = "call model.set_distilled_training(False)"
                raise not_a_classifier(model, f"{kind} in train mode alone", hint)
            raise invalid(
                "model",
                "independent of mode and data outside its modules",
                found=f"{type(model).__name__}, whose traced forward pass differs in {_mode(training)}",
                hint=f"move what depends on them into modules, or pass {_OWN_PARTS}",
            )


def _check_logits(model: nn.Module, output: Any, training: bool) -> None:
    """Check that an output is logits `(batch, classes[, height, width])` of two classes or more."""
    if not isinstance(output, Tensor):
        hint = _features_hint(model) or logits_hint(output)
        raise not_a_classifier(model, f"{type(output).__name__} in {_mode(training)}", hint)
    if output.ndim not in (2, 4) or (output.ndim == 4 and _features_hint(model)):
        found = f"shape {tuple(output.shape)} in {_mode(training)}"
        raise not_a_classifier(model, found, _features_hint(model))
    if output.shape[1] < 2:
        raise invalid(
            "model",
            "a classifier of two classes or more",
            found=f"{type(model).__name__} with one logit per {'image' if output.ndim == 2 else 'pixel'}",
            hint="give a binary classifier two logits, a regression a mean and the logarithm of a variance",
        )


def _features_hint(model: nn.Module) -> str:
    """Say how to make a model of timm with a classifier, if it was made without one."""
    extracts = hasattr(model, "feature_info") and not hasattr(model, "get_classifier")  # features_only
    if not extracts and getattr(model, "num_classes", None) != 0:
        return ""
    return "it has no classifying layer: make it with num_classes=N, and without features_only"


def _mode(training: bool) -> str:
    return "train mode" if training else "eval mode"


@torch.no_grad()
def _run(trial: nn.Module, images: Inputs, training: bool) -> _Result:
    """Run a copy of a network with all generators seeded; they are restored at the end.

    The same copy runs in eval mode first, which leaves its buffers as they are, and then in train mode.
    """
    with _seeded_python(), seeded(0, tensors_in(images)[0].device):
        output = trial.train(training)(cloned(images))
        return _Result(output, random.getstate())


@contextmanager
def _seeded_python() -> Iterator[None]:
    """Seed Python's global generator, and restore it at the end."""
    before = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(before)
