"""Attention of another number of heads: what its code stores and reads of the number and width of heads."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("num_heads", "heads", "n_heads", "num_attention_heads")  # of the attribute that counts heads
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_OLD_HEADS = "heads_of_input"  # of classes that are changed already: the number in the width of their input
_RESHAPES = ("reshape", "view")
_CHANNELS = ("c", "dim", "channels", "d")  # lower-case names that code gives to the width of its input


def heads_of(module: nn.Module) -> int | None:
    """Return the number of heads of an attention that is no `nn.MultiheadAttention`, else None.

    Example:
        >>> heads_of(nn.Linear(2, 2)) is None
        True
    """
    name = _attribute(module)
    return None if name is None else int(getattr(module, name))


def runs_directly(attention: nn.Module, child: str) -> bool:
    """Return whether a child is a layer of the attention's own, not an MLP beside it.

    Example:
        >>> attention = nn.ModuleDict({"qkv": nn.Linear(2, 6), "bias": nn.Sequential(nn.Linear(2, 2))})
        >>> runs_directly(attention, "qkv"), runs_directly(attention, "drop")
        (True, False)
    """
    part = attention._modules.get(child)
    if part is None:
        return False
    return isinstance(part, nn.ModuleList) or sum(isinstance(layer, LAYERS) for layer in part.modules()) == 1


def set_heads(attention: nn.Module, heads: int) -> None:
    """Set the number of heads of an attention, in place, also where its code computes widths.

    Much code reads `B, N, C = x.shape`, and reshapes what all heads return to `(B, N, C)`, or computes the
    width of a head as `C // num_heads`. With fewer heads both are wrong. The attention then gets a subclass
    of its class, whose code has -1 in place of the first `C`, and divides by the number of heads before. So
    do the functions to which it passes the number of heads (torchvision's Swin).
    """
    name = _attribute(attention)
    kind: Any = type(attention)
    assert name is not None, kind
    changed = None if hasattr(kind, _OLD_HEADS) else _of_own_width(kind, name, int(getattr(attention, name)))
    if changed is not None:
        attention.__class__ = changed
    setattr(attention, name, heads)


class FewerHeads(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` of which some heads are left out; its input and output keep their width.

    PyTorch's code computes the width of a head as the width of the input over the number of heads. This one
    has the same parameters, with fewer rows in `in_proj_weight` and `in_proj_bias`, and fewer columns in
    `out_proj.weight`.
    """

    @classmethod
    def change(cls, attention: nn.MultiheadAttention) -> None:
        """Make an attention one of this class, in place, with as many heads as its weight has rows for."""
        weight: Tensor = attention.in_proj_weight
        attention.num_heads = weight.shape[0] // (3 * attention.head_dim)
        attention._qkv_same_embed_dim = False  # or an encoder layer would run its fused operation
        attention.__class__ = cls

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, see `nn.MultiheadAttention.forward`."""
        batched = query.ndim == 3
        inputs = [
            tensor.unsqueeze(0) if not batched else tensor if self.batch_first else tensor.transpose(0, 1)
            for tensor in (query, key, value)
        ]
        queries, keys, values = (
            projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for projected in self.project(inputs)
        )
        mask = self._mask(attn_mask, key_padding_mask, queries)
        rate = self.dropout if self.training else 0.0
        if need_weights:
            products = queries @ keys.transpose(-1, -2) * self.head_dim**-0.5
            weights = F.dropout((products if mask is None else products + mask).softmax(-1), rate)
            attended = weights @ values
        else:
            attended = F.scaled_dot_product_attention(queries, keys, values, mask, rate)
        result = self.out_proj(attended.transpose(1, 2).flatten(2))
        result = result if self.batch_first or not batched else result.transpose(0, 1)
        if not need_weights:
            return result if batched else result.squeeze(0), None
        weights = weights.mean(1) if average_attn_weights else weights
        return (result, weights) if batched else (result.squeeze(0), weights.squeeze(0))

    def project(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return queries, keys and values of all heads, `(batch, tokens, width)`, of inputs of this shape."""
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [
            F.linear(*operands) for operands in zip(inputs, self.in_proj_weight.chunk(3), biases, strict=True)
        ]

    def _mask(self, of_pairs: Tensor | None, of_keys: Tensor | None, queries: Tensor) -> Tensor | None:
        """Return the sum of both masks, to be added to `(batch, heads, queries, keys)`."""
        masks = []
        if of_pairs is not None:
            masks.append(of_pairs if of_pairs.ndim == 2 else of_pairs.unflatten(0, (len(queries), -1)))
        if of_keys is not None:
            masks.append(of_keys.reshape(len(queries), 1, 1, -1))
        added = [
            torch.zeros_like(mask, dtype=queries.dtype).masked_fill(mask, -torch.inf)
            if mask.dtype == torch.bool
            else mask
            for mask in masks
        ]
        return sum(added[1:], start=added[0]) if added else None


def divides(attention: nn.MultiheadAttention) -> bool:
    """Return whether heads of an attention can be left out: one input projection, no key added to the others.

    Example:
        >>> divides(nn.MultiheadAttention(8, 2)), divides(nn.MultiheadAttention(8, 2, kdim=4))
        (True, False)
    """
    added = attention.bias_k is not None or attention.add_zero_attn
    return attention._parameters.get("in_proj_weight") is not None and not added


def _attribute(module: nn.Module) -> str | None:
    if isinstance(module, nn.MultiheadAttention):
        return None
    found = (name for name in NAMES if isinstance(vars(module).get(name), int))
    return next((name for name in found if not isinstance(vars(module)[name], bool)), None)


@cache
def _of_own_width(kind: Any, name: str, heads: int) -> type[nn.Module] | None:
    """Return a subclass of an attention's class that takes no width from its input; None if it took none.

    Args:
        kind: the class.
        name: of the attribute that counts heads.
        heads: the number that the width of the input stands for.
    """
    functions = {
        key: function
        for parent in reversed(kind.__mro__[: kind.__mro__.index(nn.Module)])
        for key, function in vars(parent).items()
        if isinstance(function, FunctionType)
    }
    members: dict[str, Any] = {}
    for key, function in functions.items():
        changed, called = _changed(function, name, heads)
        if changed is not None:
            members |= {key: changed, **{other: staticmethod(call) for other, call in called.items()}}
    if not members:
        return None
    members |= {
        _OLD_HEADS: heads,
        "__reduce_ex__": _reduce(kind, name, heads),
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), members)


