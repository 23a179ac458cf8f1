"""Count the multiply-accumulates of a network as it runs.

A multiply-accumulate (MAC) is one product of two numbers added to a sum; matrix products and convolutions are
made of them. Linear and convolution layers, attention, recurrent layers and everything else made of such
products are counted, at half of what `torch.utils.flop_counter` gives if that knows the operation.

Operations without such products count as 0: element-wise operations (activations, biases, masks), norms,
pooling, softmax, resizing, copies, lookups. Any other operation without a formula here (FFT, `nn.Bilinear`,
cuDNN's recurrent layers, quantised and custom operations, …) is listed as uncounted, never dropped. Attention
is counted as if nothing were masked.

Dense MACs are those executed. Effective MACs leave out those of removed weights, each of which is used once
per output position.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from netfission.surgery.heads import heads_of, runs_directly
from netfission.surgery.masks import kept_masks, prunable_weights
from netfission.utils.inputs import Inputs, cloned, first_rows
from netfission.utils.modes import in_mode, without_fused_transformers

# Matrix products → index of the left factor among the arguments; the right one follows it.
_PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "vdot": 0}
_PRODUCTS |= {"addmm": 1, "addmv": 1, "addbmm": 1, "baddbmm": 1, "_addmm_activation": 1}
_CONVOLUTIONS = {"convolution", "_convolution"}
_ATTENTION = {
    f"_scaled_dot_product_{kind}"
    for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
}

# Operations without MACs. PyTorch tags most of them: views, `pointwise`, `reduction`, and `core`, a closed
# set. Those of `core` that do other work are counted above or named here.
_FREE_TAGS = {torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.core}
_CORE_WITH_WORK = {"_cdist_forward", "_fft_c2r", "_fft_r2c", "_pdist_forward"}
_FREE_BY_NAME = """
_assert_async _assert_scalar _assert_tensor_metadata _batch_norm_no_update _batch_norm_with_update
_embedding_bag_forward_only _masked_softmax _prelu_kernel _safe_softmax _unsafe_index _unsafe_view
_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_nearest_exact3d _weight_norm_interface adaptive_max_pool2d adaptive_max_pool3d
affine_grid_generator bernoulli bucketize channel_shuffle cudnn_batch_norm cudnn_grid_sampler cummax cummin
cumprod diag_embed empty_like empty_permuted eye floor_divide glu grid_sampler_3d hardswish im2col index_add
index_copy index_fill kthvalue lift linspace log_sigmoid_forward logcumsumexp masked_select max_unpool2d
max_unpool3d median miopen_batch_norm multinomial native_batch_norm new_empty new_empty_strided new_full
new_ones new_zeros normal ones ones_like pixel_shuffle pixel_unshuffle put rand_like randint randn_like random
renorm repeat_interleave replication_pad1d roll rot90 rrelu_with_noise searchsorted stack take tril
tril_indices triu triu_indices uniform unsafe_split unsafe_split_with_sizes upsample_bicubic2d
upsample_linear1d upsample_nearest1d upsample_nearest3d upsample_trilinear3d zero zeros zeros_like
"""
_FREE = frozenset(_FREE_BY_NAME.split())


class Macs(NamedTuple):
    """Multiply-accumulates as executed, and without those of removed weights."""

    dense: int
    effective: int


def count_macs(module: nn.Module, example_input: Inputs) -> Macs:
    """Count the multiply-accumulates of one forward pass in eval mode, dense and effective.

    Args:
        module: any module of one argument: a tensor, or a tuple or dictionary of tensors; not changed.
        example_input: its input; with n images the MACs are those of all n.

    Warns:
        UserWarning: operations ran that cannot be counted; the warning names them.

    Example:
        >>> count_macs(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8))  # 8·3·3·3 weights at 6·6 positions
        Macs(dense=7776, effective=7776)
    """
    counter = run_counted(module, example_input)
    if counter.uncounted:
        warnings.warn(f"MACs leave out {list_calls(counter.uncounted)}", stacklevel=2)
    return counter.total


def list_calls(uncounted: Mapping[str, int]) -> str:
    """Return uncounted operations and the numbers of their calls as text.

    Example:
        >>> list_calls({"fft_r2c": 2, "bilinear": 1})
        'bilinear ×1, fft_r2c ×2'
    """
    return ", ".join(f"{name} ×{calls}" for name, calls in sorted(uncounted.items()))


@torch.no_grad()
def run_counted(module: nn.Module, images: Inputs, parts: Sequence[nn.Module] = ()) -> "MacCounter":
    """Run a module once in eval mode, and count its multiply-accumulates.

    Args:
        module: any module of one argument: a tensor, or a tuple or dictionary of tensors; not changed.
        images: its input.
        parts: modules within it that are counted separately; MACs within nested parts count for the inner.

    Returns:
        The counter; `dense` and `effective` hold an entry per part that ran, and one for `None`, the rest.
    """
    counter = MacCounter(module)
    enclosing: list[nn.Module | None] = []

    def enter(part: nn.Module, _inputs: Any) -> None:
        enclosing.append(counter.part)
        counter.part = part

    def leave(*_: Any) -> None:
        counter.part = enclosing.pop()

    with ExitStack() as stack:
        for part in parts:
            stack.callback(part.register_forward_pre_hook(enter).remove)
            stack.callback(part.register_forward_hook(leave).remove)
        stack.enter_context(in_mode(module, training=False))
        stack.enter_context(without_fused_transformers())
        stack.enter_context(counter)
        module(images)
    return counter


def macs_by_weight(module: nn.Module, features: Inputs) -> dict[str, int]:
    """Count the multiply-accumulates of one example per prunable weight.

    The products of an attention's queries, keys and values count with its last layer, the output projection,
    not with an MLP beside it; all of an `nn.MultiheadAttention` counts with its input projection.

    Args:
        module: any module of one argument: a tensor, or a tuple or dictionary of tensors; not changed.
        features: an example of its input, batch first.

    Returns:
        Name of each prunable weight → multiply-accumulates.
    """
    layers = {name: module.get_submodule(name.rpartition(".")[0]) for name in prunable_weights(module)}
    attention = {path: part for path, part in module.named_modules() if heads_of(part) is not None}
    example = cloned(first_rows(features, 1))
    counter = run_counted(module, example, [*layers.values(), *attention.values()])
    macs = {name: counter.dense[layer] for name, layer in layers.items()}
    for path, part in attention.items():
        prefix = f"{path}." if path else ""
        inside = [name for name in macs if name.startswith(prefix)]
        direct = [name for name in inside if runs_directly(part, name.removeprefix(prefix).split(".")[0])]
        if inside:
            macs[(direct or inside)[-1]] += counter.dense[part]
    return macs


def count_training_macs(step: Callable[[], object]) -> int:
    """Count the dense multiply-accumulates of a training step, forward and backward.

    Args:
        step: runs the training step.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, since it imports Triton

    formulas = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return int(counter.get_total_flops()) // 2


