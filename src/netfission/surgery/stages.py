"""Find the modules that end a model's stages, in the model's graph."""

import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from netfission.surgery.masks import prunable_weights
from netfission.surgery.tracing import ModuleTracer, attempts, constants, live_after, shapes, start_of
from netfission.utils.inputs import Inputs

FEWEST = 3  # stages of a model whose blocks are all alike
_ADDITIONS = {operator.add, operator.iadd, torch.add}
_DEEPEST = 3  # how deep modules are nested after which several tensors may be live


@dataclass(frozen=True)
class _End:
    """A module after which its output is live.

    Attributes:
        names: names in the model of the modules that end here, the outermost first.
        kinds: of each, its parent's name and its type.
        shape: shape of its output, without the batch.
        positions: number of positions in this shape: pixels or tokens.
        weights: number of prunable weights that have run at its end.
        node: what it returns, in the graph; the last node if it returns several.
        live: the nodes whose values are passed on after it, `node` among them.
        in_chain: whether the graph up to here is a chain of single layers.
        of_maps: whether the model's output has height and width.
    """

    names: tuple[str, ...]
    kinds: tuple[tuple[str, type[nn.Module]], ...]
    shape: tuple[int, ...]
    positions: int
    weights: int
    node: fx.Node
    live: tuple[fx.Node, ...]
    in_chain: bool
    of_maps: bool = False

    @property
    def name(self) -> str:
        """Name of the outermost module."""
        return self.names[0]

    @property
    def kind(self) -> tuple[str, type[nn.Module]]:
        """Kind of the outermost module."""
        return self.kinds[0]

    @property
    def depth(self) -> int:
        """Number of modules that contain it, the model not counted."""
        return self.name.count(".")


def find_stages(root: nn.Module, example_input: Inputs, exits: int = 1) -> list[str]:
    """Return the names of the modules that end the stages of a model, in the order they run.

    1. No stage ends in the stem: in what timm calls so, or in the chain of single layers that precedes the
       first branch of the graph. A chain of blocks that go on after it is no stem.
    2. Cuts are grouped by the spatial size of their tensor. A stage ends at the outermost, latest module of
       each size. If a model of maps has fewer than three sizes (dilated convolutions keep the size), they
       are grouped by the number of channels, too. No stage of such a model, nor of one of vectors, ends at
       logits.
    3. If this gives fewer than three stages, the longest row of modules of one type and one shape of output
       (the blocks of a vision transformer) is divided into equal groups: three, or `exits` if that is more.
       Of sizes that do not divide evenly, the later groups are larger. Layers after the row join the last
       group.
    4. A stage needs a layer whose channels are internal, that is at least two layers in sequence. A part
       without (a downsampling layer) joins the next stage. At the beginning it joins the stem, and so does
       a module that differs in type or parent from most that end stages.
    5. If there still are fewer than three stages, points at which several tensors are live are cuts, too.
       In a model of maps, which has skip connections, they are if this gives more stages.

    Args:
        root: the model.
        example_input: images `(batch, channels, height, width)`.
        exits: number of exits that are wanted.

    Returns:
        Their names; empty if there are none.

    Raises:
        Exception: what the model's code raises while it is traced, if no way to trace it works.

    Example:
        >>> from netfission.models import create_model
        >>> find_stages(create_model("wrn-10-1", 10), torch.zeros(2, 3, 32, 32))
        ['block1', 'block2', 'bn']
    """
    traced: list[tuple[ModuleTracer, fx.Graph, list[_End]]] = []
    best: list[_End] = []
    failure: Exception | None = None
    for attempt in attempts(root, example_input):
        try:
            tracer, graph = attempt()
            traced.append((tracer, graph, module_ends(root, tracer, graph, example_input)))
        except Exception as error:  # a user's model may raise anything while it is traced
            failure = failure or error
            continue
        single = [end for end in traced[-1][2] if len(end.live) == 1]
        stages, complete = _choose(root, tracer, graph, single, exits, rows=len(best) < FEWEST)
        if traced[-1][2] and traced[-1][2][0].of_maps:
            stages = max(stages, *_with_skips(root, *traced[-1], exits), key=len)
        best = max(best, stages, key=len)
        if complete and len(stages) >= FEWEST:
            return [stage.name for stage in stages]
    for of_trace in traced:
        if len(best) < FEWEST:
            best = max(best, *_with_skips(root, *of_trace, exits), key=len)
    if failure is not None and not best:
        raise failure
    return [stage.name for stage in best]


