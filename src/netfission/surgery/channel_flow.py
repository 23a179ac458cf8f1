"""Follow channels through the operations of a stage: which elements of its tensors depend on each other.

A stage runs once, on an example. Beside each tensor runs one of labels: each output channel of a layer gets a
label of its own, and operations pass the labels on. Where two labels meet (in a sum, a product, a norm, a
softmax), they are *tied*: either both channels stay or neither does. What no layer made, such as the features
that the stage reads, cannot be left out, and neither can what is tied to it. So all work is proportional to
that of one run. Heads of attention, halves of gates and shuffled channels need no rules of their own: they
come out as the labels that are tied.

Example:
    A softmax over pairs of channels ties the two of each pair:

    >>> stage = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (2, 2)), nn.Softmax(2), nn.Flatten())
    >>> flow = follow(stage, torch.zeros(1, 2))
    >>> flow.parts["0.weight", 0].labels.tolist()
    [1, 2, 3, 4]
    >>> [pairs.t().tolist() for pairs in flow.pairs][0]
    [[1, 2], [3, 4]]
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from netfission.surgery.heads import divides
from netfission.utils.modes import in_mode, without_fused_transformers

aten = torch.ops.aten
WHOLE = 0  # the label of what cannot be left out
TORCH_ATTENTION = "nn.MultiheadAttention has several input projections, or keys that are added to the others"


@dataclass(frozen=True)
class Part:
    """Where labels lie in a parameter or buffer.

    Attributes:
        tensor: its name.
        dim: the dimension they lie along.
        labels: int64 `(size of that dimension,)`.
        makes: whether it is the weight of a layer whose outputs these are.
        scattered: whether it belongs to a norm whose output stays whole, see `follow`.
    """

    tensor: str
    dim: int
    labels: Tensor
    makes: bool = False
    scattered: bool = False


@dataclass
class Flow:
    """What a run has found.

    Attributes:
        parts: tensor and dimension → where labels lie, in the order of the run.
        loose: parameter or buffer that is used outside a layer → labels of all its elements.
        pairs: int64 `(2, n)` tensors: labels that are tied.
        reasons: label → why what is tied to it cannot be left out.
        identities: names of the batch norms in identity branches (RepVGG, MobileOne). No layer makes their
            input, layers read it too, and their output is added to other features.
        count: number of labels.
    """

    parts: dict[tuple[str, int], Part] = field(default_factory=dict)
    loose: dict[str, Tensor] = field(default_factory=dict)
    pairs: list[Tensor] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    identities: list[str] = field(default_factory=list)
    count: int = 1

    def fresh(self, number: int) -> Tensor:
        """Return new labels."""
        labels = torch.arange(self.count, self.count + number)
        self.count += number
        return labels

    def add(self, part: Part) -> None:
        """Add a part; if it is there already, as of a layer that runs twice, both are tied."""
        present = self.parts.setdefault((part.tensor, part.dim), part)
        self.tie(present.labels, part.labels)

    def refusal(self, reason: str) -> Tensor:
        """Return a label of what cannot be left out for this reason."""
        label = self.fresh(1)
        self.reasons[int(label)] = reason
        return label

    def tie(self, first: Tensor, second: Tensor) -> None:
        """Tie labels that stand at the same place; the tensors are broadcast."""
        first, second = torch.broadcast_tensors(first, second)
        differ = (first != second) & (first >= 0) & (second >= 0)
        pairs = torch.stack([first[differ], second[differ]])
        if pairs.shape[1]:
            self.pairs.append(torch.unique(pairs, dim=1) if pairs.shape[1] > 10_000 else pairs)

    def keep(self, labels: Tensor) -> None:
        """Tie labels to what is whole."""
        self.tie(labels, torch.tensor(WHOLE))

    def merge(self, labels: Tensor, dims: Iterable[int]) -> Tensor:
        """Tie all labels along some dimensions, which keep the size 1."""
        dims = [dim for dim in dims if labels.shape[dim] > 1]
        if not dims:
            return labels
        merged = labels.amax(dims, keepdim=True)
        self.tie(labels, merged)
        return merged


def follow(stage: nn.Module, features: Any, scattered: str | None = None) -> Flow:
    """Run a stage in eval mode, and return which of its channels are tied.

    Args:
        stage: features → features, in float32; parameters are not changed.
        features: an example of its input, a tensor or several; all of it is whole, and so is the output.
        scattered: one of `Flow.identities`, whose input may have fewer channels than its output: see
            `netfission.surgery.narrowing.ScatteredNorm`.
    """
    flow = Flow()
    mode = _Follow(stage, flow, scattered)
    unfused = without_fused_transformers()
    with unfused, torch.no_grad(), in_mode(stage, training=False), mode.layers_marked(), mode:
        inputs = tree_map_only(Tensor, lambda tensor: tensor.clone(), features)
        for tensor in tree_leaves(inputs):
            mode.label(tensor, [])
        output = stage(inputs)
    for tensor in tree_leaves(output):
        for labels in mode.labels_of(tensor):
            flow.keep(labels)
    for part in flow.parts.values():
        if part.tensor in flow.loose:
            flow.tie(flow.loose[part.tensor].movedim(part.dim, -1), part.labels)
    return flow


# --- labels of one tensor ---------------------------------------------------------------------------
#
# The labels of a tensor are a list, usually of one tensor of the same number of dimensions. A dimension along
# which the labels do not change has the size 1. Several are independent: each element belongs to a channel by
# each of them, as the hidden units of an MLP over tokens, which belong to a token unit and to a channel.

Labels = list[Tensor]


def _varies(labels: Tensor) -> list[int]:
    return [dim for dim, size in enumerate(labels.shape) if size > 1]


def _compact(labels: Tensor) -> Tensor:
    """Return the labels without copies along dimensions where they do not change."""
    for dim, size in enumerate(labels.shape):
        if size > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == first).all()):
                labels = first
    return labels


def _padded(labels: Tensor, ndim: int) -> Tensor:
    return labels.reshape((1,) * (ndim - labels.ndim) + tuple(labels.shape))


def _padded_along(labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the labels of a tensor padded with zeros, which have none; they do not tell positions apart."""
    dims = [labels.ndim - 1 - index // 2 for index in range(len(sizes))]
    along = [size if labels.shape[dim] > 1 else 0 for size, dim in zip(sizes, dims, strict=True)]
    with _disable_current_modes():
        return nn.functional.pad(labels, along, value=-1)


def _overlap(first: Tensor, second: Tensor) -> bool:
    return any(one > 1 and other > 1 for one, other in zip(first.shape, second.shape, strict=True))


_SAME = {
    aten.clone, aten.detach, aten.alias, aten._to_copy, aten.contiguous, aten.lift_fresh, aten.dropout,
    aten.native_dropout, aten.to, aten.zero_, aten.fill_,
}  # fmt: skip
_MOVES = {
    aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.permute, aten.transpose, aten.t,
    aten.expand, aten.unsqueeze, aten.squeeze, aten.slice, aten.select, aten.split, aten.split_with_sizes,
    aten.unbind, aten.chunk, aten.narrow, aten.roll, aten.flip, aten.index, aten.index_select, aten.gather,
    aten.repeat, aten.constant_pad_nd, aten.pixel_shuffle, aten.pixel_unshuffle, aten.unfold, aten.im2col,
    aten.channel_shuffle, aten.native_channel_shuffle, aten.diagonal, aten.movedim, aten.rot90,
    aten.reflection_pad1d, aten.reflection_pad2d, aten.replication_pad2d,
}  # fmt: skip
_VIEWS = {aten.view, aten._unsafe_view, aten._reshape_alias}
_SPATIAL = {
    aten.avg_pool1d: 1, aten.adaptive_avg_pool1d: 1, aten.max_pool1d: 1, aten.upsample_nearest1d: 1,
    aten.avg_pool2d: 2, aten.adaptive_avg_pool2d: 2, aten._adaptive_avg_pool2d: 2,
    aten.max_pool2d_with_indices: 2, aten.max_pool2d: 2, aten.adaptive_max_pool2d: 2,
    aten.upsample_nearest2d: 2, aten.upsample_bilinear2d: 2, aten.upsample_bicubic2d: 2,
    aten._upsample_bilinear2d_aa: 2, aten._upsample_bicubic2d_aa: 2, aten._upsample_nearest_exact2d: 2,
    aten.avg_pool3d: 3, aten._adaptive_avg_pool3d: 3, aten.max_pool3d_with_indices: 3,
}  # fmt: skip
_ALONG = {aten._softmax, aten._safe_softmax, aten._log_softmax, aten.cumsum, aten.sort}
_POINTWISE = {"_prelu_kernel", "masked_fill", "where", "copy", "rsub", "hardswish", "hardtanh"}
_REDUCTIONS = {
    aten.mean, aten.sum, aten.amax, aten.amin, aten.max, aten.min, aten.prod, aten.var, aten.std,
    aten.var_mean, aten.linalg_vector_norm, aten.norm, aten.logsumexp, aten.argmax, aten.any, aten.all,
}  # fmt: skip
_NORMS = {
    aten.native_batch_norm: 1, aten._native_batch_norm_legit_no_training: 1, aten._native_batch_norm_legit: 1,
    aten.native_group_norm: 1, aten.native_layer_norm: -1, aten._fused_rms_norm: -1,
}  # fmt: skip
_ADDITIONS = {aten.add, aten.add_}
_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
}


