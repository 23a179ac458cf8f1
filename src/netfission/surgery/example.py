"""The images that a model is traced and checked with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from netfission.utils.errors import describe, invalid
from netfission.utils.modes import check_tensor


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Return channels, height and width of the images a timm model was made for; None for other models."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    return settings.get("input_size")


def check_batches(batches: Sequence[tuple[Tensor, Tensor]]) -> None:
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
        if not is_pair or not all(isinstance(part, Tensor) for part in batch):
            raise invalid("batches", expected, found=f"a list with {type(batch).__name__}")


def check_images(
    batches: Sequence[tuple[Tensor, Tensor]], reader: str, shape: tuple[int, ...] | None = None
) -> None:
    """Check the images of batches.

    Args:
        batches: pairs (images, labels).
        reader: what reads them, for the message.
        shape: of an image; default any.

    Raises:
        ValueError: there are none, or they are not float, not finite or of another shape.

    Example:
        >>> check_images([(torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2))], "reconstruct=True")
        Traceback (most recent call last):
        ValueError: batches must be of float images with reconstruct=True, got uint8 of shape (2, 3, 8, 8)
    """
    expected = "of float images" + (f" {shape}" if shape else "") + f" with {reader}"
    if not batches:
        raise invalid("batches", expected, found="none")
    for images, _ in batches:
        if not images.is_floating_point() or shape not in (None, tuple(images.shape[1:])) or not len(images):
            raise invalid("batches", expected, found=describe(images))
        if not images.isfinite().all():
            raise invalid("batches", f"finite with {reader}", found="NaN or infinite values in their images")


def example_images(
    model: nn.Module, example_input: Tensor | None, batches: Sequence[tuple[Tensor, Tensor]] = ()
) -> Tensor:
    """Return at most two images on the model's device and in its dtype.

    Args:
        model: the model to trace.
        example_input: float `(batch, channels, height, width)`; default the first of `batches`, else random
            images of the size in a timm model's configuration.
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
    check_tensor("example_input", example_input)
    if example_input.ndim != 4 and any(isinstance(layer, nn.Conv2d) for layer in model.modules()):
        raise invalid(
            "example_input", "images, float (batch, channels, height, width)", found=describe(example_input)
        )
    if not len(example_input):
        raise invalid("example_input", "at least one image", found=f"shape {tuple(example_input.shape)}")
    if not example_input.isfinite().all():
        raise invalid("example_input", "finite", found="NaN or infinite values")
    parameter = next(model.parameters(), example_input)
    return example_input[:2].to(parameter)
