"""The initialisation that the residual networks of this package share."""

from torch import nn


def he_initialise(model: nn.Module) -> None:
    """Set every convolution to He normal over fan-out and every batch norm to 1 and 0, in place.

    Linear layers keep PyTorch's default. Draws from PyTorch's global generator.

    Source: He et al. 2015 (arXiv 1502.01852), equation 14, as used by ResNet and Wide ResNet.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
