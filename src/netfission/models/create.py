"""Classifiers by name, over three families."""

import difflib
import re
from contextlib import nullcontext

from torch import nn

from netfission.models.cifar_resnet import CifarResNet
from netfission.models.wide_resnet import WideResNet
from netfission.utils.extras import extra
from netfission.utils.hub import quick_when_offline

_CIFAR_RESNET = re.compile(r"cifar-resnet(\d+)(?:-w(\d+))?")
_WIDE_RESNET = re.compile(r"wrn-(\d+)-(\d+)")
# These two return a tuple in train mode unless told otherwise.
_TORCHVISION_WITH_AUXILIARY_HEADS = {"googlenet", "inception_v3"}


def create_model(name: str, num_classes: int, *, in_channels: int = 3, pretrained: bool = False) -> nn.Module:
    """Build a classifier that maps images `(B, in_channels, H, W)` to logits `(B, num_classes)`.

    `name` is one of

    - `cifar-resnet18`, `cifar-resnet34`, `cifar-resnet50`, with an optional base width
      (`cifar-resnet18-w16`; default 64);
    - `wrn-D-W`, a Wide ResNet of depth D and width W, D = 6n + 4 (`wrn-28-10`);
    - a timm model, `resnet18`, `timm/resnet18` or with a tag `resnet18.a1_in1k`;
    - a torchvision classifier, `torchvision/resnet18`.

    `pretrained` (default False) loads published weights, downloading them on first use; a
    classifier of another number of classes is freshly initialised. Fresh weights are drawn from
    PyTorch's global generator.

    Raises ValueError for an unknown name (naming the nearest known ones), a model without
    published weights under `pretrained`, fewer than one class, or `in_channels` other than 3 with
    torchvision; ConnectionError where weights cannot be fetched.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if in_channels < 1:
        raise ValueError(f"in_channels must be at least 1, got {in_channels}")
    own = _own(name, num_classes, in_channels)
    if own is not None:
        if pretrained:
            raise ValueError(f"pretrained must be False for {name!r}: it has no published weights")
        return own
    if name.startswith("torchvision/"):
        return _torchvision(name, num_classes, in_channels, pretrained)
    return _timm(name, num_classes, in_channels, pretrained)


def _own(name: str, num_classes: int, in_channels: int) -> nn.Module | None:
    if match := _CIFAR_RESNET.fullmatch(name):
        depth, base_width = int(match[1]), int(match[2] or 64)
        return CifarResNet(depth, num_classes, in_channels=in_channels, base_width=base_width)
    if match := _WIDE_RESNET.fullmatch(name):
        return WideResNet(int(match[1]), int(match[2]), num_classes, in_channels=in_channels)
    return None


def _torchvision(name: str, num_classes: int, in_channels: int, pretrained: bool) -> nn.Module:
    with extra("models", f"model {name!r}"):
        from torchvision import models

    bare = name.removeprefix("torchvision/")
    if bare not in models.list_models(module=models):
        raise _unknown(name)
    if in_channels != 3:
        raise ValueError(f"in_channels must be 3 for torchvision models, got {in_channels}")
    options = (
        {"aux_logits": False, "init_weights": True, "transform_input": pretrained}
        if bare in _TORCHVISION_WITH_AUXILIARY_HEADS
        else {}
    )
    model: nn.Module = models.get_model(bare, weights=None, num_classes=num_classes, **options)
    if pretrained:
        try:
            weights = models.get_model_weights(bare).DEFAULT.get_state_dict(check_hash=True)
        except OSError as error:
            raise _unreachable(name) from error
        # torchvision builds pretrained models with their own number of classes only: what does
        # not fit is the classifier.
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        fitting = {key: value for key, value in weights.items() if shapes.get(key) == value.shape}
        model.load_state_dict(fitting, strict=False)
    return model


def _timm(name: str, num_classes: int, in_channels: int, pretrained: bool) -> nn.Module:
    with extra("models", f"model {name!r}"):
        import timm

    bare = name.removeprefix("timm/")
    architecture, _, tag = bare.partition(".")
    tags = timm.list_pretrained(f"{architecture}.*") if timm.is_model(architecture) else []
    if not timm.is_model(architecture) or (tag and bare not in tags):
        raise _unknown(name, *(f"{prefix}{known}" for known in tags for prefix in ("", "timm/")))
    if pretrained and not timm.is_model_pretrained(architecture):
        raise ValueError(f"pretrained must be False for {name!r}: it has no published weights")
    try:
        with quick_when_offline() if pretrained else nullcontext():
            model: nn.Module = timm.create_model(
                bare, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels
            )
    except OSError as error:
        raise _unreachable(name) from error
    return model


def _unreachable(name: str) -> ConnectionError:
    return ConnectionError(
        f"cannot fetch the pretrained weights of {name!r}: "
        "pass pretrained=False, or place them in the hub cache on a machine with a network"
    )


def _unknown(name: str, *also: str) -> ValueError:
    with extra("models", f"model {name!r}"):
        import timm
        from torchvision import models

    known = [
        *(f"cifar-resnet{depth}" for depth in (18, 34, 50)),
        *(f"wrn-{depth}-{width}" for depth in (16, 22, 28, 40) for width in (1, 2, 4, 8, 10)),
        *timm.list_models(),
        *(f"torchvision/{other}" for other in models.list_models(module=models)),
        *also,
    ]
    nearest = ", ".join(difflib.get_close_matches(name, known, n=4, cutoff=0.4))
    return ValueError(
        f"unknown model {name!r}: nearest known names: {nearest or 'none'}; "
        "known are cifar-resnet18|34|50[-wN], wrn-D-W, timm's names and torchvision/NAME"
    )
