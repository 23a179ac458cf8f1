"""The images that a model is traced and checked with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from netfission.utils.errors import describe, invalid


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Return channels, height and width of the images a timm model was made for; None for other models."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    return settings.get("input_size")


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
