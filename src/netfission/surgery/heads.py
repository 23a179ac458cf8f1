"""Attention of another number of heads: what its code stores and reads of the number and width of heads."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

NAMES = ("num_heads", "heads", "n_heads", "num_attention_heads")  # of the attribute that counts heads
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


def set_heads(attention: nn.Module, heads: int) -> None:
    """Set the number of heads of an attention, in place, also where its code computes widths.

    Much code reads `B, N, C = x.shape`, and reshapes what all heads return to `(B, N, C)`, or computes the
    width of a head as `C // num_heads`. With fewer heads both are wrong. The attention then gets a subclass
    of its class, whose code has -1 in place of the first `C`, and divides by the number of heads before.
    """
    name = _attribute(attention)
    kind: Any = type(attention)
    assert name is not None, kind
    changed = None if hasattr(kind, _OLD_HEADS) else _of_own_width(kind, name, int(getattr(attention, name)))
    if changed is not None:
        attention.__class__ = changed
    setattr(attention, name, heads)


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
    changed = {key: _changed(function, name, heads) for key, function in functions.items()}
    members: dict[str, Any] = {key: function for key, function in changed.items() if function is not None}
    if not members:
        return None
    members |= {
        _OLD_HEADS: heads,
        "__reduce_ex__": _reduce(kind, name, heads),
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), members)


def _changed(function: FunctionType, name: str, heads: int) -> FunctionType | None:
    """Return a method that takes no width from the input; None if it took none, or cannot be changed."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no source
        return None
    (definition,) = tree.body
    if (
        not isinstance(definition, ast.FunctionDef)
        or definition.decorator_list
        or function.__code__.co_freevars
    ):
        return None
    change = _Change(name, heads)
    change.visit(definition)
    if not change.count:
        return None
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    module = compile(ast.fix_missing_locations(tree), function.__code__.co_filename, "exec")
    (code,) = (constant for constant in module.co_consts if isinstance(constant, CodeType))
    result = FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    result.__kwdefaults__ = function.__kwdefaults__
    return result


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
    """Changes the code of an attention; counts the changes."""

    def __init__(self, name: str, heads: int) -> None:
        self._name = name
        self._heads = heads
        self._widths: set[str] = set()  # names of the width of the input
        self.count = 0

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
        """Replace a width by -1 in `x.reshape(B, N, C)`."""
        self.generic_visit(node)
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
            and isinstance(divisor, ast.Attribute)
            and divisor.attr == self._name
        ):
            node.right = ast.copy_location(ast.Constant(self._heads), divisor)
            self.count += 1
        return node

    def _is_width(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id in self._widths
