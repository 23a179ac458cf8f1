"""What parts of a network pass on: a tensor, or a tuple of tensors, each with the batch first."""

from collections.abc import Callable

from torch import Tensor

Features = Tensor | tuple[Tensor, ...]


def tensors_of(features: Features) -> tuple[Tensor, ...]:
    """Return the tensors of features.

    Example:
        >>> import torch
        >>> len(tensors_of(torch.zeros(2, 3))), len(tensors_of((torch.zeros(2, 3), torch.zeros(2, 4))))
        (1, 2)
    """
    return features if isinstance(features, tuple) else (features,)


def map_tensors(function: Callable[[Tensor], Tensor], features: Features) -> Features:
    """Apply a function to each tensor of features.

    Example:
        >>> import torch
        >>> [part.tolist() for part in map_tensors(torch.neg, (torch.ones(1), torch.ones(2)))]
        [[-1.0], [-1.0, -1.0]]
    """
    return tuple(map(function, features)) if isinstance(features, tuple) else function(features)
