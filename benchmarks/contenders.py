"""Who takes part in the benchmarks: the single network, its fissions, and what a user would pick instead."""

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

SINGLE = "single"
PEERS = "torch_uncertainty"
_CIFAR_RESNET = re.compile(r"cifar-resnet(\d+)(?:-w(\d+))?")
_IMAGENET_RESNET = re.compile(r"(?:timm/|torchvision/)?resnet(18|34|50|101|152)")


class UnavailableError(Exception):
    """A contender cannot take part; says why."""


@dataclass(frozen=True)
class Network:
    """The network that all contenders are made of.

    Attributes:
        name: as asked for.
        model: as `netfission.models.create_model` takes it.
        classes: of its logits.
        side: height and width of its images.
    """

    name: str
    model: str
    classes: int
    side: int

    def create(self, seed: int = 0) -> nn.Module:
        """The network itself; the same seed gives the same weights."""
        torch.manual_seed(seed)
        return create_model(self.model, self.classes)

    def images(self, batch_size: int) -> Tensor:
        """A batch of noise, float `(batch, 3, side, side)`."""
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
    """One of `NETWORKS`, or any model that netfission knows by name.

    Raises:
        ValueError: it is neither; names the nearest known ones.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    try:
        with torch.device("meta"):
            create_model(name, 1)
    except ValueError as error:
        raise ValueError(
            f"networks={name}: takes {', '.join(NETWORKS)} or a model's name; {error}"
        ) from error
    small = name.startswith(("cifar-", "wrn-"))
    return Network(name, name, classes=100 if small else 1000, side=32 if small else 224)


# --- networks that run as one -----------------------------------------------------------------------


class DeepEnsemble(nn.Module):
    """Separate networks, run in turn: images → logits `(batch, members, classes)`."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Images → logits `(batch, members, classes)`; members may give `(batch, 1, classes)`."""
        return torch.stack([member(images) for member in self.members], dim=1).flatten(1, -2)


class Peer(nn.Module):
    """A network of torch_uncertainty: images → logits `(batch, members, classes)`.

    Args:
        network: gives `(members · batch, classes)` in eval mode.
        members: how many.
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
        """Layers that can be traced, for inference, and the rest: features → what `forward` gives.

        Raises:
            UnavailableError: the method does not leave any.
        """
        raise UnavailableError(
            "its layers cut the batch up among the members, so that batch norms cannot be folded"
        )


class Packed(Peer):
    """Packed-Ensembles."""

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of every member on every image."""
        return F.cross_entropy(self.network(images), labels.repeat(self.members))

    def split(self) -> tuple[nn.Module, nn.Module]:
        """All layers but the last, and that."""
        body = copy.copy(self.network)
        body._modules = self.network._modules | {"linear": nn.Identity()}
        return body, Peer(self.network.get_submodule("linear"), self.members)


class Mimo(Peer):
    """MIMO, trained on batches in which every image stands several times (Havasi et al. 2021).

    Args:
        network: takes `(members · batch, …)` images in train mode.
        members: how many.
        repetitions: how often each image stands in a batch.
        rho: share of a batch's places that have the same image for all members.
    """

    def __init__(self, network: nn.Module, members: int, repetitions: int, rho: float) -> None:
        super().__init__(network, members)
        self.format = optional(f"{PEERS}.transforms", "peers").MIMOBatchFormat(members, rho, repetitions)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each member on its own order of the images."""
        images, labels = self.format((images, labels))
        return F.cross_entropy(self.network(images), labels)

    def split(self) -> tuple[nn.Module, nn.Module]:
        """All layers but the last, and that."""
        head = nn.Sequential(self.network.get_submodule("linear"), nn.Unflatten(1, (self.members, -1)))
        return _MimoFeatures(self.network, self.members), head


class _MimoFeatures(nn.Module):
    """What a MIMO network computes of images in eval mode, before its last layer."""

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
    """Of one network."""
    return F.cross_entropy(network(images), labels)


def distillation(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every exit plus distillation from their ensemble."""
    return nf.ensemble_distillation_loss(network(images), labels)


def exits_cross_entropy(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every exit alone."""
    return nf.ensemble_distillation_loss(network(images), labels, weight=0)


def own_loss(network: Peer, images: Tensor, labels: Tensor) -> Tensor:
    """What the peer says."""
    return network.loss(images, labels)


# --- the contenders ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One who takes part.

    Attributes:
        title: for tables.
        build: makes it of a network, in float32 on the CPU; may raise `UnavailableError`.
        loss: what it trains on.
        trains_on: the same in words.
    """

    title: str
    build: Callable[[Network], nn.Module]
    loss: Loss = cross_entropy
    trains_on: str = "cross-entropy"


def optional(module: str, extra: str) -> ModuleType:
    """A module that may be missing.

    Raises:
        UnavailableError: it, or something it needs, is; names the extra that installs it.
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
        # Where there are more exits than stages, the last exits leave after the same one.
        branches = [min(number, last) for number in range(1, exits)]
        return nf.fission(
            backbone, exits, branch_after=branches, grouping=grouping, example_input=example, **settings
        )

    return build


def _deep_ensemble(network: Network) -> nn.Module:
    return DeepEnsemble([network.create(seed) for seed in range(3)])


def _peer_network(network: Network, method: str, **settings: Any) -> nn.Module:
    """The library's network of the same architecture, without dropout and biases before norms, as ours."""
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
    library = optional(f"{PEERS}.models.classification", "peers")
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
    # Of a bottleneck a path keeps fewer multiply-accumulates than its share: both sides of its 3×3 shrink.
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
        "cross-entropy, each image several times in a batch as in the paper: 4 at 32×32, 2 else",
    ),
    "batchensemble-4": Contender("BatchEnsemble of 4", _peer("batched", Peer, 4), own_loss, _SHARED_BATCH),
    "masksembles-4": Contender(
        "Masksembles of 4, scale 2", _peer("masked", Peer, 4, scale=2.0), own_loss, _SHARED_BATCH
    ),
    # Its Wide ResNet strides in a block's second convolution, not the first: 1.13 times the MACs of ours.
    "peers-single": Contender(
        "single network of torch_uncertainty", lambda network: _peer_network(network, "")
    ),
}

# What distillation and masks add to a training step shows beside the same without.
WITHOUT = {
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
