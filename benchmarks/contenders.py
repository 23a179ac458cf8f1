"""The contenders of the benchmarks: the single network, its fissions, and the usual alternatives."""

import copy
import importlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netfission as nf
from netfission.models import create_model
from netfission.surgery.backbone import cut
from netfission.utils.errors import first_line, invalid

SINGLE = "single"
PEERS = "torch_uncertainty"
_CIFAR_RESNET = re.compile(r"cifar-resnet(\d+)(?:-w(\d+))?")
_IMAGENET_RESNET = re.compile(r"(?:timm/|torchvision/)?resnet(18|34|50|101|152)")


class UnavailableError(Exception):
    """A contender cannot take part; the message says why."""


@dataclass(frozen=True)
class Network:
    """The network that all contenders are built from.

    Attributes:
        name: name on the command line.
        model: name for `netfission.models.create_model`.
        classes: number of classes.
        side: height and width of its images.
    """

    name: str
    model: str
    classes: int
    side: int

    def create(self, seed: int = 0) -> nn.Module:
        """Return the single network; the same seed gives the same weights."""
        torch.manual_seed(seed)
        return create_model(self.model, self.classes)

    def images(self, batch_size: int) -> Tensor:
        """Return a batch of noise, float32 `(batch, 3, side, side)`."""
        return torch.randn(
            batch_size, 3, self.side, self.side, generator=torch.Generator().manual_seed(batch_size)
        )


NETWORKS = {
    network.name: network
    for network in (
        Network("resnet18", "cifar-resnet18", 100, 32),
        Network("wrn-28-10", "wrn-28-10", 100, 32),
        Network("resnet50", "timm/resnet50", 1000, 224),
    )
}


def find_network(name: str) -> Network:
    """Return one of `NETWORKS`, or the network of any model name of netfission.

    Raises:
        ValueError: the name is neither; the message suggests the closest names.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    try:
        with torch.device("meta"):
            create_model(name, 1)
    except ValueError as error:
        expected = f"one of {', '.join(NETWORKS)}, or a model's name"
        raise invalid("networks", expected, name, hint=first_line(error)) from error
    small = name.startswith(("cifar-", "wrn-"))
    return Network(name, name, classes=100 if small else 1000, side=32 if small else 224)


# --- networks that run as one -----------------------------------------------------------------------


class DeepEnsemble(nn.Module):
    """Separate networks that run one after another: images → logits `(batch, members, classes)`."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Images → logits `(batch, members, classes)`; members may return `(batch, 1, classes)`."""
        return torch.stack([member(images) for member in self.members], dim=1).flatten(1, -2)


class Peer(nn.Module):
    """A network of torch_uncertainty: images → logits `(batch, members, classes)`.

    Args:
        network: returns `(members · batch, classes)` in eval mode.
        members: number of members.
    """

    def __init__(self, network: nn.Module, members: int) -> None:
        super().__init__()
        self.network = network
        self.members = members

    def forward(self, images: Tensor) -> Tensor:
        """Images → logits `(batch, members, classes)`, in eval mode."""
        logits: Tensor = self.network(images).unflatten(0, (self.members, -1))
        return logits.transpose(0, 1)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each member on its own share of the batch (BatchEnsemble, Masksembles)."""
        return F.cross_entropy(self.network(images), labels)

    def split(self) -> tuple[nn.Module, nn.Module]:
        """Return the layers that can be traced, for inference, and the rest: features → output of `forward`.

        Raises:
            UnavailableError: the method has no such layers.
        """
        raise UnavailableError(
            "its layers divide the batch among the members, so that batch norms cannot be folded"
        )


class Packed(Peer):
    """Packed-Ensembles."""

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of every member on every image."""
        return F.cross_entropy(self.network(images), labels.repeat(self.members))

    def split(self) -> tuple[nn.Module, nn.Module]:
        """Return all layers but the last, and the last."""
        body = copy.copy(self.network)
        body._modules = self.network._modules | {"linear": nn.Identity()}
        return body, Peer(self.network.get_submodule("linear"), self.members)


