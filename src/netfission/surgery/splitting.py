"""Split a model's graph into stem, stages and head, each a module of one tensor."""

import copy
import operator
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, fx, nn

from netfission.surgery.plain import logits_hint
from netfission.surgery.tracing import ModuleTracer, constants, cuts, is_batch_size, start_of
from netfission.utils.errors import invalid


def split(
    root: nn.Module, tracer: ModuleTracer, graph: fx.Graph, names: Sequence[str], offer: Callable[[], str]
) -> list[fx.GraphModule]:
    """Return stem, stages and head of a traced model as modules, with the names of its parameters.

    Args:
        root: the model.
        tracer: the tracer that made the graph, with these names as ends.
        graph: the model's graph.
        names: names of the modules that end the stages, in the order they run.
        offer: returns what a message says of other names.

    Raises:
        ValueError: a name does not end a stage, the names are not in order, or the model returns something
            else than one tensor.
    """
    free = constants(root, graph, tracer)
    at_cut = set(cuts(graph, free))
    for name in names:
        if name not in tracer.last or name in tracer.called_again or tracer.last[name] not in at_cut:
            raise invalid(
                "stages",
                "modules after which only their output is live",
                found=f"{name!r}, which cannot end a stage",
                hint=offer(),
            )
    order = {node: index for index, node in enumerate(graph.nodes)}
    ends = [tracer.last[name] for name in names]
    if ends != sorted(ends, key=order.__getitem__):
        raise invalid("stages", "in the order the modules run", list(names))
    (output,) = (node for node in graph.nodes if node.op == "output")
    if not isinstance(output.args[0], fx.Node):
        raise not_a_classifier(root, type(output.args[0]).__name__, logits_hint(output.args[0]))
    start = start_of(tracer, root, names[0])
    bounds = [start if start in at_cut else ends[0], *ends]
    (images,) = (node for node in graph.nodes if node.op == "placeholder")
    if bounds[0] is bounds[1]:  # no part precedes the first stage: the stem is the identity
        bounds[0] = images
    spans = zip([images, *bounds], [*bounds, output.args[0]], strict=True)
    sizes = {node for node in free if is_batch_size(node, tracer)}
    parts = [_part(root, graph, begin, end, sizes) for begin, end in spans]
    _separate_constants(parts, {str(node.target) for node in free if node.op == "call_module"})
    return parts


def not_a_classifier(model: nn.Module, output: str, hint: str = "") -> ValueError:
    """Make the error for a model that returns no logits."""
    expected = "a classifier whose output is one tensor (batch, classes)"
    return invalid("model", expected, found=f"{type(model).__name__} with output {output}", hint=hint)


def _part(
    root: nn.Module, graph: fx.Graph, begin: fx.Node, end: fx.Node, sizes: set[fx.Node]
) -> fx.GraphModule:
    """Return the nodes after `begin` up to `end` as a module of one tensor.

    Parameters and constants that other parts use too are fetched or computed again; `sizes` are the nodes
    that count the images.
    """
    part = fx.Graph()
    features = part.placeholder("features")
    copies = {begin: features}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node in sizes:
                copies[node] = part.call_method("size", (features, 0))
            else:
                for source in node.all_input_nodes:
                    copied(source)
                copies[node] = part.node_copy(node, copies.__getitem__)
        return copies[node]

    nodes = list(graph.nodes)
    for node in nodes[nodes.index(begin) + 1 : nodes.index(end) + 1]:
        if node.op != "get_attr" and not (node in sizes and not node.users):
            copied(node)
    part.output(copies[end])
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
