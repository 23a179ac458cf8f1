from typing import Any

import torch
from torch import Tensor

from netfission.pruning.snip import snip


def test_equals_gradients_of_explicit_mask_variables(
    tiny: Any, tiny_loss: Any, weights: dict[str, Tensor], batches: Any, generator: torch.Generator
) -> None:
    model = tiny(0.0)
    masks = {name: torch.ones_like(weight, requires_grad=True) for name, weight in weights.items()}
    masked = {name: weights[name] * mask for name, mask in masks.items()}
    tiny_loss(model, masked, batches).backward()
    expected = {name: mask.grad.abs() for name, mask in masks.items()}
    assert all(score.any() for score in expected.values())

    scores = snip(model, weights, batches, generator)

    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-12)


def test_predicts_how_the_loss_moves_as_a_weight_fades(
    tiny: Any, tiny_loss: Any, weights: dict[str, Tensor], batches: Any, generator: torch.Generator
) -> None:
    model = tiny(0.0)
    scores = snip(model, weights, batches, generator)
    step = 1e-6
    for name, weight in weights.items():
        index = tuple(int(i) for i in (scores[name] == scores[name].max()).nonzero()[0])
        losses = []
        for sign in (-1, 1):
            moved = weight.clone()
            moved[index] *= 1 + sign * step
            losses.append(tiny_loss(model, weights | {name: moved}, batches))
        slope = (losses[1] - losses[0]).abs() / (2 * step)
        torch.testing.assert_close(scores[name][index], slope, rtol=1e-5, atol=0)
