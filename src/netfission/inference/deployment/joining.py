"""Build one graph for several paths, each run separately or all joined on their channels.

A *joined* tensor holds the paths' tensors side by side on dimension 1. Convolutions that share their input
become one convolution, the others one grouped convolution. Layers that work channel by channel run once for
all paths. This saves calls, which take most of the time of a small batch.
"""

import copy
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from netfission.inference.deployment.convolution import FusedConv2d
from netfission.inference.deployment.folding import SamePadding, layer_of, shape_of, target_of

_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid)
_LAYERS = (*_POOLS, *_ACTIVATIONS, nn.Sigmoid, nn.Tanh, nn.Flatten, SamePadding)
_FUNCTIONS = {
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh),
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.add, torch.mul, torch.flatten, torch.mean),
    *(operator.add, operator.iadd, operator.mul, operator.imul, operator.truediv),
    *("relu", "relu_", "sigmoid", "tanh", "clone", "contiguous", "add", "add_", "mul", "mul_"),
    *("flatten", "mean"),
}


_SHAPES = ("shape", "ndim", "dtype", "device")  # attributes that all paths have in common
_SELECTIONS = {tuple, operator.getitem, "chunk"}  # of tensors, some of which nothing reads


class _NotJoinableError(Exception):
    """The paths cannot run joined."""


class PathNodes(NamedTuple):
    """The input or output of the paths: one tensor shared by all, one that joins theirs, or one per path.

    Attributes:
        nodes: one node, or one per path.
        joined: whether the one node holds the tensors of all paths side by side.
    """

    nodes: tuple[fx.Node, ...]
    joined: bool = False

    @property
    def shared(self) -> bool:
        """Whether all paths read the same tensor."""
        return len(self.nodes) == 1 and not self.joined


class PathTuple(NamedTuple):
    """The input or output of paths whose parts pass on several tensors.

    Attributes:
        parts: one for each tensor.
    """

    parts: tuple[PathNodes, ...]


PathFeatures = PathNodes | PathTuple


class JoinedLinear(nn.Module):
    """One linear layer per path: joined `(batch, paths · inputs)` → `(batch, paths · outputs)`.

    Example:
        >>> layer = JoinedLinear([nn.Linear(3, 2), nn.Linear(3, 2)])
        >>> layer(torch.zeros(5, 6)).shape
        torch.Size([5, 4])
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.paths = len(layers)
        weight = torch.stack([layer.weight.t() for layer in layers])
        bias = [weight.new_zeros(weight.shape[2]) if layer.bias is None else layer.bias for layer in layers]
        self.weight = nn.Parameter(weight, requires_grad=False)  # (paths, inputs, outputs)
        self.bias = nn.Parameter(torch.stack(list(bias)).unsqueeze(1), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        """Apply each path's layer to its part of the features."""
        parts = features.unflatten(1, (self.paths, -1)).transpose(0, 1)
        return torch.baddbmm(self.bias, parts, self.weight).transpose(0, 1).flatten(1)


