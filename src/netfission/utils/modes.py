"""Modules run for a while in another mode, as a copy, or with other words for the errors they raise."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import fx, nn

from netfission.utils.errors import first_line, invalid
from netfission.utils.inputs import Inputs, as_inputs, check_rows, describe_inputs

_Module = TypeVar("_Module", bound=nn.Module)


@contextmanager
def in_mode(*modules: nn.Module, training: bool) -> Iterator[None]:
    """Put modules into train or eval mode, and each of their parts back into its previous mode at the end.

    Each part has a mode to return to, since a user may keep some (frozen batch norms) in another mode than
    the rest.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
        >>> _ = model[0].eval()
        >>> with in_mode(model, training=True):
        ...     print(model[0].training)
        True
        >>> model[0].training, model[1].training
        (False, True)
    """
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.train(training)
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode


def trial_copy(module: _Module) -> _Module:
    """Return a copy of a module that shares its parameters, to run it and leave no trace in the original.

    Buffers are copied, as batch norms overwrite theirs. Traced modules share their graph and the code that
    is compiled from it, which takes longer to compile than to run; a copy is not to be recompiled.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> trial = trial_copy(norm)
        >>> _ = trial(torch.randn(4, 2))
        >>> int(norm.num_batches_tracked), trial.weight is norm.weight
        (0, True)
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    traced = [
        part
        for part in module.modules()
        if isinstance(part, fx.GraphModule)
        and type(part).train is nn.Module.train  # torchvision's compiles another graph in each mode
    ]
    for part in module.modules():  # most of what a module consists of are its empty tables of hooks
        memo |= {
            id(value): type(value)() for value in vars(part).values() if type(value) in _TABLES and not value
        }
    for part in traced:
        memo[id(part.graph)] = part.graph
        memo[id(part)] = object.__new__(type(part))
    for part in traced:
        memo[id(part)].__dict__.update(copy.deepcopy(vars(part), memo))
    return copy.deepcopy(module, memo)


_TABLES = (dict, OrderedDict, set)


def check_tensor(argument: str, images: Inputs) -> None:
    """Raise ValueError unless images are a tensor of one dimension or more, or several.

    Example:
        >>> check_tensor("example_input", (2, 3, 32, 32))
        Traceback (most recent call last):
        ValueError: example_input must be images, float (batch, channels, height, width), got (2, 3, 32, 32)
    """
    as_inputs(argument, images)


@contextmanager
def input_errors(argument: str, images: Inputs) -> Iterator[None]:
    """Turn every error that a network raises on `images` into a `ValueError` that names the argument.

    Args:
        argument: name of the argument that holds the images.
        images: the images, or other inputs, that the network runs on within.

    Raises:
        ValueError: it is not a tensor, there are no images, or the network raised an error.

    Example:
        >>> import torch
        >>> images = torch.zeros(1, 3)
        >>> with input_errors("images", images):
        ...     raise TypeError("expected two inputs")  # as a network may
        Traceback (most recent call last):
        ValueError: images must be accepted by the network, got float32 of shape (1, 3) (expected two inputs)
    """
    check_tensor(argument, images)
    check_rows(argument, images)
    try:
        yield
    except Exception as error:  # a user's layers may raise anything
        found = f"{describe_inputs(images)} ({first_line(error)})"
        raise invalid(argument, "accepted by the network", found=found) from error


@contextmanager
def without_fused_transformers() -> Iterator[None]:
    """Run attention and encoder layers as separate products, not as one opaque operation.

    Example:
        >>> with without_fused_transformers():
        ...     torch.backends.mha.get_fastpath_enabled()
        False
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
