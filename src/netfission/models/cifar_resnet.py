"""ResNet-18, -34 and -50 for small images: a 3×3 stem of stride 1 and no max-pooling."""

import torch.nn.functional as F
from torch import Tensor, nn

from netfission.models.initialisation import he_initialise
from netfission.utils.errors import check_positive_integer, invalid


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Make the identity if the shapes allow it, and a 1×1 projection otherwise (option B)."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut: `(B, inputs, H, W)` → `(B, width, H/s, W/s)`, s the stride.

    Example:
        >>> import torch
        >>> BasicBlock(16, 32, stride=2)(torch.rand(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add the residual to the shortcut, then rectify."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut: `(B, inputs, H, W)` → `(B, 4·width, H/s, W/s)`.

    Example:
        >>> import torch
        >>> Bottleneck(16, 8, stride=2)(torch.rand(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add the residual to the shortcut, then rectify."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


# depth → type of block, and number of blocks per stage (He et al. 2016, table 1)
_LAYOUTS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


class CifarResNet(nn.Module):
    """A ResNet whose stem keeps the resolution, for images of about 32×32 pixels.

    It maps images `(batch, in_channels, height, width)` float to logits `(batch, num_classes)`. The stages
    `layer1` to `layer4` have 1, 2, 4 and 8 times `base_width` channels (4 times that for depth 50). Each
    stage after the first halves the resolution. With 100 classes and the default width, depth 18 has
    11,220,132 parameters.

    Source: He et al. 2016 (arXiv 1512.03385), with the stem of its CIFAR networks (section 4.2).

    Args:
        depth: 18, 34 or 50.
        num_classes: number of classes.
        in_channels: channels of the images.
        base_width: channels of the stem.

    Raises:
        ValueError: the depth is another, or the base width is not positive.

    Example:
        >>> import torch
        >>> model = CifarResNet(18, num_classes=10, base_width=8)
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int, num_classes: int, *, in_channels: int = 3, base_width: int = 64) -> None:
        super().__init__()
        if depth not in _LAYOUTS:
            raise invalid("depth", f"one of {', '.join(map(str, _LAYOUTS))}", depth)
        check_positive_integer("base_width", base_width)
        block, repeats = _LAYOUTS[depth]

        def stage(index: int, inputs: int) -> nn.Sequential:
            width = base_width << index
            first = block(inputs, width, stride=1 if index == 0 else 2)
            rest = (block(block.expansion * width, width, 1) for _ in range(repeats[index] - 1))
            return nn.Sequential(first, *rest)

        features = [block.expansion * base_width << index for index in range(4)]
        self.conv1 = _conv(in_channels, base_width, 3)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.layer1 = stage(0, base_width)
        self.layer2 = stage(1, features[0])
        self.layer3 = stage(2, features[1])
        self.layer4 = stage(3, features[2])
        self.fc = nn.Linear(features[3], num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(batch, in_channels, height, width)` to logits `(batch, num_classes)`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits
