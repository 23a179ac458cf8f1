"""The images, or other inputs, that a model is traced and checked with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netfission.utils.errors import describe, invalid
from netfission.utils.inputs import (
    Inputs,
    as_inputs,
    check_rows,
    first_rows,
    map_inputs,
    tensors_in,
)

_CODES = {torch.int32, torch.int64}  # what embeddings read


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Return channels, height and width of the images a timm model was made for; None for other models."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    return settings.get("input_size")


def check_batches(batches: Sequence[tuple[Inputs, Tensor]]) -> None:
    """Raise ValueError unless batches are a list of pairs of tensors, which may be empty.

    Example:
        >>> check_batches(iter([]))
        Traceback (most recent call last):
        ValueError: batches must be a list of pairs (images, labels), got list_iterator; pass a list, such \
as list(itertools.islice(loader, 4))
    """
    expected = "a list of pairs (images, labels)"
    if not isinstance(batches, Sequence):
        hint = "pass a list, such as list(itertools.islice(loader, 4))"
        raise invalid("batches", expected, found=type(batches).__name__, hint=hint)
    for batch in batches:
        is_pair = isinstance(batch, Sequence) and len(batch) == 2
        if not is_pair or not isinstance(batch[1], Tensor):
            raise invalid("batches", expected, found=f"a list with {type(batch).__name__}")
        if not isinstance(batch[0], Tensor):
            as_inputs("batches", batch[0])


def check_images(
    batches: Sequence[tuple[Inputs, Tensor]],
    reader: str,
    shape: tuple[int, ...] | None = None,
    codes: torch.dtype | None = None,
) -> None:
    """Check the images of batches.

    Args:
        batches: pairs (images, labels).
        reader: what reads them, for the message.
        shape: of an image; default any.
        codes: dtype of the integers that the network reads in place of images; default none.

    Raises:
        ValueError: there are none, or they are not float (or such integers), not finite or of another shape.

    Example:
        >>> check_images([(torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2))], "reconstruct=True")
        Traceback (most recent call last):
        ValueError: batches must be of float images with reconstruct=True, got uint8 of shape (2, 3, 8, 8)
    """
    kind = f"{codes}".removeprefix("torch.") + " inputs" if codes else "float images"
    expected = f"of {kind}" + (f" {shape}" if shape else "") + f" with {reader}"
    if not batches:
        raise invalid("batches", expected, found="none")
    for images, _ in batches:
        if not isinstance(images, Tensor):
            continue
        fits = images.dtype == codes if codes else images.is_floating_point()
        if not fits or shape not in (None, tuple(images.shape[1:])) or not len(images):
            raise invalid("batches", expected, found=describe(images))
        if not images.isfinite().all():
            raise invalid("batches", f"finite with {reader}", found="NaN or infinite values in their images")


def example_images(
    model: nn.Module, example_input: Any, batches: Sequence[tuple[Inputs, Tensor]] = ()
) -> Inputs:
    """Return at most two images, or rows of other inputs, on the model's device and in its dtype.

    Integers of 32 and 64 bits stay what they are, such as the numbers of tokens. So do all that are not
    floating point in a tuple or a dictionary.

    Args:
        model: the model to trace.
        example_input: float `(batch, channels, height, width)`, another tensor, or a tuple, list or mapping
            of tensors; default the first of `batches`, else random images of the size in a timm model's
            configuration.
        batches: pairs (images, labels).

    Raises:
        ValueError: there are no images to take, they have another shape, or they are not finite.
    """
    if example_input is None and batches:
        example_input = batches[0][0]
    if example_input is None:
        size = input_size(model)
        if size is None:
            raise invalid("example_input", "images, float (batch, channels, height, width)", None)
        example_input = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    inputs = as_inputs("example_input", example_input)
    convolves = any(isinstance(layer, nn.Conv2d) for layer in model.modules())
    if isinstance(inputs, Tensor) and inputs.ndim != 4 and convolves:
        raise invalid(
            "example_input", "images, float (batch, channels, height, width)", found=describe(inputs)
        )
    check_rows("example_input", inputs)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors_in(inputs)):
        raise invalid("example_input", "finite", found="NaN or infinite values")
    parameter = next(model.parameters(), tensors_in(inputs)[0])
    kept = _CODES if isinstance(inputs, Tensor) else None
    found: Inputs = map_inputs(lambda tensor: _like(tensor, parameter, kept), first_rows(inputs, 2))
    return found


def _like(tensor: Tensor, parameter: Tensor, kept: set[torch.dtype] | None) -> Tensor:
    """Move a tensor to a parameter's device, and to its dtype unless that is kept; None: all but floats."""
    stays = not tensor.is_floating_point() if kept is None else tensor.dtype in kept
    return tensor.to(parameter.device) if stays else tensor.to(parameter)
