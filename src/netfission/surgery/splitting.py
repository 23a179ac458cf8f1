"""Split a model's graph into stem, stages and head, each a module of one tensor, or of a tuple of tensors."""

import copy
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from netfission.surgery.plain import logits_hint
from netfission.surgery.tracing import (
    ModuleTracer,
    constants,
    is_batch_size,
    live_after,
    rows_per_image,
    start_of,
)
from netfission.utils.errors import invalid


@dataclass(frozen=True)
class _Boundary:
    """A point between two parts.

    Attributes:
        position: index in the graph of the first node after it.
        live: the nodes that are passed on, in the order they run.
        rows: of each, the number of rows of one image, which are passed on as a second dimension.
    """

    position: int
    live: tuple[fx.Node, ...]
    rows: tuple[int, ...] = (1,)


def split(
    root: nn.Module,
    tracer: ModuleTracer,
    graph: fx.Graph,
    names: Sequence[str],
    offer: Callable[[], str],
    *,
    several: bool = False,
) -> list[fx.GraphModule]:
    """Return stem, stages and head of a traced model as modules, with the names of its parameters.

    Args:
        root: the model.
        tracer: the tracer that made the graph, with these names as ends.
        graph: the model's graph.
        names: names of the modules that end the stages, in the order they run.
        offer: returns what a message says of other names.
        several: whether parts may pass on several tensors, as a tuple.

    Raises:
        ValueError: a name does not end a stage, the names are not in order, or the model returns something
            else than one tensor.
    """
    free = constants(root, graph, tracer)
    nodes = list(graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    live = live_after(graph, free)
    for name in names:
        end = tracer.last.get(name)
        passed_on = live[end] if end and name not in tracer.called_again else ()
        count = len([node for node in passed_on if node is not tracer.frame and node not in tracer.aside])
        if end not in passed_on or (count > 1 and not several):
            raise invalid(
                "stages",
                "modules that run once, and after which only their output is live",
                found=f"{name!r}, which cannot end a stage",
                hint=offer(),
            )
    ends = [tracer.last[name] for name in names]
    if ends != sorted(ends, key=order.__getitem__):
        raise invalid("stages", "in the order the modules run", list(names))
    output = nodes[-1]
    if not isinstance(output.args[0], fx.Node):
        raise not_a_classifier(root, type(output.args[0]).__name__, logits_hint(output.args[0]))
    most = max(len(live[end]) for end in ends)
    start = order[start_of(tracer, root, names[0])]
    while len(live[nodes[start]]) > most:
        start -= 1
    images = next(node for node in nodes if node.op == "placeholder")
    inner = [
        _Boundary(order[end] + 1, live[end], tuple(rows_per_image(node, tracer) for node in live[end]))
        for end in (nodes[start], *ends)
    ]
    last = _Boundary(len(nodes) - 1, (output.args[0],))
    bounds = [_Boundary(order[images] + 1, (images,)), *inner, last]
    sizes = {node for node in free if is_batch_size(node, tracer)}
    of_stem = set() if images in tracer.aside else sizes  # several inputs have no size of their own
    parts = [
        _part(root, nodes, begin, end, of_stem if begin is bounds[0] else sizes)
        for begin, end in itertools.pairwise(bounds)
    ]
    _separate_constants(parts, {str(node.target) for node in free if node.op == "call_module"})
    return parts


def not_a_classifier(model: nn.Module, output: str, hint: str = "") -> ValueError:
    """Make the error for a model that returns no logits."""
    expected = "a classifier whose output is one tensor (batch, classes[, height, width])"
    return invalid("model", expected, found=f"{type(model).__name__} with output {output}", hint=hint)


def _part(
    root: nn.Module, nodes: Sequence[fx.Node], begin: _Boundary, end: _Boundary, sizes: set[fx.Node]
) -> fx.GraphModule:
    """Return the nodes between two boundaries as a module.

    Parameters and constants that other parts use too are fetched or computed again; `sizes` are the nodes
    that count the images.
    """
    part = fx.Graph()
    features = part.placeholder("features")
    tensors = [features]
    if len(begin.live) > 1:
        indices = range(len(begin.live))
        tensors = [part.call_function(operator.getitem, (features, index)) for index in indices]
    copies = {
        node: tensor if rows == 1 else part.call_method("flatten", (tensor, 0, 1))
        for node, tensor, rows in zip(begin.live, tensors, begin.rows, strict=True)
    }

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node in sizes:
                copies[node] = part.call_method("size", (tensors[0], 0))
            else:
                for source in node.all_input_nodes:
                    copied(source)
                copies[node] = part.node_copy(node, copies.__getitem__)
        return copies[node]

    for node in nodes[begin.position : end.position]:
        if node.op != "get_attr" and not (node in sizes and not node.users):
            copied(node)
    results = tuple(
        copies[node] if rows == 1 else part.call_method("unflatten", (copies[node], 0, (-1, rows)))
        for node, rows in zip(end.live, end.rows, strict=True)
    )
    part.output(results if len(results) > 1 else results[0])
    return fx.GraphModule(root, part)


def _separate_constants(parts: Sequence[fx.GraphModule], modules: set[str]) -> None:
    """Give each part its own copy of the tables that several parts read.

    Args:
        parts: parts of one model.
        modules: names of modules without parameters that compute constants.
    """
    used: set[int] = set()
    for part in parts:
        here: set[int] = set()
        for name, tensor in _tables(part):
            if id(tensor) in used:
                owner, _, leaf = name.rpartition(".")
                part.get_submodule(owner)._buffers[leaf] = tensor.clone()
            here.add(id(tensor))
        called = {str(node.target) for node in part.graph.nodes if node.op == "call_module"} & modules
        for name in called:
            module = part.get_submodule(name)
            if id(module) in used:
                part.set_submodule(name, copy.deepcopy(module))
            here.add(id(module))
        used |= here


def _tables(part: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors, parameters not counted, that a part's graph fetches."""
    for node in part.graph.nodes:
        if node.op == "get_attr":
            tensor = operator.attrgetter(str(node.target))(part)
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                yield str(node.target), tensor
