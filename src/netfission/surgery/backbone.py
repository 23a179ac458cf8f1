"""Cut any traceable classifier into stem → stages → head.

A *cut* is a point of the forward pass after which only one tensor is live. The model is traced twice with
torch.fx. The first trace goes into every module, to find the cuts. The second goes only as deep as the
chosen cuts need, so that everything between them runs as the model's own modules, in train or eval mode.
"""

import copy
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from netfission.surgery.masks import prunable_weights
from netfission.surgery.plain import check_plain, logits_hint
from netfission.utils.errors import first_line, invalid
from netfission.utils.modes import in_mode, input_errors

_OWN_PARTS = "a netfission.Backbone of your own parts"


class Backbone(nn.Module):
    """A classifier as a sequence `stem → stages → head`; calling it runs them in turn.

    `cut` makes one from a model. A model that cannot be traced can be passed to `fission` as a Backbone of
    its parts. Parts that `cut` makes keep parameter names: `layer1.0.conv1.weight` of the model is
    `layer1.0.conv1.weight` of the part that holds it.

    Attributes:
        stem: images → features; what comes before the first stage.
        stages: modules, each of which reads only the output of the one before.
        head: features of the last stage → logits `(batch, classes)`.
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
    branch_after: Sequence[int | str] | None, exits: int, stage_names: Sequence[str]
) -> list[int]:
    """Return how many stages each exit but exit 0 shares with exit 0.

    Args:
        branch_after: one stage per exit but exit 0, by name or 1-based number; default 1, 2, ….
        exits: number of exits.
        stage_names: names of the backbone's stages, in the order they run.

    Raises:
        ValueError: there are too few stages, or `branch_after` is not such a list.

    Example:
        >>> resolve_branches(["layer1", 3], exits=3, stage_names=["layer1", "layer2", "layer3", "layer4"])
        [1, 3]
    """
    last = len(stage_names) - 1
    if branch_after is None:
        if exits - 1 > last:
            raise invalid(
                "exits",
                f"at most {last + 1}, one per stage ({', '.join(stage_names)})",
                exits,
                hint="name more stages (stages=[…]) or let exits share a branch point (branch_after=[…])",
            )
        return list(range(1, exits))
    numbers = {name: number for number, name in enumerate(stage_names, start=1)}
    branches = [numbers.get(stage, 0) if isinstance(stage, str) else stage for stage in branch_after]
    if len(branches) != exits - 1 or not all(branch in range(1, last + 1) for branch in branches):
        names = f" or one of {', '.join(stage_names[:-1])}" if last else ""
        raise invalid(
            "branch_after", f"{exits - 1} stages, each a number from 1 to {last}{names}", list(branch_after)
        )
    return branches


def cut(model: nn.Module, example_input: Tensor, stages: Sequence[str] | None = None) -> Backbone:
    """Cut a copy of `model` into stem, stages and head.

    By default, cuts are grouped by the spatial size of their tensor, and a stage ends at the outermost,
    latest module of each size: `layer1` … `layer4` of a ResNet. A part without convolution or linear
    layer joins the next stage. If the first part has only one such layer, it is the stem.

    Args:
        model: images → logits `(batch, classes)`; not changed.
        example_input: images `(batch, channels, height, width)` on the model's device.
        stages: names of the modules that end the stages, in the order they run; default found as above.

    Returns:
        A backbone whose output equals the model's bit for bit, checked in train and in eval mode. None of
        its stages overwrites its input.

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
    if example_input.shape[0] == 1:  # batch norm on 1 × 1 features needs two values to train
        example_input = torch.cat([example_input, example_input.flip(-1)])
    with input_errors("example_input", example_input):
        output = _run(model, example_input, training=False)
    _check_logits(model, output, training=False)
    if isinstance(model, Backbone):
        if stages is not None:
            raise invalid("stages", "None for a Backbone, which has its own", list(stages))
        backbone = copy.deepcopy(model)
    else:
        backbone = _cut_copy(copy.deepcopy(model), example_input, stages)
    _check_has_classifier(model, backbone, example_input)
    _check_not_shared(backbone)
    _keep_inputs(backbone, example_input)
    _check_same_output(model, backbone, example_input)
    return backbone


