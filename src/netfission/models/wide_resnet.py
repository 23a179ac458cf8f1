"""Wide ResNets for small images."""

import torch.nn.functional as F
from torch import Tensor, nn

from netfission.models.initialisation import he_initialise


class PreActivationBlock(nn.Module):
    """Norm, ReLU and 3×3 convolution, twice: `(B, inputs, H, W)` to `(B, outputs, H/s, W/s)`.

    Where the width changes, the 1×1 shortcut reads the normalised, rectified input, as in the
    published code; elsewhere it is the identity on the raw input.
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

    Maps images `(B, in_channels, H, W)` float to logits `(B, num_classes)`. The stages `block1`
    to `block3` have 16, 32 and 64 times `width` channels and `(depth - 4) / 6` blocks each; the
    second and third halve the resolution. WRN-28-10 with 100 classes has 36,536,884 parameters.

    Raises ValueError where `depth` is not 6n + 4 with n ≥ 1, or `width` is below 1.

    Source: Zagoruyko & Komodakis 2016 (arXiv 1605.07146), table 1.
    """

    def __init__(self, depth: int, width: int, num_classes: int, *, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, ...), got {depth}")
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
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
        """Map images `(B, in_channels, H, W)` to logits `(B, num_classes)`."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = F.adaptive_avg_pool2d(F.relu(self.bn(out)), 1)
        logits: Tensor = self.fc(out.flatten(1))
        return logits
