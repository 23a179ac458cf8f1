"""Any traceable classifier cut into stem → stages → head.

A *cut* is a point of the forward pass after which one tensor alone is live. The model is traced twice
with torch.fx: finely, to find its cuts, and then again only as deep as the chosen cuts need, so that
everything between them runs as the model's own modules, in whatever mode they are set to.
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
from netfission.utils.errors import invalid
from netfission.utils.modes import in_mode


class Backbone(nn.Module):
    """A classifier seen as `stem → stages → head`; calling it runs the three in turn.

    Each part keeps the parameter names of the model it was cut from: `layer1.0.conv1.weight` of the
    model is `layer1.0.conv1.weight` of the part that holds it.

    Attributes:
        stem: images → features; what comes before the first stage.
        stages: each a stretch whose only live input is the output of the one before.
        head: features of the last stage → logits `(batch, classes)`.
        stage_names: the module that ends each stage, by its name in the model.
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

    def forward(self, images: Tensor) -> Tensor:
        """Images `(batch, channels, height, width)` → logits `(batch, classes)`."""
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

    Left to itself it groups the cuts by the spatial size of their tensor and ends a stage at the
    outermost, latest module of each size: `layer1` … `layer4` of a ResNet. A stretch without
    convolution or linear layer joins what follows; a first one with a single such layer is the stem.

    Args:
        model: images → logits `(batch, classes)`; not changed.
        example_input: images `(batch, channels, height, width)` on the model's device.
        stages: names of the modules that end the stages, in the order they run; default found.

    Returns:
        A backbone whose output equals the model's bit for bit, checked in train and in eval mode, and
        none of whose stages overwrites its input.

    Raises:
        ValueError: the model cannot be traced, a name is unknown or does not end a stage, or the cut
            model does not repeat the model's output. The message says what to pass instead.
    """
    if example_input.shape[0] == 1:  # batch norm on 1 × 1 features takes two values to train
        example_input = torch.cat([example_input, example_input.flip(-1)])
    _check_example(model, example_input)
    if isinstance(model, Backbone):
        if stages is not None:
            raise ValueError(f"stages={list(stages)!r}: takes None beside a Backbone, which has its own")
        backbone = copy.deepcopy(model)
    else:
        backbone = _cut_copy(copy.deepcopy(model), example_input, stages)
    _refuse_shared(backbone)
    _keep_inputs(backbone, example_input)
    _check(model, backbone, example_input)
    return backbone


def _cut_copy(root: nn.Module, example_input: Tensor, stages: Sequence[str] | None) -> Backbone:
    names = _find_stages(root, example_input) if stages is None else list(stages)
    modules = dict(root.named_modules())
    unknown = [name for name in names if name not in modules or not name]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"stages={names!r}: takes distinct names of modules of {type(root).__name__}"
            + (f"; {unknown[0]!r} is none, try {_hint(root, example_input)}" if unknown else "")
        )
    return _split(root, names, example_input)


class ModuleTracer(fx.Tracer):
    """Traces down to the modules that matter, and remembers where each module starts and ends.

    With `ends`, only modules around one of these are traced into. Without, every module is, except
    those that own parameters or buffers beside children (their mode would be frozen as traced, e.g.
    timm's `BatchNormAct2d`) and those whose forward pass depends on the data.
    """

    def __init__(self, ends: Sequence[str] | None = None) -> None:
        super().__init__()
        self._inside = ends and {name[:dot] for name in ends for dot in range(len(name)) if name[dot] == "."}
        self.first: dict[str, fx.Node] = {}  # module name → the node it reads
        self.last: dict[str, fx.Node] = {}  # module name → the node it returns
        self.repeated: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module stays whole."""
        if self._inside is not None:
            return module_qualified_name not in self._inside
        own = [*m._parameters.values(), *m._buffers.values()]
        return not any(True for _ in m.children()) or any(tensor is not None for tensor in own)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace a call of a module, and remember the nodes that it reads and returns."""
        name = self.path_of_module(m)
        before = next(iter(reversed(self.graph.nodes)))
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            if self._inside is not None:
                raise
            for node in reversed(self.graph.nodes):  # forget what was traced of it: keep it whole
                if node is before:
                    break
                self.graph.erase_node(node)
            result = self.create_proxy("call_module", name, args, kwargs)
        if name in self.last:
            self.repeated.add(name)
        if args and isinstance(args[0], fx.Proxy) and isinstance(result, fx.Proxy):
            self.first[name], self.last[name] = args[0].node, result.node
        return result


def _trace(root: nn.Module, ends: Sequence[str] | None = None) -> tuple[ModuleTracer, fx.Graph]:
    """The graph of `root` as a function of its first argument; others keep their defaults."""
    tracer = ModuleTracer(ends)
    parameters = list(inspect.signature(root.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters[1:] if p.default is not inspect.Parameter.empty}
    try:
        graph = tracer.trace(root, concrete_args=defaults or None)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"model={type(root).__name__}: cannot be traced ({reason}); pass stages=[names of its "
            "modules] so that less of it is traced, or a netfission.Backbone of your own parts"
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
    """The nodes after which they alone are live. Parameters are fetched where they are used."""
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
    """A module that ends at a cut: spatial size there, and how many prunable weights have run."""

    name: str
    size: tuple[int, ...]
    weights: int

    @property
    def depth(self) -> int:
        return self.name.count(".")


def _find_stages(root: nn.Module, example_input: Tensor) -> list[str]:
    """Names of the modules that end the stages: of each spatial size, the outermost, then the latest."""
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
        raise ValueError(
            f"model={type(root).__name__}: no stages found; takes a network with convolutions or linear "
            "layers between cuts, or a netfission.Backbone of your own parts"
        )
    return [stage.name for stage in stages]


def _module_ends(root: nn.Module, example_input: Tensor) -> list[_End]:
    """Every module that ends at a cut before the features are flattened, in the order they end."""
    tracer, graph = _trace(root)
    with torch.no_grad(), in_mode(root, training=False):
        ShapeProp(fx.GraphModule(root, graph)).propagate(example_input)
    modules = dict(root.named_modules())
    cuts = set(_cuts(graph))
    ended = {node: name for name, node in tracer.last.items() if name not in tracer.repeated}
    for name, node in tracer.last.items():  # of modules that end together, the outermost
        if name not in tracer.repeated and name.count(".") < ended[node].count("."):
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


def _hint(root: nn.Module, example_input: Tensor) -> str:
    """A few names that would do as stages."""
    ends = [end for end in _module_ends(root, example_input) if end.weights > 1]
    depth = min((end.depth for end in ends[:-2]), default=0)
    names = [end.name for end in ends if end.depth == depth]
    return repr(names[(len(names) - 1) // 4 :: max(1, len(names) // 4)])


def _split(root: nn.Module, names: Sequence[str], example_input: Tensor) -> Backbone:
    tracer, graph = _trace(root, names)
    cuts = set(_cuts(graph))
    for name in names:
        if name not in tracer.last or name in tracer.repeated or tracer.last[name] not in cuts:
            raise ValueError(
                f"stages={list(names)!r}: more than the output of {name!r} is live after it, so it cannot "
                f"end a stage; try {_hint(root, example_input)}"
            )
    order = {node: index for index, node in enumerate(graph.nodes)}
    ends = [tracer.last[name] for name in names]
    if ends != sorted(ends, key=order.__getitem__):
        raise ValueError(f"stages={list(names)!r}: takes the names in the order the modules run")
    start = _start_of_first_stage(tracer, root, names[0])
    (output,) = (node for node in graph.nodes if node.op == "output")
    if not isinstance(output.args[0], fx.Node):
        raise ValueError(
            f"model={type(root).__name__}: takes a classifier whose output is one tensor (batch, classes); "
            f"it gives {type(output.args[0]).__name__}"
        )
    bounds = [start if start in cuts else ends[0], *ends]
    if bounds[0] is bounds[1]:  # nothing can be set apart: the stem is the identity
        bounds[0] = next(iter(graph.nodes))
    (images,) = (node for node in graph.nodes if node.op == "placeholder")
    spans = zip([images, *bounds], [*bounds, output.args[0]], strict=True)
    stem, *stages, head = (_part(root, graph, begin, end) for begin, end in spans)
    return Backbone(stem, stages, head, names)


def _start_of_first_stage(tracer: ModuleTracer, root: nn.Module, name: str) -> fx.Node:
    """What the first stage reads: the input of its last module, or of the first of a row of its kind.

    `blocks.3` of twelve equal blocks ends a stage that starts with `blocks.0`.
    """
    parent, _, _ = name.rpartition(".")
    row = [
        f"{parent}.{child}"
        for child, module in root.get_submodule(parent).named_children()
        if parent and type(module) is type(root.get_submodule(name))
    ]
    return tracer.first[next((sibling for sibling in row if sibling in tracer.first), name)]


def _part(root: nn.Module, graph: fx.Graph, begin: fx.Node, end: fx.Node) -> fx.GraphModule:
    """The nodes after `begin` up to `end` as a module of one tensor, names as in `root`."""
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


def _refuse_shared(backbone: Backbone) -> None:
    owner: dict[int, str] = {}
    parts = [backbone.stem, *backbone.stages, backbone.head]
    for label, part in zip(["stem", *backbone.stage_names, "head"], parts, strict=True):
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            if owner.setdefault(id(tensor), label) != label:
                raise ValueError(
                    f"stages={list(backbone.stage_names)!r}: {name!r} is used in {owner[id(tensor)]!r} and "
                    f"in {label!r}; pass stages that keep both uses in one"
                )


@torch.no_grad()
def _keep_inputs(backbone: Backbone, example_input: Tensor) -> None:
    """Let a stage that overwrites its input (an in-place activation comes first) copy it instead.

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


def _check_example(model: nn.Module, example_input: Tensor) -> None:
    try:
        _run(model, example_input, training=False)
    except Exception as error:  # whatever a model's own checks raise
        raise ValueError(
            f"example_input={tuple(example_input.shape)} {example_input.dtype}: takes images that "
            f"{type(model).__name__} takes ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from error


def _check(model: nn.Module, backbone: Backbone, example_input: Tensor) -> None:
    for training in (False, True):
        mode = "train" if training else "eval"
        expected = _run(model, example_input, training)
        if not isinstance(expected, Tensor) or expected.ndim != 2:
            raise ValueError(
                f"model={type(model).__name__}: takes a classifier whose output is one tensor (batch, "
                f"classes); in {mode} mode it gives {_describe(expected)}"
            )
        if not torch.equal(expected, _run(backbone, example_input, training)):
            raise ValueError(
                f"model={type(model).__name__}: its forward pass as traced differs in {mode} mode (it "
                "depends on the mode or the data outside its modules); turn functional dropout off, or "
                "pass a netfission.Backbone of your own parts"
            )


@torch.no_grad()
def _run(model: nn.Module, images: Tensor, training: bool) -> Any:
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(0)
        return copy.deepcopy(model).train(training)(images.clone())


def _describe(output: Any) -> str:
    return f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