class Mimo(Peer):
    """MIMO, trained on batches that contain every image several times (Havasi et al. 2021).

    Args:
        network: accepts `(members · batch, …)` images in train mode.
        members: number of members.
        repetitions: number of times that each image is in a batch.
        rho: share of a batch in which all members see the same image.
    """

    def __init__(self, network: nn.Module, members: int, repetitions: int, rho: float) -> None:
        super().__init__(network, members)
        self.format = import_optional(f"{PEERS}.transforms", "peers").MIMOBatchFormat(
            members, rho, repetitions
        )

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each member on the images in an order of its own."""
        images, labels = self.format((images, labels))
        return F.cross_entropy(self.network(images), labels)

    def split(self) -> tuple[nn.Module, nn.Module]:
        """Return all layers but the last, and the last."""
        head = nn.Sequential(self.network.get_submodule("linear"), nn.Unflatten(1, (self.members, -1)))
        return _MimoFeatures(self.network, self.members), head


class _MimoFeatures(nn.Module):
    """The layers of a MIMO network before its last one, in eval mode."""

    def __init__(self, network: Any, members: int) -> None:
        super().__init__()
        self.network = network
        self.members = members

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network.feats_forward(images.repeat(1, self.members, 1, 1))
        return features


# --- how each is trained ----------------------------------------------------------------------------

Loss = Callable[[Any, Tensor, Tensor], Tensor]  # network, images, labels → a scalar


def cross_entropy(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of one network."""
    return F.cross_entropy(network(images), labels)