class GraphBuilder:
    """Assembles the graphs of parts, the results of `folded`, into one.

    Args:
        joined: whether to join paths if possible.
    """

    def __init__(self, *, joined: bool) -> None:
        self.graph = fx.Graph()
        self._may_join = joined
        self._layers: dict[str, Any] = {}
        self._joins: dict[tuple[fx.Node, ...], fx.Node] = {}

    def finish(self, result: fx.Node) -> fx.GraphModule:
        """Return the graph as a module whose output is `result`."""
        self.graph.output(result)
        self.graph.eliminate_dead_code(lambda node: node.target not in _SELECTIONS)
        return fx.GraphModule(self._layers, self.graph)

    def add(self, name: str, parts: Sequence[fx.GraphModule], features: PathFeatures) -> PathFeatures:
        """Add one part per path: joined, if every node of it can be.

        Args:
            name: prefix of the names of its layers.
            parts: one per path.
            features: their input.

        Returns:
            Their output.
        """
        paths = len(parts)
        if paths > 1 and self._may_join:
            before = len(self.graph.nodes)
            try:
                return self._add_joined(name, parts, features)
            except _NotJoinableError:
                for node in reversed(list(self.graph.nodes)[before:]):
                    self.graph.erase_node(node)
        names = [name] if paths == 1 else [f"{name}.{path}" for path in range(paths)]
        return PathNodes(tuple(map(self.add_alone, names, parts, self.separate(features, paths))))

    def separate(self, features: PathFeatures, paths: int) -> Sequence[fx.Node]:
        """Return one node per path."""
        if isinstance(features, PathTuple):
            tensors = [self.separate(part, paths) for part in features.parts]
            return [self.graph.call_function(tuple, (list(own),)) for own in zip(*tensors, strict=True)]
        if features.joined:
            chunks = self.graph.call_method("chunk", (features.nodes[0], paths, 1))
            return [self.graph.call_function(operator.getitem, (chunks, path)) for path in range(paths)]
        return features.nodes * paths if features.shared else features.nodes

    def add_alone(self, name: str, part: fx.GraphModule, source: fx.Node) -> fx.Node:
        """Add one part, see `add`, and return its output."""
        copies = {}
        for node in part.graph.nodes:
            if node.op == "placeholder":
                copies[node] = source
            elif node.op != "output":
                target = target_of(part, node) if node.op in ("call_module", "get_attr") else None
                copies[node] = self._copy(node, copies, name, target)
        return copies[_result(part)]

    def _add_joined(self, name: str, parts: Sequence[fx.GraphModule], features: PathFeatures) -> PathFeatures:
        self._joins.clear()
        copies: dict[fx.Node, PathFeatures] = {}
        if len({len(part.graph.nodes) for part in parts}) > 1:
            raise _NotJoinableError
        for nodes in zip(*(part.graph.nodes for part in parts), strict=True):
            if nodes[0].op == "placeholder":
                copies[nodes[0]] = features
            elif nodes[0].op != "output":
                layers = [layer_of(part, node) for part, node in zip(parts, nodes, strict=True)]
                if len(set(map(_signature, nodes, layers))) > 1:
                    raise _NotJoinableError
                inputs = {source: copies[source] for source in nodes[0].all_input_nodes}
                copies[nodes[0]] = self._pass_tuple(nodes[0], inputs) or self._add_joined_node(
                    name, nodes, layers, inputs
                )
        return copies[_result(parts[0])]

    def _pass_tuple(self, node: fx.Node, inputs: Mapping[fx.Node, PathFeatures]) -> PathFeatures | None:
        """Return a tuple that a node makes, or the tensor that it takes out of one; None for other nodes."""
        if node.target is tuple:
            parts = [part for part in inputs.values() if isinstance(part, PathNodes)]
            return PathTuple(tuple(parts)) if len(parts) == len(cast(list[Any], node.args[0])) else None
        if node.target is not operator.getitem or not isinstance(index := node.args[1], int):
            return None
        source = inputs[cast(fx.Node, node.args[0])]
        if isinstance(source, PathTuple):
            return source.parts[index]
        if source.joined or source.shared:
            return None
        return PathNodes(
            tuple(self.graph.call_function(operator.getitem, (one, index)) for one in source.nodes)
        )

    def _add_joined_node(
        self,
        name: str,
        nodes: Sequence[fx.Node],
        layers: Sequence[Any],
        features: Mapping[fx.Node, PathFeatures],
    ) -> PathNodes:
        """Add one node that does the work of all paths, whose nodes have the same signature."""
        node = nodes[0]
        inputs = {source: part for source, part in features.items() if isinstance(part, PathNodes)}
        if len(inputs) < len(features):
            raise _NotJoinableError
        shared = all(features.shared for features in inputs.values())
        if shared and not _owns_tensors(node, layers[0]):
            sources = {source: features.nodes[0] for source, features in inputs.items()}
            return PathNodes((self._copy(node, sources, name, layers[0]),))
        if _reads_shape(node) and len({tuple(map(shape_of, one.all_input_nodes)) for one in nodes}) == 1:
            sources = {source: self.separate(part, len(nodes))[0] for source, part in inputs.items()}
            return PathNodes((self._copy(node, sources, name, None),))
        if node.target is torch.cat:  # of joined tensors it would mix the paths
            apart = {source: self.separate(part, len(nodes)) for source, part in inputs.items()}
            own = ({source: of[path] for source, of in apart.items()} for path in range(len(nodes)))
            return PathNodes(tuple(self._copy(node, sources, name, None) for sources in own))
        if not _separates_channels(node, layers[0]):
            raise _NotJoinableError
        layer = _merged(layers, shared)
        if isinstance(layer, FusedConv2d) and layer.groups == 1:
            sources = {source: features.nodes[0] for source, features in inputs.items()}
        else:
            sources = {
                source: self._join(part, len(layers)) if shape_of(source) else part.nodes[0]
                for source, part in inputs.items()
            }
        return PathNodes((self._copy(node, sources, name, layer),), joined=True)

    def _copy(self, node: fx.Node, sources: Mapping[fx.Node, fx.Node], name: str, target: Any) -> fx.Node:
        copied = self.graph.node_copy(node, sources.__getitem__)
        if target is not None:
            copied.target = f"{name}.{str(node.target).removeprefix('0.')}"
            # A copy, as another graph may fuse another activation into the layer.
            self._layers[copied.target] = copy.copy(target) if isinstance(target, FusedConv2d) else target
        return copied

    def _join(self, features: PathNodes, paths: int) -> fx.Node:
        nodes = features.nodes if features.joined else tuple(self.separate(features, paths))
        if len(nodes) > 1 and nodes not in self._joins:
            self._joins[nodes] = self.graph.call_function(torch.cat, (list(nodes), 1))
        return self._joins.get(nodes, nodes[0])


