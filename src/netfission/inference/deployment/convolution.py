"""A convolution that includes the addition and activation after it, with weights reordered only once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """An activation function, and its name and parameters in oneDNN."""

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
class _Reordered:
    """A weight in the memory layouts that oneDNN requires.

    The layout depends on the shape of the features, mostly on whether there is one image or several. In the
    wrong layout, a convolution can take many times as long.

    Attributes:
        weight: in PyTorch's layout.
        version: of its values.
        by_shape: shape of features → the weight reordered for them.
        by_layout: layout → the weight in it, stored once.
    """

    weight: Tensor
    version: int | None
    by_shape: dict[torch.Size, Tensor] = field(default_factory=dict)
    by_layout: dict[bytes, Tensor] = field(default_factory=dict)

    def add(self, reordered: Tensor, shape: torch.Size) -> Tensor:
        """Store the weight reordered for features of a shape, and return the stored one."""
        layout = _ONEDNN._get_mkldnn_serialized_md(reordered).numpy().tobytes()
        self.by_shape[shape] = self.by_layout.setdefault(layout, reordered)
        return self.by_shape[shape]


class FusedConv2d(nn.Conv2d):
    """`activation(convolution(features) + residual)` for inference.

    On a CPU it runs as one operation of oneDNN, which torch.compile's inductor also uses for this sequence.
    The weight is reordered for it at the first call with features of a shape, and stored in that layout
    outside the state dict. PyTorch's `conv2d` reorders it at every call, which takes a large part of the time
    of a small batch. On other devices, and when compiled or exported, it runs as separate operations.

    Attributes:
        activation: a name in `ACTIVATIONS`, or None.
        overwrites: whether the result overwrites the residual, which saves a pass through memory.

    Example:
        >>> layer = nn.Conv2d(3, 4, 3)
        >>> fused = FusedConv2d.like(layer, layer.weight, layer.bias)
        >>> fused.activation = "relu"
        >>> images = torch.randn(2, 3, 8, 8)
        >>> torch.allclose(fused(images), layer(images).relu(), atol=1e-5)
        True
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
        self._reordered: _Reordered | None = None

    @classmethod
    def like(cls, layer: nn.Conv2d, weight: Tensor, bias: Tensor | None, groups: int | None = None) -> Self:
        """Return a convolution with the settings of `layer`, and copies of the given tensors."""
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
        """Features `(batch, in_channels, height, width)`, and a residual to add, → the result."""
        activation = _NONE if self.activation is None else ACTIVATIONS[self.activation]
        if self._supports_onednn(features):
            return self._run_fused(features, residual, activation)
        result = self._conv_forward(features, self.weight, self.bias)
        if residual is not None:
            result = result.add_(residual)
        return activation.function(result)

    def _supports_onednn(self, features: Tensor) -> bool:
        return (
            _HAS_ONEDNN
            and features.is_cpu
            and features.dtype is self.weight.dtype
            and features.dtype in _DTYPES
            and type(features) is Tensor
            and not torch.compiler.is_compiling()
            and torch._C._get_tracing_state() is None
            and not torch._C._len_torch_dispatch_stack()  # counters know PyTorch's operations only
            and not (features.requires_grad and torch.is_grad_enabled())
        )

    def _run_fused(self, features: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
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
        """Return the weight in the layout that oneDNN requires for such features."""
        weight: Tensor = self.weight
        version = None if weight.is_inference() else weight._version
        cache = self._reordered
        if cache is None or cache.weight is not weight or cache.version != version:
            cache = self._reordered = _Reordered(weight, version)
        reordered = cache.by_shape.get(features.shape)
        if reordered is None:
            settings = self.padding, self.stride, self.dilation, self.groups, features.shape
            reordered = cache.add(
                _ONEDNN._reorder_convolution_weight(weight.detach(), *settings), features.shape
            )
        return reordered

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._reordered = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reordered": None}

    def extra_repr(self) -> str:
        """Return the layer's settings as text."""
        layer = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{layer}, activation={self.activation}"


_ONEDNN = torch.ops.mkldnn
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(_ONEDNN, "_get_mkldnn_serialized_md")
_DTYPES = {torch.float32}
if _HAS_ONEDNN and _ONEDNN._is_mkldnn_bf16_supported():
    _DTYPES.add(torch.bfloat16)
