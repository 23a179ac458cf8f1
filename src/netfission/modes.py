"""Train and eval mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