def _changed(
    function: FunctionType, name: str, heads: int
) -> tuple[FunctionType | None, dict[str, FunctionType]]:
    """Return a method that takes no width from the input, and the functions that it calls in place of others.

    None if it took none, or cannot be changed.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no source
        return None, {}
    (definition,) = tree.body
    if (
        not isinstance(definition, ast.FunctionDef)
        or definition.decorator_list
        or function.__code__.co_freevars
    ):
        return None, {}
    change = _Change(name, heads, function.__globals__, definition.args.args[0].arg)
    change.visit(definition)
    if not change.count:
        return None, {}
    _leave_out_signature(definition)
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    module = compile(ast.fix_missing_locations(tree), function.__code__.co_filename, "exec")
    (code,) = (constant for constant in module.co_consts if isinstance(constant, CodeType))
    result = FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    result.__kwdefaults__ = function.__kwdefaults__
    return result, change.functions


def _leave_out_signature(definition: ast.FunctionDef) -> None:
    """Leave out all code but the body: annotations (from Python 3.14), defaults and type parameters."""
    arguments = definition.args
    definition.returns = None
    if hasattr(definition, "type_params"):  # from Python 3.12
        definition.type_params = []
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    arguments.defaults = []
    arguments.kw_defaults = [None for _ in arguments.kwonlyargs]


def _reduce(kind: Any, name: str, heads: int) -> Callable[..., Any]:
    def reduce_ex(module: nn.Module, _protocol: Any) -> tuple[Any, ...]:
        return _restored, (kind, name, heads), module.__dict__

    return reduce_ex


def _restored(kind: Any, name: str, heads: int) -> nn.Module:
    """Return an empty module of the subclass, for pickle and `copy`."""
    changed = _of_own_width(kind, name, heads)
    assert changed is not None, kind
    return changed.__new__(changed)


class _Change(ast.NodeTransformer):
    """Changes the code of an attention; counts the changes.

    Attributes:
        count: number of changes.
        functions: name → changed function, which the code then calls as a method of its own.
    """

    def __init__(self, name: str, heads: int, known: Mapping[str, Any], instance: str) -> None:
        self._name = name
        self._heads = heads
        self._known = known  # globals of the code
        self._instance = instance  # its name for `self`
        self._widths: set[str] = set()  # names of the width of the input
        self.count = 0
        self.functions: dict[str, FunctionType] = {}

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        """Note a name of the width, as in `B, N, C = x.shape`."""
        target, value = node.targets[0], node.value
        if (
            isinstance(value, ast.Call)
            and isinstance(value.func, ast.Attribute)
            and value.func.attr == "size"
        ):
            value = ast.Attribute(value.func.value, "shape", ast.Load())
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Attribute) and value.attr == "shape":
            names = [part.id for part in target.elts if isinstance(part, ast.Name)]
            self._widths |= {part for part in names if part.lower() in _CHANNELS}
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replace a width by -1 in `x.reshape(B, N, C)`, and functions of the number of heads."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Name):
            self._replace_function(node, node.func.id)
        if isinstance(node.func, ast.Attribute) and node.func.attr in _RESHAPES:
            single = (
                node.args[0].elts if len(node.args) == 1 and isinstance(node.args[0], ast.Tuple) else None
            )
            sizes = node.args if single is None else single
            place = next((index for index, size in enumerate(sizes) if self._is_width(size)), None)
            if place is not None and not any(isinstance(size, ast.UnaryOp) for size in sizes):
                sizes[place] = ast.copy_location(ast.UnaryOp(ast.USub(), ast.Constant(1)), sizes[place])
                self.count += 1
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """Replace the number of heads in `C // self.num_heads`."""
        self.generic_visit(node)
        divisor = node.right
        if (
            isinstance(node.op, ast.FloorDiv)
            and self._is_width(node.left)
            and self._is_number_of_heads(divisor)
        ):
            node.right = ast.copy_location(ast.Constant(self._heads), divisor)
            self.count += 1
        return node

    def _replace_function(self, call: ast.Call, name: str) -> None:
        """Call a changed function if it gets the number of heads."""
        function = self._known.get(name)
        if not isinstance(function, FunctionType):
            return
        named = [*zip(function.__code__.co_varnames, call.args, strict=False)]
        named += [(keyword.arg or "", keyword.value) for keyword in call.keywords]
        heads = next((parameter for parameter, value in named if self._is_number_of_heads(value)), None)
        if heads is None:
            return
        changed, called = _changed(function, heads, self._heads)
        if changed is not None and not called:  # what it calls is no method
            self.functions[name] = changed
            call.func = ast.copy_location(
                ast.Attribute(ast.Name(self._instance, ast.Load()), name, ast.Load()), call.func
            )
            self.count += 1

    def _is_number_of_heads(self, node: ast.expr) -> bool:
        """Return whether code reads the number of heads, from the attention or from an argument."""
        return self._name == (
            node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        )

    def _is_width(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id in self._widths