def distillation(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every exit plus distillation from their ensemble."""
    return nf.ensemble_distillation_loss(network(images), labels)


def exits_cross_entropy(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every exit alone."""
    return nf.ensemble_distillation_loss(network(images), labels, weight=0)


def own_loss(network: Peer, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of the peer itself."""
    return network.loss(images, labels)


# --- the contenders ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A network or ensemble that takes part.

    Attributes:
        title: for tables.
        build: builds it from the network, in float32 on the CPU; may raise `UnavailableError`.
        loss: loss of a training step.
        trains_on: the same in words.
    """

    title: str
    build: Callable[[Network], nn.Module]
    loss: Loss = cross_entropy
    trains_on: str = "cross-entropy"


def import_optional(module: str, extra: str) -> ModuleType:
    """Import a module that may be missing.

    Raises:
        UnavailableError: it or a module that it needs is missing; the message names the extra to install.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UnavailableError(
            f"{package} cannot be imported ({error}); pip install 'netfission[{extra}]'"
        ) from error


def _fission(grouping: str, exits: int, **settings: Any) -> Callable[[Network], nn.Module]:
    def build(network: Network) -> nn.Module:
        example = network.images(2)
        backbone = cut(network.create(), example)
        last = len(backbone.stages) - 1
        # If there are more exits than stages, the last exits branch off after the same stage.
        branches = [min(number, last) for number in range(1, exits)]
        return nf.fission(
            backbone, exits, branch_after=branches, grouping=grouping, example_input=example, **settings
        )

    return build


def _deep_ensemble(network: Network) -> nn.Module:
    return DeepEnsemble([network.create(seed) for seed in range(3)])


def _peer_network(network: Network, method: str, **settings: Any) -> nn.Module:
    """The library's network of the same architecture, without dropout and biases before norms."""
    prefix = f"{method}_" if method else ""
    settings |= {"in_channels": 3, "num_classes": network.classes, "conv_bias": False, "dropout_rate": 0.0}
    if match := _CIFAR_RESNET.fullmatch(network.model):
        settings |= {"arch": int(match[1]), "width_multiplier": int(match[2] or 64) / 64, "style": "cifar"}
        name = f"{prefix}resnet"
    elif match := _IMAGENET_RESNET.fullmatch(network.model):
        settings |= {"arch": int(match[1]), "style": "imagenet"}
        name = f"{prefix}resnet"
    elif network.model == "wrn-28-10":
        settings |= {"style": "cifar"}
        name = f"{prefix}wideresnet28x10"
    else:
        raise UnavailableError(f"{PEERS} has no {network.model}")
    library = import_optional(f"{PEERS}.models.classification", "peers")
    torch.manual_seed(0)
    built: nn.Module = getattr(library, name)(**settings)
    return built.float()  # Masksembles' masks are float64, which doubles its time


def _peer(method: str, kind: type[Peer], members: int, **settings: Any) -> Callable[[Network], nn.Module]:
    return lambda network: kind(_peer_network(network, method, num_estimators=members, **settings), members)


def _mimo(network: Network) -> nn.Module:
    # The defaults of the authors' code for CIFAR and for ImageNet (uncertainty-baselines, mimo.py).
    repetitions, rho = (4, 0.0) if network.side == 32 else (2, 0.6)
    return Mimo(_peer_network(network, "mimo", num_estimators=3), 3, repetitions, rho)


def _by_channels(exits: int) -> Contender:
    return Contender(
        f"fission by channels, {exits} exits", _fission("channels", exits), distillation, _DISTILLATION
    )


_DISTILLATION = "cross-entropy of every exit and ensemble distillation"
_SHARED_BATCH = "cross-entropy, each member on a quarter of the batch (the library's default)"
_ALL_IMAGES = "cross-entropy of every member on every image"

CONTENDERS = {
    SINGLE: Contender("single network", Network.create),
    "channels-2": _by_channels(2),
    "channels-3": _by_channels(3),
    "channels-4": _by_channels(4),
    # A path keeps fewer of a bottleneck's MACs than its share, since both sides of the 3×3 shrink.
    "channels-3-exact": Contender(
        "fission by channels, 3 exits, exact partition",
        _fission("channels", 3, exact_partition=True),
        distillation,
        _DISTILLATION,
    ),
    "weights-3": Contender(
        "fission by weights, 3 exits", _fission("weights", 3), distillation, _DISTILLATION
    ),
    "deep-ensemble-3": Contender(
        "Deep Ensemble of 3", _deep_ensemble, trains_on="cross-entropy, one member after another"
    ),
    "packed-4-gamma1": Contender(
        "Packed-Ensembles of 4, α 2, γ 1",
        _peer("packed", Packed, 4, alpha=2, gamma=1),
        own_loss,
        _ALL_IMAGES,
    ),
    "packed-4-gamma2": Contender(
        "Packed-Ensembles of 4, α 2, γ 2",
        _peer("packed", Packed, 4, alpha=2, gamma=2),
        own_loss,
        _ALL_IMAGES,
    ),
    "mimo-3": Contender(
        "MIMO of 3",
        _mimo,
        own_loss,
        "cross-entropy, each image several times in a batch as in the paper: 4 at 32×32, else 2",
    ),
    "batchensemble-4": Contender("BatchEnsemble of 4", _peer("batched", Peer, 4), own_loss, _SHARED_BATCH),
    "masksembles-4": Contender(
        "Masksembles of 4, scale 2", _peer("masked", Peer, 4, scale=2.0), own_loss, _SHARED_BATCH
    ),
    # Its Wide ResNet strides in a block's second convolution, not the first: 1.13 times as many MACs.
    "peers-single": Contender(
        "single network of torch_uncertainty", lambda network: _peer_network(network, "")
    ),
}

# Contenders without distillation or without masks, which show what these add to a training step.
ABLATIONS = {
    "channels-3-cross-entropy": Contender(
        "fission by channels, 3 exits, no distillation",
        _fission("channels", 3),
        exits_cross_entropy,
        "cross-entropy of every exit",
    ),
    "copies-3": Contender(
        "fission by copies, 3 exits: no masks", _fission("copies", 3), distillation, _DISTILLATION
    ),
}
