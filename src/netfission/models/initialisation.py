"""Initial weights: of this package's residual networks, and of a new classifier on trained features."""

from collections.abc import Collection

import torch
from torch import nn

CLASSIFIER_STD = 0.01


def he_initialise(model: nn.Module) -> None:
    """Set convolutions to He normal over fan-out, and batch norms to weight 1 and bias 0, in place.

    Linear layers keep PyTorch's default. The weights are drawn from PyTorch's global generator.

    Source: He et al. 2015 (arXiv 1502.01852), equation 14, as used by ResNet and Wide ResNet.

    Example:
        >>> layer = nn.BatchNorm2d(2)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> he_initialise(layer)
        >>> layer.weight.tolist()
        [1.0, 1.0]
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


@torch.no_grad()
def start_classifier(model: nn.Module, names: Collection[str]) -> None:
    """Scale the weights of a new classifier on trained features down, and set its biases to 0, in place.

    A model's own initialisation can be far too large for few classes: timm's EfficientNets draw from
    ±1/√classes, which for 5 classes gives logits of several units, and gradients that spoil the features.

    Args:
        model: whose other weights are trained.
        names: of the tensors of the classifier. Those of linear layers and convolutions are changed: no
            weight tensor has a standard deviation above 0.01 then.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> start_classifier(model, ["1.weight", "1.bias"])
        >>> bool(model[1].weight.std(correction=0) < 0.0101), model[1].bias.tolist()
        (True, [0.0, 0.0])
    """
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        if name not in names or not isinstance(model.get_submodule(layer), nn.Linear | nn.Conv2d):
            continue
        if kind == "weight":
            spread = parameter.std(correction=0).item()
            parameter.mul_(CLASSIFIER_STD / max(spread, CLASSIFIER_STD))
        else:
            nn.init.zeros_(parameter)