def _cut_copy(root: nn.Module, example_input: Tensor, stages: Sequence[str] | None) -> Backbone:
    names = _find_stages(root, example_input) if stages is None else list(stages)
    modules = dict(root.named_modules())
    unknown = [name for name in names if name not in modules or not name]
    if unknown or not names or len(set(names)) < len(names):
        hint = f"there is no {unknown[0]!r}, try {_suggestion(root, example_input)}" if unknown else ""
        raise invalid("stages", f"distinct names of modules of {type(root).__name__}", names, hint=hint)
    return _split(root, names, example_input)


class ModuleTracer(fx.Tracer):
    """A tracer that stops at some modules, and stores where each module starts and ends.

    With `ends`, it traces into modules that contain one of these, and into no others. Without, it traces
    into every module with two exceptions. Modules that own parameters or buffers beside children are not
    traced, since the trace would freeze their mode (timm's `BatchNormAct2d`). Modules that cannot be
    traced, such as those whose forward pass depends on the data, stay whole.
    """

    def __init__(self, ends: Sequence[str] | None = None) -> None:
        super().__init__()
        self._inside = ends and {name[:dot] for name in ends for dot in range(len(name)) if name[dot] == "."}
        self.first: dict[str, fx.Node] = {}  # module name → the node it reads
        self.last: dict[str, fx.Node] = {}  # module name → the node it returns
        self.called_again: set[str] = set()  # modules that run more than once

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module stays whole."""
        if self._inside is not None:
            return module_qualified_name not in self._inside
        tensors = [*m._parameters.values(), *m._buffers.values()]
        return not any(True for _ in m.children()) or any(tensor is not None for tensor in tensors)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace a call of a module, and remember the nodes that it reads and returns."""
        name = self.path_of_module(m)
        before = next(iter(reversed(self.graph.nodes)))
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:  # a user's module may raise anything while it is traced
            if self._inside is not None:
                raise
            for node in reversed(self.graph.nodes):  # erase what was traced of it, and keep it whole
                if node is before:
                    break
                self.graph.erase_node(node)
            result = self.create_proxy("call_module", name, args, kwargs)
        if name in self.last:
            self.called_again.add(name)
        if args and isinstance(args[0], fx.Proxy) and isinstance(result, fx.Proxy):
            self.first[name], self.last[name] = args[0].node, result.node
        return result


