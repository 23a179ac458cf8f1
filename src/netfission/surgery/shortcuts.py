"""Shortcuts: layers that lead around the main branch of a residual block, found in the graph of a stage."""

import copy
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_

import torch
from torch import nn
from torch.autograd.graph import Node

from netfission.surgery.features import Features, map_tensors, tensors_of
from netfission.surgery.masks import prunable_weights


def shortcut_weights(stage: nn.Module, features: Features) -> set[str]:
    """Return the prunable weights that are the projection of a shortcut.

    A shortcut and the main branch of its block begin at one tensor and are added at their ends. The
    shortcut has a single prunable layer, the main branch at least two.

    Args:
        stage: features → features; not changed.
        features: an example of its input, batch first.

    Example:
        >>> from netfission.models.cifar_resnet import BasicBlock
        >>> shortcut_weights(BasicBlock(4, 8, stride=2), torch.zeros(1, 4, 8, 8))
        {'shortcut.0.weight'}
    """
    trial = copy.deepcopy(stage).requires_grad_(True).eval()
    with torch.enable_grad():
        output = trial(map_tensors(lambda tensor: tensor[:1].detach().clone(), features))
    bits = {id(weight): 1 << bit for bit, weight in enumerate(prunable_weights(trial).values())}
    before = _weights_before([tensor.grad_fn for tensor in tensors_of(output)], bits)
    found = 0
    for node in before:
        ends = [end for end, _ in node.next_functions if end is not None]
        if not node.name().startswith("AddBackward") or len(ends) < 2:
            continue
        left, right = (before[end] for end in ends)
        side, main = sorted((left & ~right, right & ~left), key=int.bit_count)
        if side.bit_count() == 1 < main.bit_count():
            found |= side
    return {name for bit, name in enumerate(prunable_weights(trial)) if found >> bit & 1}


def _weights_before(last: Sequence[Node | None], bits: Mapping[int, int]) -> dict[Node, int]:
    """Return each node of an autograd graph → the weights that it depends on, as a set of bits.

    Args:
        last: the nodes of the outputs.
        bits: id of each weight → its bit.
    """
    before: dict[Node, int] = {}
    waiting = list(last)
    while waiting:
        node = waiting[-1]
        if node is None or node in before:
            waiting.pop()
            continue
        earlier = [end for end, _ in node.next_functions if end is not None]
        missing = [end for end in earlier if end not in before]
        waiting += missing
        if not missing:
            own = bits.get(id(getattr(node, "variable", None)), 0)
            before[node] = reduce(or_, (before[end] for end in earlier), own)
    return before
