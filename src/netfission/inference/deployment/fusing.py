"""Fuse additions and activations into the convolutions before them."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from netfission.inference.deployment.convolution import FusedConv2d
from netfission.inference.deployment.folding import layer_of, shape_of
from netfission.inference.deployment.joining import JoinedLinear
from netfission.utils.inputs import Inputs

# Layers, functions and methods → their names in `FusedConv2d`.
_ACTIVATIONS: dict[Any, str] = (
    dict.fromkeys((nn.ReLU, F.relu, torch.relu, "relu", "relu_"), "relu")
    | dict.fromkeys((nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid"), "sigmoid")
    | {nn.GELU: "gelu", nn.Hardswish: "hardswish", nn.ReLU6: "relu6", nn.SiLU: "silu"}
    | {F.gelu: "gelu", F.hardswish: "hardswish", F.relu6: "relu6", F.silu: "silu"}
)
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
# Layers whose result never shares memory with their input.
_ALLOCATING = (FusedConv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.Linear, JoinedLinear)


def fuse(graph: fx.GraphModule, features: Inputs) -> None:
    """Fuse residual additions and activations into the convolutions before them, in place.

    Args:
        graph: the result of `GraphBuilder.finish`.
        features: an example of its input.
    """
    ShapeProp(graph).propagate(features)
    for node in list(graph.graph.nodes):
        if node.target in _ADDITIONS:
            _fuse_addition(graph, node)
        elif activation := _activation(graph, node):
            _fuse_activation(graph, node, activation)
    order = {node: index for index, node in enumerate(graph.graph.nodes)}
    for node in graph.graph.nodes:
        layer = layer_of(graph, node)
        if isinstance(layer, FusedConv2d) and len(node.args) > 1:
            layer.overwrites = _is_last_use(graph, node, order)
    graph.recompile()


def _activation(graph: fx.GraphModule, node: fx.Node) -> str | None:
    layer = layer_of(graph, node)
    approximate = node.kwargs.get("approximate", getattr(layer, "approximate", "none"))
    return _ACTIVATIONS.get(type(layer) if layer else node.target) if approximate == "none" else None


def _fusable(graph: fx.GraphModule, node: fx.Node) -> FusedConv2d | None:
    """Return the layer of a node, if it is a convolution without activation and one other node reads it."""
    layer = layer_of(graph, node)
    if isinstance(layer, FusedConv2d) and layer.activation is None and len(node.users) == 1:
        return layer
    return None


def _fuse_activation(graph: fx.GraphModule, node: fx.Node, activation: str) -> None:
    (source,) = node.all_input_nodes
    layer = _fusable(graph, source)
    if layer is None or (len(source.args) > 1 and activation != "relu"):  # oneDNN has no other after a sum
        return
    layer.activation = activation
    node.replace_all_uses_with(source)
    graph.graph.erase_node(node)


def _fuse_addition(graph: fx.GraphModule, node: fx.Node) -> None:
    if len(node.args) != 2 or node.kwargs or len(node.all_input_nodes) != 2:
        return
    first, second = node.all_input_nodes
    for source, residual in ((first, second), (second, first)):
        if _fusable(graph, source) and len(source.args) == 1 and shape_of(source) == shape_of(residual):
            node.op, node.target, node.args = source.op, source.target, (*source.args, residual)
            graph.graph.erase_node(source)
            return


def _is_last_use(graph: fx.GraphModule, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Return whether a convolution may overwrite its residual, as nothing else reads that memory then."""
    features, residual, *_ = node.args
    assert isinstance(residual, fx.Node)
    if features is residual:
        return False
    return (residual.target is torch.cat or isinstance(layer_of(graph, residual), _ALLOCATING)) and all(
        user is node or (order[user] < order[node] and isinstance(layer_of(graph, user), _ALLOCATING))
        for user in residual.users
    )