def _convolution_backward_flops(
    output_gradient: Sequence[int],
    images: Sequence[int],
    weight: Sequence[int],
    *settings: Any,
    **_: Any,
) -> int:
    """Count each gradient like the forward pass, as PyTorch's own formula is wrong for grouped weights."""
    from torch.utils.flop_counter import conv_flop_count

    transposed, _padding, _groups, wanted = settings[-4:]
    forward: int = conv_flop_count(list(images), list(weight), list(output_gradient), transposed=transposed)
    return forward * int(sum(wanted[:2]))  # of images and weight; the bias needs no products


class MacCounter(TorchDispatchMode):
    """A context that counts the MACs of everything that runs within it.

    Removed weights are recognised by their memory. So they are found wherever an operation reads them: as a
    whole, transposed, in chunks, or passed to a function without their layer.

    Attributes:
        part: the module that is running; None if it is unknown. May be set at any time.
        dense: part → MACs as executed.
        effective: part → those without removed weights.
        uncounted: operation whose MACs cannot be counted → calls.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module) -> None:
        """Count with the removed weights of `module`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.part: nn.Module | None = None
        self.dense: Counter[nn.Module | None] = Counter()
        self.effective: Counter[nn.Module | None] = Counter()
        self.uncounted: Counter[str] = Counter()
        self._removed = _removed_by_storage(module)

    @property
    def total(self) -> Macs:
        """The MACs of all parts together."""
        return Macs(self.dense.total(), self.effective.total())

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and count it."""
        kwargs = kwargs or {}
        if isinstance(operation, HigherOrderOperator):
            self.uncounted[str(operation)] += 1
            return operation(*args, **kwargs)
        with self:  # in inference mode, composite operations arrive whole
            output = operation.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output
        output = operation(*args, **kwargs)
        formula = _macs(operation, args, output)
        if formula is not None:
            macs, factors = formula
            # Every element of a factor is used equally often.
            unused = sum(macs // factor.numel() * self._removed_in(factor) for factor in factors)
            self.dense[self.part] += macs
            self.effective[self.part] += macs - unused
        elif not _is_free(operation):
            self.uncounted[str(operation._overloadpacket)] += 1
        return output

    def _removed_in(self, factor: Tensor) -> int:
        removed = self._removed.get(factor.untyped_storage().data_ptr())
        if removed is None:
            return 0
        return int(removed.as_strided(factor.shape, factor.stride(), factor.storage_offset()).sum())


def _removed_by_storage(module: nn.Module) -> dict[int, Tensor]:
    """Return address of a storage → mask of its elements that are removed weights."""
    removed: dict[int, Tensor] = {}
    for name, kept in kept_masks(module).items():
        if kept.all():
            continue
        weight = module.get_parameter(name)
        storage = weight.untyped_storage()
        elements = torch.zeros(
            storage.nbytes() // weight.element_size(), dtype=torch.bool, device=kept.device
        )
        elements = removed.setdefault(storage.data_ptr(), elements)
        elements.as_strided(weight.shape, weight.stride(), weight.storage_offset()).logical_or_(~kept)
    return removed


def _macs(operation: OpOverload, args: tuple[Any, ...], output: Any) -> tuple[int, list[Tensor]] | None:
    """Return an operation's MACs and the factors that may be weights; None if there is no formula."""
    name = _base_name(operation)
    if name in _PRODUCTS:
        left, right = args[_PRODUCTS[name] :][:2]
        return left.numel() * (right.shape[-1] if right.ndim > 1 else 1), [left, right]
    if name in _CONVOLUTIONS:
        images, weight, transposed = args[0], args[1], args[6]
        positions = images if transposed else output
        return positions.numel() * weight.numel() // weight.shape[0], [weight]
    if name in _ATTENTION:
        query, key, value = args[:3]
        scores = query.numel() // query.shape[-1] * key.shape[-2]
        return scores * (query.shape[-1] + value.shape[-1]), []
    if name == "mkldnn_rnn_layer":  # an LSTM's, with weights for the input and for its own state
        tokens, input_weight, state_weight = args[:3]
        return tokens.numel() // tokens.shape[-1] * (input_weight.numel() + state_weight.numel()), []
    return None


def _is_free(operation: OpOverload) -> bool:
    name = _base_name(operation)
    if not name or name in _CORE_WITH_WORK:
        return False
    return name in _FREE or any(
        overload.is_view or not _FREE_TAGS.isdisjoint(overload.tags) for overload in _overloads(name)
    )


def _overloads(name: str) -> Iterator[OpOverload]:
    """Yield all overloads of one of PyTorch's own operations, also in place: not every one is tagged."""
    for packet in (getattr(torch.ops.aten, variant, None) for variant in (name, f"{name}_")):
        if packet is not None:
            yield from (getattr(packet, overload) for overload in packet.overloads())


def _base_name(operation: OpOverload) -> str:
    """Return its name without the underscore of in-place operations; empty if it is not PyTorch's own."""
    return operation._overloadpacket.__name__.removesuffix("_") if operation.namespace == "aten" else ""
