"""What a network reads: a tensor, or several in a tuple or a dictionary, each with a row per example."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from netfission.utils.errors import describe, invalid

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


def as_inputs(argument: str, inputs: Any) -> Inputs:
    """Return inputs as a tensor, a tuple of tensors or a dictionary of tensors.

    Args:
        argument: name of the argument, for the message.
        inputs: a tensor, or a tuple, list or mapping of tensors, such as a tokenizer returns.

    Raises:
        ValueError: they are none of these, or they differ in their number of rows.

    Example:
        >>> import torch
        >>> list(as_inputs("example_input", {"input_ids": torch.zeros(2, 3), "mask": torch.ones(2, 3)}))
        ['input_ids', 'mask']
        >>> as_inputs("example_input", (torch.zeros(2, 3), torch.zeros(3, 3)))
        Traceback (most recent call last):
        ValueError: example_input must be tensors of equally many rows, got 2 and 3
    """
    if isinstance(inputs, Tensor) and inputs.ndim:
        return inputs
    found: Any = dict(inputs) if isinstance(inputs, Mapping) else inputs
    found = tuple(found) if isinstance(found, list) else found
    parts = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(parts, list | tuple) or not any(isinstance(part, Tensor) for part in parts):
        raise invalid(argument, "images, float (batch, channels, height, width)", inputs)
    for part in parts:
        if not isinstance(part, Tensor) or not part.ndim:
            what = describe(part) if isinstance(part, Tensor) else type(part).__name__
            raise invalid(argument, "tensors with a row per example", found=f"one of them {what}")
    rows = [len(part) for part in parts]
    if min(rows) < max(rows):
        raise invalid(argument, "tensors of equally many rows", found=" and ".join(map(str, rows)))
    return found  # type: ignore[no-any-return]


def tensors_in(inputs: Inputs) -> list[Tensor]:
    """Return the tensors of inputs."""
    return [inputs] if isinstance(inputs, Tensor) else list(tree_leaves(inputs))


def row_count(inputs: Inputs) -> int:
    """Return the number of rows.

    Example:
        >>> import torch
        >>> row_count({"input_ids": torch.zeros(2, 3)})
        2
    """
    return len(tensors_in(inputs)[0])


def check_rows(argument: str, inputs: Inputs) -> None:
    """Raise ValueError unless inputs have a row or more.

    Example:
        >>> import torch
        >>> check_rows("example_input", torch.zeros(0, 3, 8, 8))
        Traceback (most recent call last):
        ValueError: example_input must be at least one image, got shape (0, 3, 8, 8)
    """
    if not row_count(inputs):
        shapes = [tuple(tensor.shape) for tensor in tensors_in(inputs)]
        raise invalid(argument, "at least one image", found="shape " + " and ".join(map(str, shapes)))


def map_inputs(function: Any, inputs: Any) -> Any:
    """Apply a function to each tensor of inputs.

    Example:
        >>> import torch
        >>> map_inputs(len, (torch.zeros(2, 3), torch.zeros(2)))
        (2, 2)
    """
    return tree_map_only(Tensor, function, inputs)


def first_rows(inputs: Any, count: int) -> Any:
    """Return the first rows.

    Example:
        >>> import torch
        >>> first_rows({"mask": torch.zeros(4, 3)}, 2)["mask"].shape
        torch.Size([2, 3])
    """
    return map_inputs(lambda tensor: tensor[:count], inputs)


def cloned(inputs: Any) -> Any:
    """Return copies of all tensors."""
    return map_inputs(Tensor.clone, inputs)


def describe_inputs(inputs: Any) -> str:
    """Return dtype and shape of each tensor, for a message.

    Example:
        >>> import torch
        >>> describe_inputs({"input_ids": torch.zeros(2, 3, dtype=torch.int64)})
        "{'input_ids': int64 of shape (2, 3)}"
    """
    if isinstance(inputs, Tensor):
        return describe(inputs)
    named = inputs.items() if isinstance(inputs, dict) else enumerate(inputs)
    parts = [f"{name!r}: " * isinstance(inputs, dict) + describe(tensor) for name, tensor in named]
    return f"{{{', '.join(parts)}}}" if isinstance(inputs, dict) else f"({', '.join(parts)})"
