"""Wide ResNets for small images."""

import torch.nn.functional as F
from torch import Tensor, nn

from netfission.models.initialisation import he_initialise
from netfission.utils.errors import check_positive_integer, invalid


class PreActivationBlock(nn.Module):
    """Norm, ReLU and 3×3 convolution, twice: `(B, inputs, H, W)` → `(B, outputs, H/s, W/s)`, s the stride.

    If the shape changes, the 1×1 shortcut reads the normalised, rectified input, as in the published code;
    otherwise it is the identity on the raw input.

    Example:
        >>> import torch
        >>> PreActivationBlock(16, 32, stride=2)(torch.rand(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = (
            None if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add the residual to the shortcut; nothing follows the addition."""
        activated = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + shortcut


class WideResNet(nn.Module):
    """A Wide ResNet, WRN-`depth`-`width`, without dropout.

    It maps images `(batch, in_channels, height, width)` float to logits `(batch, num_classes)`. The stages
    `block1` to `block3` have 16, 32 and 64 times `width` channels and `(depth - 4) / 6` blocks each; the
    second and third halve the resolution. WRN-28-10 with 100 classes has 36,536,884 parameters.

    Source: Zagoruyko & Komodakis 2016 (arXiv 1605.07146), table 1.

    Args:
        depth: 6n + 4 with n ≥ 1.
        width: factor on the channels.
        num_classes: number of classes.
        in_channels: channels of the images.

    Raises:
        ValueError: the depth is another, or the width is not positive.

    Example:
        >>> import torch
        >>> model = WideResNet(10, 1, num_classes=10)
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int, width: int, num_classes: int, *, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise invalid("depth", "6n + 4 (10, 16, 22, 28, …)", depth)
        check_positive_integer("width", width)
        repeats = (depth - 4) // 6

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            first = PreActivationBlock(inputs, outputs, stride)
            rest = (PreActivationBlock(outputs, outputs, 1) for _ in range(repeats - 1))
            return nn.Sequential(first, *rest)

        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = stage(16, 16 * width, stride=1)
        self.block2 = stage(16 * width, 32 * width, stride=2)
        self.block3 = stage(32 * width, 64 * width, stride=2)
        self.bn = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        he_initialise(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(batch, in_channels, height, width)` to logits `(batch, num_classes)`."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = F.adaptive_avg_pool2d(F.relu(self.bn(out)), 1)
        logits: Tensor = self.fc(out.flatten(1))
        return logits
