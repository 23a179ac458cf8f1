from typing import Any

import torch
from torch import Tensor

from netfission.pruning.grasp import grasp


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def unflatten(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = vector.split([tensor.numel() for tensor in like.values()])
    return {name: part.view_as(like[name]) for name, part in zip(like, parts, strict=True)}


def test_equals_the_product_with_the_full_hessian(
    tiny: Any, tiny_loss: Any, weights: dict[str, Tensor], batches: Any, generator: torch.Generator
) -> None:
    model = tiny(0.0)

    def loss(vector: Tensor) -> Tensor:
        return tiny_loss(model, unflatten(vector, weights), batches, temperature=200)

    theta = flat(weights)
    hessian = torch.autograd.functional.hessian(loss, theta)
    gradient = torch.autograd.functional.jacobian(loss, theta)
    expected = theta * (hessian @ gradient)
    torch.testing.assert_close(hessian, hessian.T)  # or the reference itself is wrong
    assert expected.min() < 0 < expected.max()

    scores = flat(grasp(model, weights, batches, generator))

    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12 * expected.abs().max())


def test_weights_scored_high_carry_the_gradient_flow(
    tiny: Any, tiny_loss: Any, weights: dict[str, Tensor], batches: Any, generator: torch.Generator
) -> None:
    model = tiny(0.0)

    def flow(vector: Tensor) -> Tensor:
        vector = vector.requires_grad_()
        loss = tiny_loss(model, unflatten(vector, weights), batches, temperature=200)
        return torch.autograd.grad(loss, vector)[0].square().sum()

    scores, theta, step = flat(grasp(model, weights, batches, generator)), flat(weights), 1e-6
    for index in (scores.argmax(), scores.argmin()):
        shrink = torch.zeros_like(theta)
        shrink[index] = step * theta[index]
        change = (flow(theta - shrink) - flow(theta + shrink)) / (2 * step)
        torch.testing.assert_close(change, -2 * scores[index], rtol=1e-5, atol=0)


def test_both_passes_see_the_same_dropout(
    tiny: Any, weights: dict[str, Tensor], batches: Any, generator: torch.Generator
) -> None:
    model = tiny(0.5)
    seen: list[Tensor] = []
    model.dropout.register_forward_hook(lambda *arguments: seen.append(arguments[2] == 0))
    grasp(model, weights, batches, generator)
    first, second, again_first, again_second = seen
    assert torch.equal(first, again_first)
    assert torch.equal(second, again_second)
    assert not torch.equal(first[:3], second)