# What a rule may raise for an operation that is called with other arguments than it expects.
_UNEXPECTED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)


class _Follow(TorchDispatchMode):
    """A context that follows the channels of all that runs within."""

    def __init__(self, stage: nn.Module, flow: Flow, scattered: str | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stage = stage
        self._flow = flow
        self._scattered = scattered
        self._made: Any = WeakTensorKeyDictionary()  # outputs of layers
        self._read: Any = WeakTensorKeyDictionary()  # inputs of layers
        self._branches: Any = WeakTensorKeyDictionary()  # output of a batch norm → its name and input
        self._labels: Any = WeakTensorKeyDictionary()
        self._names = {id(tensor): name for name, tensor in stage.named_parameters()}
        self._names |= {id(tensor): name for name, tensor in stage.named_buffers()}
        self._from_parameters: Any = WeakTensorKeyDictionary()
        self._transposed: Any = WeakTensorKeyDictionary()  # the transpose of a parameter → its name

    # --- tensors and their labels -------------------------------------------------------------------

    def label(self, tensor: Tensor, labels: Labels) -> None:
        """Set the labels of a tensor; one label for all of it would tell nothing apart."""
        self._labels[tensor] = [one for one in labels if _varies(one)]

    def labels_of(self, tensor: Any) -> Labels:
        """Return the labels of a tensor; parameters get some when they are first read outside a layer."""
        if not isinstance(tensor, Tensor):
            return []
        if tensor in self._labels:
            return self._labels[tensor]  # type: ignore[no-any-return]
        name = self._names.get(id(tensor))
        if name is None or tensor.numel() < 2 or not tensor.is_floating_point():
            return []
        if name not in self._flow.loose:
            self._flow.loose[name] = self._flow.fresh(tensor.numel()).view(tensor.shape)
        self._from_parameters[tensor] = True
        return [self._flow.loose[name]]

    def _is_followed(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor in self._labels

    def _is_parameter(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor in self._from_parameters

    # --- layers -------------------------------------------------------------------------------------

    @contextmanager
    def layers_marked(self) -> Iterator[None]:
        """Run convolutions and linear layers as one operation each, whatever they do to their weights."""
        layers = [
            (name, part)
            for name, part in self._stage.named_modules()
            if isinstance(part, _LAYERS) or is_norm(part)
        ]
        for name, layer in layers:
            layer.forward = _marked(self, name, layer, layer.forward)
        try:
            yield
        finally:
            for _, layer in layers:
                del layer.forward

    def run_layer(
        self, name: str, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a layer, and label what it returns."""
        with _disable_current_modes():
            result = forward(*args, **kwargs)
        (features, *_), prefix = (*args, *kwargs.values()), name and f"{name}."
        if is_norm(layer):
            self.label(result, self._through_norm(prefix, layer, features))
            return result
        if isinstance(layer, nn.MultiheadAttention):
            self._torch_attention(prefix, layer, [*args, *kwargs.values()])
            self.label(result[0], [])
            return result
        own = [
            prefix + key
            for key, tensor in (*layer._parameters.items(), *layer._buffers.items())
            if tensor is not None and tensor.ndim and key != "weight"
            and tensor.shape[0] == layer.weight.shape[0]  # type: ignore[index]
        ]  # fmt: skip
        groups = getattr(layer, "groups", 1)
        dim = features.ndim - 1 if isinstance(layer, nn.Linear) else features.ndim - layer.weight.ndim + 1
        self._layer(prefix + "weight", own, features, result, dim, groups, isinstance(layer, nn.Linear))
        return result

    def _torch_attention(self, prefix: str, attention: nn.MultiheadAttention, inputs: Sequence[Any]) -> None:
        """Label the heads of an attention, which reads and returns what stays whole."""
        if not divides(attention):
            self._refuse(inputs, TORCH_ATTENTION)
            return
        for tensor in inputs:
            for labels in self.labels_of(tensor):
                self._flow.keep(labels)
        heads = self._flow.fresh(attention.num_heads).repeat_interleave(attention.head_dim)
        self._flow.add(Part(f"{prefix}in_proj_weight", 0, heads.repeat(3), makes=True))
        if attention.in_proj_bias is not None:
            self._add_all([f"{prefix}in_proj_bias"], heads.repeat(3))
        self._flow.add(Part(f"{prefix}out_proj.weight", 1, heads))

    def _layer(
        self,
        weight: str,
        others: Sequence[str],
        features: Tensor,
        result: Tensor,
        dim: int,
        groups: int,
        rows: bool,
    ) -> None:
        """Label the outputs of a layer.

        Args:
            weight: name of its weight.
            others: names of tensors with one entry per output.
            features: what it reads.
            result: what it returns.
            dim: the dimension of the channels in both.
            groups: of a convolution.
            rows: whether it maps each position alone.
        """
        flow, inputs = self._flow, features.shape[dim]
        along: Tensor | None = None  # labels of the input channels
        passed: Labels = []
        for labels in self.labels_of(features):
            if labels.shape[dim] > 1:
                vector = flow.merge(labels, (d for d in _varies(labels) if d != dim)).flatten()
                if along is not None:
                    flow.tie(vector, along)
                along = along if along is not None else vector
            elif rows:
                passed.append(labels)
            else:
                flow.keep(labels)
        made = flow.fresh(result.shape[dim])
        if groups > 1:
            sources = along if along is not None else torch.full((inputs,), WHOLE)
            merged = flow.merge(torch.where(sources < 0, WHOLE, sources).view(groups, -1), [1])
            flow.tie(made.view(groups, -1), merged)
        elif along is not None:
            flow.add(Part(weight, 1, along))
        flow.add(Part(weight, 0, made, makes=True))
        self._add_all(others, made)
        shape = [1] * result.ndim
        shape[dim] = -1
        self._made[result] = self._read[features] = True
        self.label(result, [made.view(shape), *passed])

    def _through_norm(self, prefix: str, norm: nn.Module, features: Tensor) -> Labels:
        """Return the labels of features that a module normalises over the channels."""
        result: Labels = []
        for labels in self.labels_of(features):
            varying = _varies(labels)
            sizes = {tensor.numel() for tensor in norm.parameters()}
            channel = next((dim for dim in varying if features.shape[dim] in sizes), None)
            if channel is None:
                result.append(self._flow.merge(labels, varying))
            elif len(varying) > 1:  # the same norm for each head
                result.append(self._flow.merge(labels, [channel]))
            else:
                for key, tensor in (*norm._parameters.items(), *norm._buffers.items()):
                    if tensor is not None and tensor.numel() == features.shape[channel]:
                        dim = next(d for d, size in enumerate(tensor.shape) if size > 1)
                        self._flow.add(Part(prefix + key, dim, labels.flatten()))
                result.append(labels)
        return [labels for labels in result if _varies(labels)]

    # --- operations ---------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and label its results."""
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(self._is_followed(tensor) or id(tensor) in self._names for tensor in tensors):
            return result
        named = _bound(func, args, kwargs)
        kind = func.overloadpacket
        if kind is aten.t and id(args[0]) in self._names:
            self._transposed[result] = self._names[id(args[0])]
            return result
        try:
            found = self._results(kind, func, named, args, kwargs, tensors, result)
        except _UNEXPECTED:
            found = None
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if found is None:
            if not any(self._is_followed(tensor) for tensor in tensors):
                return result  # a parameter is prepared for a layer
            self._refuse(tensors, f"its channels pass through {kind.__name__}, which is not followed")
            found = [[] for _ in outputs]
        parameters = all(self._is_parameter(t) or not self._is_followed(t) for t in tensors)
        for index, tensor in enumerate(outputs):
            labels = found[index] if index < len(found) else []
            self.label(tensor, [_compact(one) for one in labels])
            if parameters:
                self._from_parameters[tensor] = True
        return result

    def _results(
        self,
        kind: Any,
        func: Any,
        named: Mapping[str, Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: Sequence[Tensor],
        result: Any,
    ) -> list[Labels] | None:
        """Return the labels of each tensor that an operation returns; None if it cannot be followed."""
        flow = self._flow
        first: Any = args[0] if args else None
        if kind in _SAME:
            return [self.labels_of(first)] * 2
        if kind in (aten.cat, aten.stack):
            return [self._joined(kind, args[0], named.get("dim", 0), result)]
        if kind in _MOVES:
            return self._moved(kind, func, args, kwargs)
        if kind in _PRODUCTS:
            return [self._product(kind, args, result)]
        if kind in _ATTENTION:
            mask = named.get("attn_mask", named.get("attn_bias"))
            return [self._attention(args[0], args[1], args[2], mask)]
        if kind in _NORMS:
            return [self._normed(named, _NORMS[kind], result)]
        if kind in _SPATIAL:
            dims = range(first.ndim - _SPATIAL[kind], first.ndim)
            return [[flow.merge(labels, dims) for labels in self.labels_of(first)]] * 2
        if kind in _ALONG:
            dim = named.get("dim", -1) % first.ndim
            return [[flow.merge(labels, [dim]) for labels in self.labels_of(first)]] * 2
        if kind in _ADDITIONS:
            branches = [self._branches[tensor] for tensor in tensors if tensor in self._branches]
            flow.identities += [name for name, features in branches if features in self._read]
        if _is_pointwise(func):
            return [self._combined([t for t in args if isinstance(t, Tensor)], result.ndim)]
        if kind in _REDUCTIONS:
            return self._reduced(named, first, tree_leaves(result))
        return None

    def _moved(self, kind: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Labels]:
        """Labels move as the elements do."""
        source, rest = args[0], list(args[1:])
        if kind is aten.constant_pad_nd:
            return [[_padded_along(labels, rest[0]) for labels in self.labels_of(source)]]
        outputs: list[Labels] = []
        for labels in self.labels_of(source):
            # Some operations take no integers, and pad with 0: so labels begin at 0 here.
            whole = (labels + 1).double().expand(source.shape)
            with _disable_current_modes():
                moved = whole.reshape(rest[0]) if kind in _VIEWS else func(whole, *rest, **kwargs)
            for index, tensor in enumerate([moved] if isinstance(moved, Tensor) else moved):
                if index == len(outputs):
                    outputs.append([])
                outputs[index].append(_compact(tensor.long() - 1))
        return outputs

    def _joined(self, kind: Any, tensors: Sequence[Tensor], dim: int, result: Tensor) -> Labels:
        """Labels of tensors that are concatenated or stacked."""
        flow, dim = self._flow, dim % result.ndim
        tensors = [tensor for tensor in tensors if tensor.numel()] or tensors
        if kind is aten.stack:
            sized = [tensor.unsqueeze(dim) for tensor in tensors]
            of_each = [[labels.unsqueeze(dim) for labels in self.labels_of(tensor)] for tensor in tensors]
        else:
            sized, of_each = list(tensors), [self.labels_of(tensor) for tensor in tensors]
        along: list[Tensor] = []
        rows: Labels = []
        for of_one in of_each:
            varying = [labels for labels in of_one if labels.shape[dim] > 1]
            for labels in varying[1:]:
                flow.tie(labels, varying[0])
            along.append(varying[0] if varying else torch.full([1] * result.ndim, WHOLE))
            for labels in of_one:
                if labels.shape[dim] == 1:
                    match = next((row for row in rows if _overlap(row, labels)), None)
                    if match is None:
                        rows.append(labels)
                    else:
                        flow.tie(match, labels)
        for row in rows:
            for tensor, of_one in zip(sized, of_each, strict=True):
                is_missing = not any(_overlap(row, labels) for labels in of_one)
                if is_missing and any(tensor.shape[d] > 1 for d in _varies(row)):
                    flow.keep(row)
        if all(int(labels.max()) == WHOLE for labels in along):
            return rows
        shapes = [
            [
                1 if d != dim and all(one.shape[d] == 1 for one in along) else size
                for d, size in enumerate(tensor.shape)
            ]
            for tensor in sized
        ]
        return [
            torch.cat([labels.expand(shape) for labels, shape in zip(along, shapes, strict=True)], dim),
            *rows,
        ]

    def _combined(self, tensors: Sequence[Tensor], ndim: int) -> Labels:
        """Labels of an operation element by element: those at the same place are tied."""
        flow = self._flow
        operands = []
        for tensor in tensors:
            labels = [_padded(one, ndim) for one in self.labels_of(tensor)]
            shape = (1,) * (ndim - tensor.ndim) + tuple(tensor.shape)
            operands.append((labels, shape, self._is_parameter(tensor)))
        operands.sort(key=lambda operand: operand[2])  # parameters last
        result: Labels = []
        for labels, _, is_parameter in operands:
            for one in labels:
                matches = [index for index, other in enumerate(result) if _overlap(one, other)]
                if is_parameter and matches:
                    # Entries of a channel at several positions, as a table of positions has them.
                    varying = {dim for index in matches for dim in _varies(result[index])}
                    one = flow.merge(one, [dim for dim in _varies(one) if dim not in varying])
                if is_parameter:
                    # The same entry for each head: it stays, as long as one head does.
                    for index in matches:
                        held, extra = set(_varies(one)), set(_varies(result[index]))
                        if held < extra and max(held) == max(extra):
                            result[index] = flow.merge(result[index], held)
                            flow.keep(one)
                    matches = [index for index in matches if _overlap(one, result[index])]
                    if not matches and result:
                        continue
                subset = False
                for index in matches:
                    flow.tie(one, result[index])
                    held, other = set(_varies(one)), set(_varies(result[index]))
                    subset |= held <= other or other <= held
                    if bool((result[index] < 0).any()):
                        result[index] = torch.maximum(*torch.broadcast_tensors(result[index], one))
                if not subset:
                    result.append(one)
        kept: Labels = []
        for one in result:
            for labels, shape, _ in operands:
                if not any(_overlap(one, other) for other in labels):
                    covered = [dim for dim in _varies(one) if shape[dim] > 1]
                    if covered == _varies(one):
                        flow.keep(one)
                    else:
                        one = flow.merge(one, covered)
            if _varies(one):
                kept.append(one)
        return kept

    def _reduced(
        self, named: Mapping[str, Any], source: Tensor, results: Sequence[Any]
    ) -> list[Labels] | None:
        """Labels of a sum, a mean, a maximum over dimensions."""
        dims = named.get("dim")
        dims = range(source.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        dims = [dim % max(source.ndim, 1) for dim in dims]
        found: list[Labels] = []
        for result in results:
            labels = [self._flow.merge(one, dims) for one in self.labels_of(source)]
            if result.ndim < source.ndim:
                labels = [one.squeeze(tuple(dims)) for one in labels]
            elif result.shape != source.shape and any(result.shape[dim] != 1 for dim in dims):
                return None
            found.append(labels)
        return found

    def _normed(self, named: Mapping[str, Any], dim: int, results: Sequence[Tensor]) -> Labels:
        """Labels of normalised features, where the tensors of the norm belong to the channels."""
        features, flow = named["input"], self._flow
        if not self._is_followed(features):
            return []
        own = [
            self._names[id(tensor)]
            for key in ("weight", "bias", "running_mean", "running_var")
            if isinstance(tensor := named.get(key), Tensor) and id(tensor) in self._names
        ]
        norm = own[0].rpartition(".")[0] if own else None
        if norm is not None and norm == self._scattered:
            vectors = [labels.flatten() for labels in self.labels_of(features) if _varies(labels) == [dim]]
            for name, vector in itertools.product(own, vectors):
                flow.add(Part(name, 0, vector, scattered=True))
            return []
        if "running_mean" in named and features.ndim == 4 and len(own) == 4 and features not in self._made:
            self._branches[results[0]] = norm, features
        normalised = len(named.get("normalized_shape", [1]))
        several = normalised > 1
        dims = list(range(features.ndim - normalised, features.ndim)) if dim < 0 else [dim]
        result: Labels = []
        for labels in self.labels_of(features):
            others = [d for d in _varies(labels) if d not in dims]
            along = labels.shape[dims[0]] > 1 and not several
            if along and not others:
                groups = int(named.get("group", 1))
                if groups > 1:  # a group norm; with one group it is over all channels, as a layer norm
                    flow.merge(labels.reshape(groups, -1), [1])
                self._add_all(own, labels)
            elif others and dim < 0:
                labels = flow.merge(labels, dims)  # the same norm for each head
            elif along or (several and _varies(labels)):
                flow.keep(labels)
                continue
            result.append(labels)
        return result

    def _add_all(self, names: Iterable[str], labels: Tensor) -> None:
        for name in names:
            self._flow.add(Part(name, 0, labels.flatten()))

    def _product(self, kind: Any, args: Sequence[Any], result: Tensor) -> Labels:
        """Labels of a product of matrices."""
        if kind in (aten.addmm, aten.baddbmm):
            added, left, right = args[:3]
        else:
            (left, right), added = args[:2], None
        if right in self._transposed and self._is_followed(left):
            self._layer(self._transposed[right], [], left, result, left.ndim - 1, 1, rows=True)
            labels = self.labels_of(result)
        else:
            labels = self._contracted(left, self._in_product(left), right, self._in_product(right))
        if added is None:
            return labels
        with _disable_current_modes():
            product = result.detach().clone()
        self.label(product, labels)
        return self._combined([product, added], result.ndim)

    def _contracted(self, left: Tensor, of_left: Labels, right: Tensor, of_right: Labels) -> Labels:
        """Labels of `left @ right`: what meets in a sum of products is tied."""
        flow, ndim = self._flow, left.ndim
        sides: list[tuple[Labels, Labels]] = []  # of each operand: its labels, and those along the sum
        for of_one, dim in ((of_left, ndim - 1), (of_right, ndim - 2)):
            merged, summed = [], []
            for labels in of_one:
                one = flow.merge(labels, [dim])
                if labels.shape[dim] > 1:
                    summed.append(one)
                if _varies(one):
                    merged.append(one)
            sides.append((merged, summed))
        (rows, left_summed), (columns, right_summed) = sides
        for one in left_summed:
            for other in right_summed:
                if _overlap(one, other):
                    flow.tie(one, other)
                else:  # the side that all others share, as one key of several queries, is whole
                    for side in (one, other):
                        if not _varies(side):
                            flow.keep(side)
        if not left_summed or not right_summed:  # the other side has this size, too, and must keep it
            for one, others in ((o, columns) for o in left_summed):
                self._tie_to_any(one, others)
            for one, others in ((o, rows) for o in right_summed):
                self._tie_to_any(one, others)
        for one in columns:
            for other in rows:
                if _overlap(one, other):
                    flow.tie(one, other)
        return [one for one in (*rows, *columns) if _varies(one)]

    def _in_product(self, tensor: Tensor) -> Labels:
        """Return the labels of a factor; a parameter that is no layer's weight is whole."""
        labels = self.labels_of(tensor)
        if not self._is_parameter(tensor):
            return labels
        for one in labels:
            self._flow.keep(one)
        return []

    def _tie_to_any(self, labels: Tensor, others: Labels) -> None:
        """Tie labels to others at the same place, or to what is whole if there are none."""
        if labels.shape[-1] * labels.shape[-2] > 1 and max(labels.shape[:-2], default=1) == 1:
            return  # rows or columns of the product
        matches = [other for other in others if _overlap(labels, other)]
        for other in matches or [torch.tensor(WHOLE)]:
            self._flow.tie(labels, other)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Labels:
        """Labels of softmax(query @ key + mask) @ value."""
        keys = key.transpose(-1, -2)
        turned = [labels.transpose(-1, -2) for labels in self.labels_of(key)]
        scores = self._contracted(query, self.labels_of(query), keys, turned)
        with _disable_current_modes():
            weights = query.new_empty((*query.shape[:-1], key.shape[-2]))
        self.label(weights, scores)
        if isinstance(mask, Tensor):
            scores = self._combined([weights, mask], weights.ndim)
        scores = [self._flow.merge(one, [weights.ndim - 1]) for one in scores]
        return self._contracted(weights, scores, value, self.labels_of(value))

    def _refuse(self, tensors: Iterable[Any], reason: str) -> None:
        """Tie all labels of some tensors to a reason why they stay."""
        label = self._flow.refusal(reason)
        for tensor in tensors:
            if self._is_followed(tensor):
                for labels in self.labels_of(tensor):
                    self._flow.tie(labels, label)


_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.MultiheadAttention)
_KNOWN_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalisation other than PyTorch's, with parameters of its own.

    Its operations tie all channels that it normalises over. A path normalises over the channels that it has.

    Example:
        >>> is_norm(nn.LayerNorm(2))
        False
    """
    return (
        "norm" in type(module).__name__.lower()
        and not isinstance(module, _KNOWN_NORMS)
        and any(parameter is not None for parameter in module._parameters.values())
        and not any(True for child in module.children() for _ in child.parameters())
    )


def _marked(mode: _Follow, name: str, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return mode.run_layer(name, layer, forward, *args, **kwargs)

    return run


@cache
def _is_pointwise(func: Any) -> bool:
    """Return whether an operation acts element by element; the tags of those in place lack it."""
    name = func.overloadpacket.__name__.removesuffix("_")
    if name in _POINTWISE:
        return True
    out_of_place = getattr(getattr(aten, name, None), func._overloadname, func)
    return torch.Tag.pointwise in out_of_place.tags


def _bound(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operation by name."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}