def _trace(root: nn.Module, ends: Sequence[str] | None = None) -> tuple[ModuleTracer, fx.Graph]:
    """Trace `root` as a function of its first argument; other arguments keep their defaults."""
    tracer = ModuleTracer(ends)
    parameters = list(inspect.signature(root.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters[1:] if p.default is not inspect.Parameter.empty}
    try:
        graph = tracer.trace(root, concrete_args=defaults or None)
    except Exception as error:  # a user's model may raise anything while it is traced
        raise invalid(
            "model",
            "traceable by torch.fx",
            found=f"{type(root).__name__} ({first_line(error)})",
            hint=f"pass stages=[names of its modules], so that less of it is traced, or {_OWN_PARTS}",
        ) from error
    _images, *rest = [node for node in graph.nodes if node.op == "placeholder"]
    for node in rest:  # arguments left at their defaults, and fx's assertions that they are
        _erase(graph, node)
    return tracer, graph


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _cuts(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes after which only their own output is live.

    Parameters are not counted as live; they are fetched again wherever they are used.
    """
    nodes = [node for node in graph.nodes if node.op not in ("get_attr", "output")]
    order = {node: index for index, node in enumerate(graph.nodes)}
    cuts, live = [], set[fx.Node]()
    for node in nodes:
        live.add(node)
        live = {n for n in live if any(order[user] > order[node] for user in n.users)}
        if live == {node}:
            cuts.append(node)
    return cuts


@dataclass(frozen=True)
class _End:
    """A module that ends at a cut.

    Attributes:
        name: its name in the model.
        size: spatial size of its output.
        weights: number of prunable weights that have run at its end.
    """

    name: str
    size: tuple[int, ...]
    weights: int

    @property
    def depth(self) -> int:
        """Number of modules that contain it, the model not counted."""
        return self.name.count(".")


def _find_stages(root: nn.Module, example_input: Tensor) -> list[str]:
    """Return the modules that end the stages: of each spatial size, the outermost, then the latest."""
    stages: list[_End] = []
    ran = 0
    ends = [end for end in _module_ends(root, example_input) if end.weights > 1]  # one is the stem
    for size, group in itertools.groupby(ends, key=lambda end: end.size):
        members = list(group)
        if stages and max(size) == 1 and members[0].weights == ran:
            break  # pooled, not convolved, to 1 × 1: the head has begun
        best = min(reversed(members), key=lambda end: end.depth)
        if not stages or best.weights > stages[-1].weights:
            stages.append(best)
        ran = members[-1].weights
    if not stages:
        raise invalid(
            "model",
            "a network with convolutions or linear layers between cuts",
            found=f"{type(root).__name__} without stages",
            hint=f"pass {_OWN_PARTS}",
        )
    return [stage.name for stage in stages]


def _module_ends(root: nn.Module, example_input: Tensor) -> list[_End]:
    """Return each module that ends at a cut before the features are flattened, in the order they end."""
    tracer, graph = _trace(root)
    with torch.no_grad(), in_mode(root, training=False):
        ShapeProp(fx.GraphModule(root, graph)).propagate(example_input)
    modules = dict(root.named_modules())
    cuts = set(_cuts(graph))
    ended = {node: name for name, node in tracer.last.items() if name not in tracer.called_again}
    for name, node in tracer.last.items():  # of modules that end together, the outermost
        if name not in tracer.called_again and name.count(".") < ended[node].count("."):
            ended[node] = name
    ends, weights = [], set[int]()
    for node in graph.nodes:
        if node.op == "call_module":
            weights |= {id(weight) for weight in prunable_weights(modules[str(node.target)]).values()}
        shape = getattr(node.meta.get("tensor_meta"), "shape", ())
        name = ended.get(node, "")
        if node in cuts and name and len(shape) > 2 and not isinstance(modules[name], nn.Identity):
            # (batch, channels, height, width), or tokens (batch, positions, channels)
            ends.append(_End(name, tuple(shape[2:] if len(shape) > 3 else shape[1:2]), len(weights)))
    return ends


def _suggestion(root: nn.Module, example_input: Tensor) -> str:
    """Return a few names that can be passed as stages."""
    ends = [end for end in _module_ends(root, example_input) if end.weights > 1]
    depth = min((end.depth for end in ends[:-2]), default=0)
    names = [end.name for end in ends if end.depth == depth]
    return repr(names[(len(names) - 1) // 4 :: max(1, len(names) // 4)])


def _split(root: nn.Module, names: Sequence[str], example_input: Tensor) -> Backbone:
    tracer, graph = _trace(root, names)
    cuts = set(_cuts(graph))
    for name in names:
        if name not in tracer.last or name in tracer.called_again or tracer.last[name] not in cuts:
            raise invalid(
                "stages",
                "modules after which only their output is live",
                found=f"{name!r}, which cannot end a stage",
                hint=f"try {_suggestion(root, example_input)}",
            )
    order = {node: index for index, node in enumerate(graph.nodes)}
    ends = [tracer.last[name] for name in names]
    if ends != sorted(ends, key=order.__getitem__):
        raise invalid("stages", "in the order the modules run", list(names))
    start = _start_of_first_stage(tracer, root, names[0])
    (output,) = (node for node in graph.nodes if node.op == "output")
    if not isinstance(output.args[0], fx.Node):
        raise _not_a_classifier(root, type(output.args[0]).__name__, logits_hint(output.args[0]))
    bounds = [start if start in cuts else ends[0], *ends]
    if bounds[0] is bounds[1]:  # no part precedes the first stage: the stem is the identity
        bounds[0] = next(iter(graph.nodes))
    (images,) = (node for node in graph.nodes if node.op == "placeholder")
    spans = zip([images, *bounds], [*bounds, output.args[0]], strict=True)
    stem, *stages, head = (_part(root, graph, begin, end) for begin, end in spans)
    return Backbone(stem, stages, head, names)


def _start_of_first_stage(tracer: ModuleTracer, root: nn.Module, name: str) -> fx.Node:
    """Return the node that the first stage reads: the input of the module that ends the stage.

    If that module is one of several siblings of its type, it is the input of the first sibling: `blocks.3`
    of twelve equal blocks ends a stage that starts with `blocks.0`.
    """
    parent, _, _ = name.rpartition(".")
    siblings = [
        f"{parent}.{child}"
        for child, module in root.get_submodule(parent).named_children()
        if parent and type(module) is type(root.get_submodule(name))
    ]
    return tracer.first[next((sibling for sibling in siblings if sibling in tracer.first), name)]


def _part(root: nn.Module, graph: fx.Graph, begin: fx.Node, end: fx.Node) -> fx.GraphModule:
    """Return the nodes after `begin` up to `end` as a module of one tensor, with the names in `root`."""
    part = fx.Graph()
    copies = {begin: part.placeholder("features")}
    nodes = list(graph.nodes)
    for node in nodes[nodes.index(begin) + 1 : nodes.index(end) + 1]:
        if node.op != "get_attr":
            for source in node.all_input_nodes:
                if source.op == "get_attr" and source not in copies:
                    copies[source] = part.node_copy(source)
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(copies[end])
    return fx.GraphModule(root, part)


def _check_has_classifier(model: nn.Module, backbone: Backbone, images: Tensor) -> None:
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


def _last_layer(backbone: Backbone, images: Tensor) -> nn.Module | None:
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
            backbone(images.clone())
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
                )


@torch.no_grad()
def _keep_inputs(backbone: Backbone, example_input: Tensor) -> None:
    """Make each stage that overwrites its input (with an in-place activation) copy it first.

    Several paths may read that input.
    """
    trial = copy.deepcopy(backbone).train()  # dropout overwrites in train mode only
    with torch.random.fork_rng([example_input.device] if example_input.is_cuda else []):
        features = trial.stem(example_input.clone())
        for stage, original in zip(trial.stages, backbone.stages, strict=True):
            version = features._version
            result = stage(features)
            if features._version != version:
                _copy_input(original)
            features = result


def _copy_input(stage: nn.Module) -> None:
    if not isinstance(stage, fx.GraphModule):
        stage.register_forward_pre_hook(_clone)
        return
    (features,) = (node for node in stage.graph.nodes if node.op == "placeholder")  # keeps no hooks in copies
    with stage.graph.inserting_after(features):
        clone = stage.graph.call_method("clone", (features,))
    features.replace_all_uses_with(clone, delete_user_cb=lambda user: user is not clone)
    stage.recompile()


def _clone(_stage: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0].clone()


def _check_same_output(model: nn.Module, backbone: Backbone, example_input: Tensor) -> None:
    """Check that the backbone repeats the model's logits in both modes."""
    for training in (False, True):
        expected = _run(model, example_input, training)
        _check_logits(model, expected, training)
        logits = _run(backbone, example_input, training)
        if not isinstance(logits, Tensor) or not torch.equal(expected, logits):
            raise invalid(
                "model",
                "independent of mode and data outside its modules",
                found=f"{type(model).__name__}, whose traced forward pass differs in {_mode(training)}",
                hint=f"turn functional dropout off, or pass {_OWN_PARTS}",
            )


def _check_logits(model: nn.Module, output: Any, training: bool) -> None:
    """Check that an output is logits `(batch, classes)` of two classes or more."""
    if not isinstance(output, Tensor):
        raise _not_a_classifier(model, f"{type(output).__name__} in {_mode(training)}", logits_hint(output))
    if output.ndim != 2:
        raise _not_a_classifier(model, f"shape {tuple(output.shape)} in {_mode(training)}")
    if output.shape[1] < 2:
        raise invalid(
            "model",
            "a classifier of two classes or more",
            found=f"{type(model).__name__} with one logit per image",
            hint="give a binary classifier two logits",
        )


def _mode(training: bool) -> str:
    return "train mode" if training else "eval mode"


def _not_a_classifier(model: nn.Module, output: str, hint: str = "") -> ValueError:
    expected = "a classifier whose output is one tensor (batch, classes)"
    return invalid("model", expected, found=f"{type(model).__name__} with output {output}", hint=hint)


@torch.no_grad()
def _run(model: nn.Module, images: Tensor, training: bool) -> Any:
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(0)
        return copy.deepcopy(model).train(training)(images.clone())
