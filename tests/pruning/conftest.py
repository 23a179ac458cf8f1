from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tiny(nn.Module):
    """A classifier with all that scoring could disturb: batch norm, dropout, an index buffer."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(3, 4, 3, stride=2)
        self.fc = nn.Linear(4, 5)
        self.register_buffer("order", torch.tensor([2, 0, 1]))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.dropout(F.relu(self.bn(self.conv1(images))))[:, self.order]
        return self.fc(F.relu(self.conv2(hidden)).mean((2, 3)))


@pytest.fixture
def tiny() -> Callable[[float], Tiny]:
    def build(dropout: float) -> Tiny:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Tiny(dropout).double()
            for value in (model.bn.weight, model.bn.bias, model.bn.running_mean):
                nn.init.normal_(value)
        return model

    return build


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def weights(generator: torch.Generator) -> dict[str, Tensor]:
    """Weights for `Tiny` other than its own, a third of them zero: what a half-pruned net has."""
    shapes = {"conv1.weight": (3, 2, 3, 3), "conv2.weight": (4, 3, 3, 3), "fc.weight": (5, 4)}
    drawn = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / 2
        for name, shape in shapes.items()
    }
    return {
        name: weight * (torch.rand(weight.shape, generator=generator) > 1 / 3)
        for name, weight in drawn.items()
    }


@pytest.fixture
def batches(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Two batches of unequal size."""
    return [
        (
            torch.randn(size, 2, 7, 7, generator=generator, dtype=torch.float64),
            torch.randint(5, (size,), generator=generator),
        )
        for size in (6, 3)
    ]


@pytest.fixture
def tiny_loss() -> Callable[..., Tensor]:
    """What `Tiny` does in train mode without dropout, and its loss, spelt out step by step."""

    def loss(
        model: Tiny,
        weights: Mapping[str, Tensor],
        batches: list[tuple[Tensor, Tensor]],
        temperature: float = 1.0,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        scale, shift = (value.detach().view(-1, 1, 1) for value in (model.bn.weight, model.bn.bias))
        for images, labels in batches:
            hidden = F.conv2d(images, weights["conv1.weight"], padding=1)
            mean = hidden.mean((0, 2, 3), keepdim=True)
            variance = (hidden - mean).square().mean((0, 2, 3), keepdim=True)
            hidden = (hidden - mean) / (variance + model.bn.eps).sqrt() * scale + shift
            hidden = hidden.clamp(min=0)[:, [2, 0, 1]]
            hidden = F.conv2d(hidden, weights["conv2.weight"], model.conv2.bias.detach(), stride=2)
            features = hidden.clamp(min=0).mean((2, 3))
            logits = (features @ weights["fc.weight"].T + model.fc.bias.detach()) / temperature
            for row, label in zip(logits, labels, strict=True):
                total = total + row.exp().sum().log() - row[label]
        return total

    return loss
