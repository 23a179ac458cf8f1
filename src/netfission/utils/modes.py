"""Modules run for a while in another mode, or with other words for the errors they raise."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from netfission.utils.errors import describe, first_line, invalid


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


@contextmanager
def input_errors(argument: str, images: Tensor) -> Iterator[None]:
    """Turn every error that a network raises on `images` into a `ValueError` that names the argument.

    Args:
        argument: name of the argument that holds the images.
        images: the images that the network runs on within.

    Raises:
        ValueError: there are no images, or the network raised an error.

    Example:
        >>> import torch
        >>> images = torch.zeros(1, 3)
        >>> with input_errors("images", images):
        ...     raise TypeError("expected two inputs")  # as a network may
        Traceback (most recent call last):
        ValueError: images must be accepted by the network, got float32 of shape (1, 3) (expected two inputs)
    """
    if not len(images):
        raise invalid(argument, "at least one image", found=f"shape {tuple(images.shape)}")
    try:
        yield
    except Exception as error:  # a user's layers may raise anything
        found = f"{describe(images)} ({first_line(error)})"
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
