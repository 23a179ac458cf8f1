"""Trace a part of a network into a graph of PyTorch's own layers, and fold batch norms into other layers."""

import copy
import inspect
import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from netfission.inference.deployment.convolution import FusedConv2d
from netfission.surgery.tracing import ModuleTracer
from netfission.utils.inputs import Inputs, cloned

_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_CHECKS = {getattr, operator.eq, operator.getitem, operator.and_}  # of which assertions consist


class SamePadding(nn.Module):
    """Zeros around features as TensorFlow's "SAME": a convolution gives `ceil(size / stride)`.

    Args:
        convolution: that follows; its own padding does not count.

    Example:
        >>> SamePadding(nn.Conv2d(1, 1, 3, stride=2))(torch.zeros(1, 1, 8, 7)).shape
        torch.Size([1, 1, 9, 9])
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        windows = zip(convolution.kernel_size, convolution.dilation, strict=True)
        self.reach = [(size - 1) * dilation + 1 for size, dilation in windows]
        self.stride = convolution.stride

    def forward(self, features: Tensor) -> Tensor:
        """Pad the features `(batch, channels, height, width)`."""
        padding: list[int] = []
        for size, reach, stride in zip(features.shape[2:], self.reach, self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            padding = [total // 2, total - total // 2, *padding]  # the last dimension comes first
        return F.pad(features, padding)

    def extra_repr(self) -> str:
        """Return what the padding depends on: layers of equal text do the same."""
        return f"reach={self.reach}, stride={self.stride}"


def folded(part: nn.Module, features: Inputs) -> fx.GraphModule:
    """Trace a part in eval mode, and fold its batch norms.

    Assertions, dropout and identities are removed. A batch norm that is the only reader of a convolution or
    linear layer becomes part of it. Convolutions become `FusedConv2d`. Modules that cannot be traced stay
    whole.

    Args:
        part: in eval mode; its layers are reused, not copied.
        features: an example of its input, by which every node learns its shape, see `shape_of`.

    Returns:
        The graph as a module, features → features or logits.

    Example:
        >>> part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> graph = folded(part, torch.zeros(1, 3, 8, 8))
        >>> [type(layer_of(graph, node)).__name__ for node in graph.graph.nodes if node.op == "call_module"]
        ['FusedConv2d', 'ReLU']
    """
    root = nn.Sequential(part).eval()  # so that hooks of the part itself are traced
    graph = fx.GraphModule(root, _LayerTracer().trace(root))
    _erase_unused(graph.graph)
    _gather_results(graph)
    for node in list(graph.graph.nodes):
        if _pads_same(layer_of(graph, node)):
            _separate_padding(graph, node)
    ShapeProp(graph).propagate(cloned(features))
    for node in list(graph.graph.nodes):
        if node.target is F.batch_norm:
            _convert_norm(graph, node)
    calls = Counter(node.target for node in graph.graph.nodes)
    for node in list(graph.graph.nodes):
        layer = layer_of(graph, node)
        if isinstance(layer, _IDENTITIES):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.graph.erase_node(node)
        elif isinstance(layer, _BatchNorm):
            _fold_norm(graph, node, layer, calls)
    _erase_unused(graph.graph)
    for node in graph.graph.nodes:
        layer = layer_of(graph, node)
        if calls[node.target] == 1 and type(layer) is nn.Conv2d and _is_plain(layer):
            graph.set_submodule(node.target, FusedConv2d.like(layer, layer.weight, layer.bias))
    graph.recompile()
    return graph


class _LayerTracer(ModuleTracer):
    """Traces down to PyTorch's own layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return fx.Tracer.is_leaf_module(self, m, module_qualified_name)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's tensor; empty if its value is not a tensor."""
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def layer_of(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls; None if it calls none."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def target_of(graph: fx.GraphModule, node: fx.Node) -> Any:
    """Return the module or tensor that a node refers to by name."""
    return operator.attrgetter(str(node.target))(graph)


def _erase_unused(graph: fx.Graph) -> None:
    """Erase assertions with the nodes that only they read, and tensors that nothing reads."""
    for node in reversed(list(graph.nodes)):
        unused = not node.users and (node.op == "get_attr" or node.target in _CHECKS)
        if node.target is torch._assert or unused:
            graph.erase_node(node)


def _gather_results(graph: fx.GraphModule) -> None:
    """Let one node hold the output, if it is a tuple."""
    output = graph.graph.output_node()
    if isinstance(output.args[0], tuple):
        with graph.graph.inserting_before(output):
            output.args = (graph.graph.call_function(tuple, (list(output.args[0]),)),)


def _pads_same(layer: nn.Module | None) -> bool:
    """Return whether a layer is timm's `Conv2dSame`, which is told by its name: timm is an extra."""
    kind = type(layer)
    return kind.__name__ == "Conv2dSame" and kind.__module__.startswith("timm.")


def _separate_padding(graph: fx.GraphModule, node: fx.Node) -> None:
    """Replace a convolution that pads its input by a padding and a plain convolution."""
    layer: Any = layer_of(graph, node)
    plain = nn.Conv2d(1, 1, layer.kernel_size, layer.stride, 0, layer.dilation, device="meta")
    plain.in_channels, plain.out_channels, plain.groups = layer.in_channels, layer.out_channels, layer.groups
    plain.weight, plain.bias = layer.weight, layer.bias
    with graph.graph.inserting_before(node):
        graph.add_submodule(node.name + "_padding", SamePadding(layer))
        padded = graph.graph.call_module(node.name + "_padding", node.args)
    graph.add_submodule(node.name + "_plain", plain)
    node.target, node.args = node.name + "_plain", (padded,)


def _convert_norm(graph: fx.GraphModule, node: fx.Node) -> None:
    """Replace a call of the function `batch_norm` with running statistics by a layer."""
    bound = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    source, *rest = bound.arguments.values()
    mean, variance, weight, bias, training, _, eps = (
        target_of(graph, value) if isinstance(value, fx.Node) and value.op == "get_attr" else value
        for value in rest
    )
    if training is not False or not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return
    affine = weight is not None
    layer = _NORMS[len(shape_of(node))](len(mean), eps, affine=affine, device="meta").eval()
    layer.running_mean, layer.running_var, layer.weight, layer.bias = mean, variance, weight, bias
    graph.add_submodule(node.name + "_layer", layer)
    node.op, node.target, node.args, node.kwargs = "call_module", node.name + "_layer", (source,), {}


def _fold_norm(graph: fx.GraphModule, node: fx.Node, norm: _BatchNorm, calls: Counter[Any]) -> None:
    (source,) = node.all_input_nodes
    if len(source.users) > 1 or calls[source.target] > 1 or norm.running_mean is None:
        return
    layer: Any = layer_of(graph, source)
    fuse: Any
    if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        fuse = fuse_conv_bn_weights
    elif type(layer) is nn.Linear and len(shape_of(source)) == 2:
        fuse = fuse_linear_bn_weights
    else:
        return
    merged = copy.copy(layer)
    merged._parameters = dict(layer._parameters)
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    merged.weight, merged.bias = fuse(layer.weight, layer.bias, *statistics)
    graph.set_submodule(str(source.target), merged)
    node.replace_all_uses_with(source)
    graph.graph.erase_node(node)


def _is_plain(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