def _with_skips(
    root: nn.Module, tracer: ModuleTracer, graph: fx.Graph, ends: Sequence[_End], exits: int
) -> Iterator[list[_End]]:
    """Yield stages after which several tensors may be live, those of the outermost modules first.

    Inner ones come later, as branches within blocks are live at many points.
    """
    for depth in range(_DEEPEST):
        outer = [end for end in ends if _nesting(root, end.name) <= depth]
        stages = _choose(root, tracer, graph, outer, exits)[0]
        yield stages
        if len(stages) >= FEWEST:
            return


def _nesting(root: nn.Module, name: str) -> int:
    """Return in how many modules a module is nested; those that hold one module alone are wrappers."""
    parents = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
    several = sum(len(list(root.get_submodule(parent).children())) > 1 for parent in parents)
    return several if len(list(root.children())) > 1 else several - 1


def _choose(
    root: nn.Module,
    tracer: ModuleTracer,
    graph: fx.Graph,
    ends: Sequence[_End],
    exits: int,
    *,
    rows: bool = True,
) -> tuple[list[_End], bool]:
    """Return the ends of the stages, and whether every size of the features gave one.

    Too few stages are replaced by groups of a row of blocks, if `rows`.
    """
    ends = _after_stem(root, ends)
    found = _by_size(late := [end for end in ends if end.weights > 1])  # one is the stem
    if len(found) < FEWEST and found and found[0].of_maps:
        found = _by_size(late, lambda end: end.shape)
    in_trunk = found if found and found[0].of_maps else _of_common_kind(found)  # a decoder differs
    stages = _join(root, tracer, graph, in_trunk)
    row = _row_of_blocks(ends, max(FEWEST, exits)) if rows and len(stages) < FEWEST else []
    fewest = max(2, len(stages) + 1) if row and len(row[0].shape) == 1 else FEWEST  # an MLP has few layers
    if len(stages) < FEWEST and fewest <= len(row):
        return _equal_groups(row, found, max(FEWEST, exits)), True
    return stages, len(stages) == len(in_trunk)


def _after_stem(root: nn.Module, ends: Sequence[_End]) -> list[_End]:
    """Drop the ends in the stem: what timm calls so, and a chain before the first branch.

    Modules in the chain are blocks if modules of their kind, with several layers, come again after it.
    """
    is_stem = _stem_of_timm(root)
    branched = any(not end.in_chain for end in ends)
    blocks: set[tuple[str, type[nn.Module]]] = set()
    for end in ends:
        for name, kind in zip(end.names, end.kinds, strict=True):
            if (
                not end.in_chain
                and kind not in blocks
                and len(prunable_weights(root.get_submodule(name))) > 1
            ):
                blocks.add(kind)
    return [
        end
        for end in ends
        if not is_stem(end.name) and not (branched and end.in_chain and blocks.isdisjoint(end.kinds))
    ]


def _stem_of_timm(root: nn.Module) -> Callable[[str], bool]:
    """Return the function that says whether a name is in a timm model's stem; always False for others."""
    try:
        groups = root.group_matcher(coarse=True)  # type: ignore[operator]
    except Exception:  # not a model of timm, or one without coarse groups
        return lambda name: False
    stem = () if callable(groups) else groups.get("stem") or ()
    patterns = [stem] if isinstance(stem, str) else [pattern for pattern, *_ in stem]

    def is_stem(name: str) -> bool:
        if not callable(groups):
            return any(re.match(pattern, f"{name}.") for pattern in patterns)
        try:
            return bool(groups(name) == 0)
        except (LookupError, ValueError):  # made for names of parameters
            return False

    return is_stem


def _by_size(ends: Sequence[_End], size: Callable[[_End], Any] = lambda end: end.positions) -> list[_End]:
    """Return of each size, by default the spatial one, the outermost, then the latest end."""
    stages: list[_End] = []
    ran = 0
    for _, group in itertools.groupby(ends, key=size):
        members = list(group)
        if stages and members[0].positions == 1 and members[0].weights == ran:
            break  # pooled, not convolved, to 1 × 1: the head has begun
        best = min(reversed(members), key=lambda end: end.depth)
        if not stages or best.weights > stages[-1].weights:
            stages.append(best)
        ran = members[-1].weights
    return stages


def _of_common_kind(stages: list[_End]) -> list[_End]:
    """Drop the first ends that differ in type or parent from most ends of stages."""
    common = _common_kind(stages)
    return list(itertools.dropwhile(lambda stage: stage.kind != common, stages)) if common else stages


def _common_kind(stages: Sequence[_End]) -> Any:
    """Return the kind of most ends; None if they all differ."""
    kinds = Counter(stage.kind for stage in stages).most_common(1)
    return kinds[0][0] if kinds and kinds[0][1] > 1 else None


def _join(root: nn.Module, tracer: ModuleTracer, graph: fx.Graph, stages: Sequence[_End]) -> list[_End]:
    """Join a part without internal channels to the next stage; the last one to the stage before.

    A first stage of the common kind stays: every exit shares it (one convolution, in a small VGG).
    """
    kept: list[_End] = []
    common = _common_kind(stages)
    for stage in stages:
        begin = kept[-1].node if kept else start_of(tracer, root, stage.name)
        internal = has_internal_channels(root, graph, begin, stage.node, stage.live)
        if internal or (not kept and stage.kind == common):
            kept.append(stage)
        elif kept and stage is stages[-1]:
            kept[-1] = stage
    return kept


def _row_of_blocks(ends: Sequence[_End], groups: int) -> list[_End]:
    """Return the row of ends of one kind and shape, each of which adds layers, that spans the most layers.

    Rows of fewer ends than groups are only chosen if there is no other; then the longest is.
    """
    rows: dict[Any, list[_End]] = {}
    for end in ends:
        for name, kind in zip(end.names, end.kinds, strict=True):
            row = rows.setdefault((kind, end.shape), [])
            if end.weights > (row[-1].weights if row else 0):
                row.append(replace(end, names=(name,), kinds=(kind,)))
    found = filter(None, rows.values())  # embeddings come before all layers
    return max(found, key=lambda row: _length(row, groups), default=[])


def _length(row: Sequence[_End], groups: int) -> tuple[int, int]:
    return min(len(row), groups), row[-1].weights - row[0].weights


