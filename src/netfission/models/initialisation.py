"""The initialisation of this package's residual networks."""

from torch import nn


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
