"""Modules run for a while in another mode, or with other words for what they raise."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def in_mode(*modules: nn.Module, training: bool) -> Iterator[None]:
    """Put modules into train or eval mode, and each of their parts back into its own afterwards.

    Part by part, since a user may keep some (frozen batch norms) in another mode than the rest.
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
    """Turn what a network's layers raise at images into a `ValueError` that names the argument they came by.

    Raises:
        ValueError: there are no images, or the network does not take them.
    """
    if not len(images):
        raise ValueError(f"{argument} has shape {tuple(images.shape)}; it takes at least one image")
    try:
        yield
    except Exception as error:  # whatever the layers raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{argument}={tuple(images.shape)} {images.dtype}: takes images that the network takes ({reason})"
        ) from error
