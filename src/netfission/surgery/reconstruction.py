"""Layers of a path, solved by least squares so that the path computes what the whole stage does.

A path that holds a part of the channels of a trained stage computes something else than the stage, and has
lost most of what that had learned. But features are redundant: what a layer computed from all its inputs can
be predicted from a part of them. So each layer of which a path holds a part of the inputs is solved anew, in
the order they run. Its inputs are those that the path computes, and its outputs shall be those of the whole
stage. He et al. 2017 (arXiv 1707.06168, section 3.1) reconstruct what pruning removed in this way.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from netfission.surgery.features import Features, map_tensors, tensors_of
from netfission.surgery.heads import FewerHeads, divides
from netfission.surgery.standardised import standardises
from netfission.utils.modes import in_mode, trial_copy, without_fused_transformers

# Pull towards the weights before, relative to the mean variance of the inputs (mean square without a bias).
RIDGE = 0.03
_ROUNDING = 1e-5  # the same at least, relative to their mean square
_BATCH_SIZE = 64  # images that run at once, if they hold fewer values than these
_VALUES = 2**25  # of features, or of what a layer multiplies with its weights; or those of one image
_Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


@torch.no_grad()
def reconstruct(
    path: nn.Module,
    whole: nn.Module,
    kept: Mapping[str, Mapping[int, Tensor]],
    path_features: Features,
    features: Features,
) -> list[str]:
    """Solve the layers of a path that hold a part of their inputs, in place.

    A layer keeps its weights where the images do not determine others: the squares of the differences from
    them are added to the squared errors. Layers that compute their weights from others, and grouped
    convolutions, stay as they are. Running statistics of batch norms change so that each channel of their
    output has the mean and variance that it has in the whole stage: least squares lowers the variance.

    Args:
        path: made from `whole` by `netfission.surgery.narrowing.narrowed`; runs in eval mode.
        whole: the stage or head; not changed.
        kept: what `narrowed` kept: tensor name → dimension → int64 indices.
        path_features: what the path reads, of some hundred images or more; a tensor or several.
        features: what the whole stage reads, of the same images.

    Returns:
        The names of the layers that hold a part of their inputs and stay as they are. Beside the features
        themselves and what a part computes of 64 images, at most 2^25 values are held at once, or those of
        one image if it has more.

    Example:
        A layer that reads one of two equal features takes over the weight of the other one:

        >>> whole = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> for layer in whole:
        ...     _ = nn.init.ones_(layer.weight)
        >>> kept = {"0.weight": {0: torch.tensor([0])}, "1.weight": {1: torch.tensor([0])}}
        >>> from netfission.surgery.narrowing import narrowed
        >>> path, features = narrowed(whole, kept), torch.randn(100, 1)
        >>> reconstruct(path, whole, kept, features, features)
        []
        >>> round(path[1].weight.item(), 1)
        2.0
    """
    target = trial_copy(whole)
    for part in target.modules():
        if type(part) is nn.MultiheadAttention and divides(part):
            FewerHeads.change(part)  # it runs its output projection as a layer
    # The norm of identity branches lies in a `ScatteredNorm`, which the whole stage lacks.
    known = {name for name, _ in target.named_modules()}
    size = min(_batch_size(path_features), _batch_size(features))
    unsolved = []
    with in_mode(path, target, training=False), without_fused_transformers():
        for name, times in _order(path, _batch(path_features, 0, size)).items():
            if name not in known:
                continue
            layer = path.get_submodule(name)
            calls = (
                (*of_path, *of_whole)
                for start in range(0, _count(features), size)
                for of_path, of_whole in zip(
                    _calls(path, name, times, _batch(path_features, start, size)),
                    _calls(target, name, times, _batch(features, start, size)),
                    strict=True,
                )
            )
            if isinstance(layer, _BatchNorm):
                _match(layer, calls, kept.get(f"{name}.running_mean", {}).get(0))
            elif isinstance(layer, _Layer) and 1 in kept.get(f"{name}.weight", {}):
                if _is_solvable(layer):
                    _solve(layer, calls, kept[f"{name}.weight"].get(0))
                else:
                    unsolved.append(name)
    return unsolved


@torch.no_grad()
def fit_linear(layer: nn.Linear, inputs: Tensor, outputs: Tensor) -> None:
    """Solve a linear layer by least squares, in place.

    It keeps its weights where the inputs do not determine others.

    Args:
        layer: the layer.
        inputs: what it reads, `(n, inputs)`.
        outputs: what it shall return, `(n, outputs)`.

    Example:
        >>> layer, inputs = nn.Linear(2, 1), torch.randn(1000, 2)
        >>> fit_linear(layer, inputs, inputs.sum(1, keepdim=True) + 3)
        >>> layer.weight.round(decimals=1).tolist(), round(layer.bias.item(), 1)
        ([[1.0, 1.0]], 3.0)
    """
    _solve(layer, [(inputs, layer(inputs), outputs, outputs)], None)


def in_batches(module: nn.Module, features: Features) -> Features:
    """Run a module on features, some examples at once.

    Example:
        >>> in_batches(nn.Flatten(), torch.zeros(100, 2, 2)).shape
        torch.Size([100, 4])
    """
    size = _batch_size(features)
    found = [module(_batch(features, start, size)) for start in range(0, _count(features), size)]
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    return tuple(map(torch.cat, zip(*found, strict=True)))


def _is_solvable(layer: _Layer) -> bool:
    """Return whether each output of a layer is linear in all inputs, and in the weight that it stores."""
    return getattr(layer, "groups", 1) == 1 and not is_parametrized(layer) and not standardises(layer)


def _order(module: nn.Module, features: Features) -> Counter[str]:
    """Return how often each layer and batch norm runs, in the order in which they first run."""
    ran: Counter[str] = Counter()
    hooks = [
        layer.register_forward_pre_hook(lambda _layer, _inputs, name=name: ran.update([name]))
        for name, layer in module.named_modules()
        if isinstance(layer, _Layer) or (isinstance(layer, _BatchNorm) and layer.track_running_stats)
    ]
    try:
        module(map_tensors(Tensor.clone, features))
    finally:
        for hook in hooks:
            hook.remove()
    return ran


class _AllCalls(BaseException):  # which no module catches
    """Ends a run of a module after the last call of a layer."""


def _calls(module: nn.Module, name: str, times: int, features: Features) -> list[tuple[Tensor, Tensor]]:
    """Return the input and the output of each of so many calls of a layer, and run nothing after them."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(_layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls.append((inputs[0].clone(), output.clone()))  # what comes next may overwrite them
        if len(calls) == times:
            raise _AllCalls

    hook = module.get_submodule(name).register_forward_hook(note)
    try:
        with suppress(_AllCalls):
            module(features)
    finally:
        hook.remove()
    return calls