def _result(part: fx.GraphModule) -> fx.Node:
    (result,) = part.graph.output_node().all_input_nodes
    return result


def _signature(node: fx.Node, layer: nn.Module | None) -> tuple[Any, ...]:
    """Return what must be equal for nodes of several paths to do the same work."""
    return node.op, node.target, node.name, repr(node.args), repr(node.kwargs), repr(layer)


def _owns_tensors(node: fx.Node, layer: nn.Module | None) -> bool:
    if layer is None:
        return node.op == "get_attr"
    return any(True for _ in (*layer.parameters(), *layer.buffers()))


def _reads_shape(node: fx.Node) -> bool:
    return node.target == "size" or (node.target is getattr and node.args[1] in _SHAPES)


def _separates_channels(node: fx.Node, layer: nn.Module | None) -> bool:
    """Return whether a node on joined tensors keeps the paths separate; `_merged` ensures it for layers."""
    shapes = [shape for source in node.all_input_nodes if (shape := shape_of(source))]
    if len({(len(shape), shape[1:2]) for shape in shapes}) != 1 or len(shapes[0]) < 2:
        return False
    if isinstance(layer, nn.Linear):
        return len(shapes[0]) == 2
    if layer is not None:
        return not isinstance(layer, nn.Flatten) or layer.start_dim == 1
    if node.target not in _FUNCTIONS:
        return False
    name = getattr(node.target, "__name__", node.target)
    if name == "flatten":
        return bool((*node.args, node.kwargs.get("start_dim", 0))[1] == 1)
    if name == "mean":
        dims = (*node.args, node.kwargs.get("dim", ()))[1]
        dims = dims if isinstance(dims, tuple | list) else (dims,)
        return bool(dims) and all(isinstance(dim, int) and dim % len(shapes[0]) > 1 for dim in dims)
    return True


def _merged(layers: Sequence[Any], shared: bool) -> Any:
    """Return one layer that does the work of all, on joined features, or a convolution on shared ones."""
    first = layers[0]
    if first is None or isinstance(first, _LAYERS):
        return first
    if isinstance(first, FusedConv2d):
        bias = None if first.bias is None else torch.cat([layer.bias for layer in layers])
        groups = 1 if shared and first.groups == 1 else first.groups * len(layers)
        return FusedConv2d.like(first, torch.cat([layer.weight for layer in layers]), bias, groups)
    if type(first) is nn.BatchNorm2d and first.running_mean is not None:
        return _merged_norm(layers)
    if type(first) is nn.Linear and len(layers) > 1:
        return JoinedLinear(layers)
    raise _NotJoinableError


def _merged_norm(norms: Sequence[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    features = sum(norm.num_features for norm in norms)
    merged = nn.BatchNorm2d(features, norms[0].eps, affine=norms[0].affine, device="meta")
    states = [norm.state_dict() for norm in norms]
    state = {
        name: torch.cat([norm_state[name] for norm_state in states]) if tensor.ndim else tensor
        for name, tensor in states[0].items()
    }
    merged.load_state_dict(state, assign=True)
    return merged.eval()
