"""Convolutions that standardise their weights (Qiao et al. 2019, arXiv 1903.10520), as BiT and NFNets have.

The weights of each output have mean 0 and variance 1 over all inputs. A path with fewer inputs standardises
over those that it has, as a layer norm does with fewer channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


@torch.no_grad()
def standardises(layer: nn.Module) -> bool:
    """Return whether a layer is a convolution whose output is not linear in its weight.

    Example:
        >>> standardises(nn.Conv2d(2, 2, 3))
        False
    """
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    if type(layer).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
        return False
    weight = layer.weight
    shape = (1, layer.in_channels, *(2 * size for size in layer.kernel_size))
    # Not constant: weights of mean 0 would make 0 of it, whatever their scale.
    features = torch.arange(math.prod(shape)).sin().view(shape).to(weight)
    zero, one, two = (functional_call(layer, {"weight": k * weight}, (features,)) for k in (0, 1, 2))
    return not torch.allclose(two - zero, 2 * (one - zero), rtol=1e-3, atol=1e-5)


def leave_out_standardisation(convolution: nn.Module) -> None:
    """Replace the output of a 2D convolution by one that is linear in its weight, of the same size, in place.

    So a test can compare a layer of fewer inputs with one that ignores the others.

    Example:
        >>> layer = nn.Conv2d(2, 3, 3, stride=2)
        >>> leave_out_standardisation(layer)
        >>> layer(torch.zeros(1, 2, 8, 8)).shape
        torch.Size([1, 3, 3, 3])
    """
    convolution.__class__ = type("Unstandardised", (_Unstandardised, type(convolution)), {})


class _Unstandardised(nn.Conv2d):
    def forward(self, features: Tensor) -> Tensor:
        _, _, height, width = super().forward(features).shape
        result = F.conv2d(features, self.weight, self.bias, 1, "same", self.dilation, self.groups)
        return F.adaptive_avg_pool2d(result, (height, width))
