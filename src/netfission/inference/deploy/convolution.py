"""A convolution that does what follows it as well, with weights laid out once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """An activation function, and its name and numbers among oneDNN's."""

    function: Callable[[Tensor], Tensor]
    name: str
    scalars: tuple[float, ...] = ()
    algorithm: str = ""


ACTIVATIONS = {
    "gelu": Activation(F.gelu, "gelu", algorithm="none"),
    "hardswish": Activation(F.hardswish, "hardswish"),
    "relu": Activation(F.relu_, "relu"),
    "relu6": Activation(F.relu6, "hardtanh", (0.0, 6.0)),
    "sigmoid": Activation(torch.sigmoid, "sigmoid"),
    "silu": Activation(F.silu, "swish"),
}
_NONE = Activation(lambda features: features, "none")


@dataclass
class _LaidOut:
    """A weight as oneDNN wants it.

    That differs with the shape of the features, mostly between one image and several; laid out otherwise, a
    convolution may take many times as long.

    Attributes:
        weight: as PyTorch has it.
        version: of its values.
        by_shape: shape of features → the weight laid out for them.
        by_layout: the same by layout, each held once.
    """

    weight: Tensor
    version: int | None
    by_shape: dict[torch.Size, Tensor] = field(default_factory=dict)
    by_layout: dict[bytes, Tensor] = field(default_factory=dict)

    def add(self, laid_out: Tensor, shape: torch.Size) -> Tensor:
        """Keep the weight as laid out for features of a shape; the one that is held."""
        layout = _ONEDNN._get_mkldnn_serialized_md(laid_out).numpy().tobytes()
        self.by_shape[shape] = self.by_layout.setdefault(layout, laid_out)
        return self.by_shape[shape]


class FusedConv2d(nn.Conv2d):
    """`activation(convolution(features) + residual)` for inference.

    On a CPU it runs as one operation of oneDNN, the one torch.compile's inductor makes of such a sequence.
    The weight is laid out for it at the first call with features of a shape and kept so, outside the state
    dict; PyTorch's own `conv2d` lays it out again at every call, which is a large part of the time of a small
    batch. Elsewhere, and when compiled or exported, it is the plain sequence.

    Attributes:
        activation: a name in `ACTIVATIONS`, or None.
        overwrites: write the result over the residual, which saves a pass through memory.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> None:
        outputs, inputs, *kernel = weight.shape
        size = (outputs, tuple(kernel), stride, padding, dilation, groups, bias is not None)
        super().__init__(inputs * groups, *size, device="meta")  # type: ignore[arg-type]  # tuples of two
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.activation: str | None = None
        self.overwrites = False
        self._laid_out: _LaidOut | None = None

    @classmethod
    def like(cls, layer: nn.Conv2d, weight: Tensor, bias: Tensor | None, groups: int | None = None) -> Self:
        """A convolution with another's settings."""
        assert not isinstance(layer.padding, str)
        return cls(
            weight.detach().clone(),
            None if bias is None else bias.detach().clone(),
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups if groups is None else groups,
        )

    def forward(self, features: Tensor, residual: Tensor | None = None) -> Tensor:
        """`(batch, in_channels, height, width)`, and what to add to the result → the result."""
        activation = _NONE if self.activation is None else ACTIVATIONS[self.activation]
        if self._takes(features):
            return self._in_one(features, residual, activation)
        result = self._conv_forward(features, self.weight, self.bias)
        if residual is not None:
            result = result.add_(residual)
        return activation.function(result)

    def _takes(self, features: Tensor) -> bool:
        return (
            _HAS_ONEDNN
            and features.is_cpu
            and features.dtype is self.weight.dtype
            and features.dtype in _DTYPES
            and type(features) is Tensor
            and not torch.compiler.is_compiling()
            and torch._C._get_tracing_state() is None
            and not torch._C._len_torch_dispatch_stack()  # counters know only PyTorch's own operations
            and not (features.requires_grad and torch.is_grad_enabled())
        )

    def _in_one(self, features: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
        layer = self._weight_for(features), self.bias, self.padding, self.stride, self.dilation, self.groups
        result: Tensor
        if residual is None:
            result = _ONEDNN._convolution_pointwise.default(features, *layer, *activation[1:])
            return result
        unary = (None, (), None) if activation is _NONE else activation[1:]
        if self.overwrites:
            result = _ONEDNN._convolution_pointwise_.binary(residual, features, *layer, "add", 1.0, *unary)
        else:
            result = _ONEDNN._convolution_pointwise.binary(features, residual, *layer, "add", 1.0, *unary)
        return result

    def _weight_for(self, features: Tensor) -> Tensor:
        """The weight as oneDNN wants it for such features."""
        weight: Tensor = self.weight
        version = None if weight.is_inference() else weight._version
        kept = self._laid_out
        if kept is None or kept.weight is not weight or kept.version != version:
            kept = self._laid_out = _LaidOut(weight, version)
        laid_out = kept.by_shape.get(features.shape)
        if laid_out is None:
            settings = self.padding, self.stride, self.dilation, self.groups, features.shape
            laid_out = kept.add(
                _ONEDNN._reorder_convolution_weight(weight.detach(), *settings), features.shape
            )
        return laid_out

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._laid_out = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_laid_out": None}

    def extra_repr(self) -> str:
        """The layer's settings."""
        layer = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{layer}, activation={self.activation}"


_ONEDNN = torch.ops.mkldnn
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(_ONEDNN, "_get_mkldnn_serialized_md")
_DTYPES = {torch.float32}
if _HAS_ONEDNN and _ONEDNN._is_mkldnn_bf16_supported():
    _DTYPES.add(torch.bfloat16)