def _equal_groups(row: Sequence[_End], found: Sequence[_End], groups: int) -> list[_End]:
    """Return the ends of equal groups of a row of blocks, and what follows the row with the last one."""
    groups = min(groups, len(row))
    stages = [row[(index + 1) * len(row) // groups - 1] for index in range(groups)]
    if found and found[-1].weights > row[-1].weights:
        stages[-1] = found[-1]
    return stages


def module_ends(root: nn.Module, tracer: ModuleTracer, graph: fx.Graph, example_input: Inputs) -> list[_End]:
    """Return each module that ends with its output live, before features are flattened, as they end.

    If no tensor has positions, as in an MLP of vectors, features are flat from the beginning. In such a
    model, and in one of maps, what no layer reads is logits, after which no stage ends: the head would be
    divided and pruned.
    """
    shape_of = shapes(root, tracer, graph, example_input)
    flat = all(len(shape) <= 2 for shape in shape_of.values())
    modules = dict(root.named_modules())
    free = constants(root, graph, tracer) | tracer.aside | ({tracer.frame} if tracer.frame else set())
    live = live_after(graph, free)
    ended: dict[fx.Node, list[str]] = {}
    for name, node in tracer.last.items():
        if name not in tracer.called_again and not isinstance(modules[name], nn.Identity):
            ended.setdefault(node, []).append(name)
    result = graph.output_node().args[0]
    of_maps = isinstance(result, fx.Node) and len(shape_of.get(result, ())) == 4
    square = not isinstance(example_input, Tensor) or len({*example_input.shape[-2:]}) == 1
    ends, weights, in_chain = [], set[int](), True
    before_last_use = _before_last_uses(root, graph)
    for node in graph.nodes:
        if node.op == "call_module":
            weights |= {id(weight) for weight in prunable_weights(modules[str(node.target)]).values()}
        in_chain = in_chain and len(live[node]) == 1 and _layers(root, node) <= 1
        shape = shape_of.get(node, ())
        names = sorted(ended.get(node, ()), key=lambda name: name.count("."))
        if node in live[node] and names and len(shape) > (1 if flat else 2) and node not in before_last_use:
            kinds = tuple((name.rpartition(".")[0], type(modules[name])) for name in names)
            features = tuple(shape[1:])
            where = _positions(features, square), len(weights), node, live[node], in_chain, of_maps
            ends.append(_End(tuple(names), kinds, features, *where))
    if of_maps or flat:
        before_layers = _before_layers(root, graph)
        ends = [end for end in ends if end.node in before_layers]
    return ends


def _before_layers(root: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values reach a layer; those of the others are logits."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if any(user in found or _layers(root, user) for user in node.users):
            found.add(node)
    return found


def _before_last_uses(root: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes between two uses of a parameter, after which no stage can end."""
    modules = dict(root.named_modules())
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        used = modules[str(node.target)].parameters() if node.op == "call_module" else ()
        for parameter in used:
            first.setdefault(id(parameter), index)
            last[id(parameter)] = index
    spans = [range(first[key], last[key]) for key in first if last[key] > first[key]]
    return {node for index, node in enumerate(graph.nodes) if any(index in span for span in spans)}


def _positions(shape: tuple[int, ...], square: bool = True) -> int:
    """Return the number of positions in a shape without the batch; channels are last in square images alone.

    Example:
        >>> _positions((64, 8, 8)), _positions((8, 8, 64)), _positions((64, 192))  # tokens
        (64, 64, 64)
    """
    if len(shape) == 2:
        return shape[0]
    channels_last = square and len(shape) == 3 and shape[0] == shape[1] != shape[2]
    return math.prod(shape[:2] if channels_last else shape[1:])


def has_internal_channels(
    root: nn.Module, graph: fx.Graph, begin: fx.Node, end: fx.Node, live: Sequence[fx.Node]
) -> bool:
    """Return whether the channels of a layer reach the end of a part through other layers alone.

    A depthwise convolution passes its channels on. A module that stays whole counts if it holds two layers.
    A batch norm in an identity branch passes none on, as it can be scattered: see
    `netfission.surgery.coupling.find_coupling`.

    Args:
        root: the model.
        graph: its graph.
        begin: the last node before the part.
        end: the last node of the part.
        live: the nodes that the part passes on.
    """
    nodes = list(graph.nodes)
    reaches = set(live)  # nodes whose channels are among those passed on
    for node in reversed(nodes[nodes.index(begin) + 1 : nodes.index(end) + 1]):
        layers = _layers(root, node)
        if layers > 1 or (layers and node not in reaches):
            return True
        if node in reaches and not layers and not _is_identity_branch(root, node):
            reaches.update(node.all_input_nodes)
    return False


def _is_identity_branch(root: nn.Module, node: fx.Node) -> bool:
    """Return whether a node is a batch norm beside layers that read the same, and is only added to others."""
    if node.op != "call_module" or not isinstance(root.get_submodule(str(node.target)), nn.BatchNorm2d):
        return False
    (source,) = node.all_input_nodes
    beside_layers = len(source.users) > 1 and not _layers(root, source)
    return beside_layers and all(user.target in _ADDITIONS for user in node.users)


def _layers(root: nn.Module, node: fx.Node) -> int:
    """Return how many layers that mix channels a node runs; a depthwise convolution does not."""
    if node.op != "call_module":
        return 0
    module = root.get_submodule(str(node.target))
    if getattr(module, "groups", 1) == getattr(module, "in_channels", 0):
        return 0
    return len(prunable_weights(module))