def _count(features: Features) -> int:
    return len(features if isinstance(features, Tensor) else features[0])


def _batch_size(features: Features) -> int:
    """Return how many examples run at once."""
    values = sum(math.prod(tensor.shape[1:]) for tensor in tensors_of(features))
    return max(1, min(_BATCH_SIZE, _VALUES // max(1, values)))


def _batch(features: Features, start: int, size: int) -> Features:
    """Return a copy of some examples."""
    return map_tensors(lambda tensor: tensor[start : start + size].clone(), features)


# Input and output of a layer in the path, and those in the whole stage.
_Calls = Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]


def _match(norm: _BatchNorm, calls: _Calls, kept: Tensor | None) -> None:
    """Change the running statistics of a batch norm so that its output has the moments of the whole stage's.

    Args:
        norm: changed in place.
        calls: of each batch.
        kept: int64, the channels of the whole stage that the path holds; None if it holds all.
    """
    count = 0
    sums = torch.zeros(4, norm.num_features, dtype=torch.float64)  # of values and squares, for both
    for inputs, _, of_whole, _ in calls:
        of_whole = of_whole if kept is None else of_whole.index_select(1, kept.to(of_whole.device))
        rows = [_rows(tensor, 1).cpu().double() for tensor in (inputs, of_whole)]
        sums += torch.stack([moment for values in rows for moment in (values.sum(0), values.square().sum(0))])
        count += len(rows[0])
    mean, square, mean_of_whole, square_of_whole = sums / count
    variance, variance_of_whole = square - mean.square(), square_of_whole - mean_of_whole.square()
    moves = (variance > norm.eps * square) & (variance_of_whole > norm.eps * square_of_whole)
    scale = torch.where(moves, variance / variance_of_whole, 1.0)
    assert norm.running_mean is not None and norm.running_var is not None
    shift = mean_of_whole - norm.running_mean.cpu().double()
    norm.running_mean.copy_(mean - shift * scale.sqrt())
    norm.running_var.copy_(((norm.running_var.cpu().double() + norm.eps) * scale - norm.eps).clamp(min=0))


def _solve(layer: _Layer, calls: _Calls, kept: Tensor | None) -> None:
    """Solve a layer by least squares.

    Args:
        layer: its weight and bias are changed in place.
        calls: of each batch.
        kept: int64, the outputs of the whole stage that the path holds; None if it holds all.
    """
    weight, bias = layer.weight, layer.bias
    before = weight.flatten(1).cpu().double()
    gram = before.new_zeros(before.shape[1], before.shape[1])
    errors = before.new_zeros(before.shape[1], len(before))
    of_bias = before.new_zeros(len(before))
    count = 0
    sums = before.new_zeros(before.shape[1])
    for inputs, outputs, _, wanted in calls:
        dim = inputs.ndim - 1 if isinstance(layer, nn.Linear) else inputs.ndim - weight.ndim + 1
        wanted = wanted if kept is None else wanted.index_select(dim, kept.to(wanted.device))
        of_image = before.shape[1] * outputs.numel() // (len(before) * len(outputs))  # values of its patches
        size = len(inputs) if dim == 0 else max(1, min(len(inputs), _VALUES // of_image))
        for some_inputs, some_missing in zip(inputs.split(size), (wanted - outputs).split(size), strict=True):
            rows = _rows(_patches(layer, some_inputs), dim)
            missing = _rows(some_missing, dim)
            gram += (rows.T @ rows).cpu().double()
            errors += (rows.T @ missing).cpu().double()
            sums += rows.sum(0).cpu().double()
            of_bias += missing.sum(0).cpu().double()
            count += len(rows)
    mean, shift = sums / count, of_bias / count
    smallest = _ROUNDING * gram.diagonal().mean()  # where inputs hardly vary, the rest is rounding
    if bias is not None:  # which takes the mean error
        gram -= count * mean.outer(mean)
        errors -= count * mean.outer(shift)
    ridge = RIDGE * gram.diagonal().mean().clamp(min=0)
    gram.diagonal().add_(ridge + smallest + torch.finfo(torch.float32).tiny)
    change = torch.linalg.solve(gram, errors).T
    weight.copy_((before + change).view_as(weight))
    if bias is not None:
        bias.add_((shift - change @ mean).to(bias))


def _patches(layer: _Layer, inputs: Tensor) -> Tensor:
    """Return what a layer multiplies with its weights: the output for weights that copy one input each."""
    width = layer.weight[0].numel()
    eye = torch.eye(width, dtype=inputs.dtype, device=inputs.device).view(width, *layer.weight.shape[1:])
    values = {"weight": eye} | ({} if layer.bias is None else {"bias": eye.new_zeros(width)})
    patches: Tensor = functional_call(layer, values, inputs)
    return patches


def _rows(tensor: Tensor, dim: int) -> Tensor:
    """Return a tensor as a matrix of one row per position, in float32."""
    return tensor.movedim(dim, -1).flatten(0, -2).float()
