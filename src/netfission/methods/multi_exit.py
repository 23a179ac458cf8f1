"""Exits without fission: one whole network with auxiliary classifiers on its early features."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from netfission.methods.base import SINGLE_EXIT_SETTINGS, BuildPlan, Method
from netfission.methods.fission import FissionMethod
from netfission.network import ExitPath, FissionNetwork
from netfission.surgery.backbone import resolve_branches
from netfission.surgery.masks import MaskedModule
from netfission.utils.modes import in_mode


class EarlyExit(nn.Module):
    """Global average pooling and a linear layer: features → logits `(batch, classes)`.

    Args:
        features: an example of them: `(batch, channels, height, width)`, `(batch, height, width, channels)`
            or tokens `(batch, tokens, channels)`.
        classes: of the logits.
    """

    def __init__(self, features: Tensor, classes: int) -> None:
        super().__init__()
        self.positions = _positions(features)
        (channels,) = set(range(1, features.ndim)) - set(self.positions)
        self.linear = nn.Linear(features.shape[channels], classes)

    def forward(self, features: Tensor) -> Tensor:
        """Features → logits `(batch, classes)`."""
        logits: Tensor = self.linear(features.mean(dim=self.positions))
        return logits


def _positions(features: Tensor) -> tuple[int, ...]:
    """The dimensions to average over. Features are as square as images are: that tells channels apart."""
    if features.ndim == 3:
        return (1,)
    if features.ndim == 4:
        _, first, middle, last = features.shape
        return (1, 2) if first == middle != last else (2, 3)
    raise ValueError(
        f"method=multi-exit: features of shape {tuple(features.shape)} after a stage; takes models whose "
        "stages give (batch, channels, height, width) or tokens (batch, tokens, channels)"
    )


class MultiExit(MaskedModule):
    """A network whose early features feed classifiers of their own; each of its layers runs once.

    Exit 0 is the network's own, exit k leaves after stage `branch_after[k - 1]`, counted from 1.

    Args:
        single: the network, of one exit.
        branch_after: the stage that each exit from 1 leaves after.
        early: the classifiers of those exits.
    """

    def __init__(
        self, single: FissionNetwork, branch_after: Sequence[int], early: Sequence[EarlyExit]
    ) -> None:
        super().__init__()
        self.single = single
        self.branch_after = tuple(branch_after)
        self.early = nn.ModuleList(early)

    def forward(self, images: Tensor) -> Tensor:
        """Images → logits `(batch, exits, classes)`."""
        features, own = run_through(self.single, images)
        early = [exit_(features[after]) for exit_, after in zip(self.early, self.branch_after, strict=True)]
        return torch.stack([own, *early], dim=1)


def run_through(single: FissionNetwork, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """The features after the stem and after each stage of a network of one exit, and its logits."""
    path = single.paths[0]
    assert isinstance(path, ExitPath)
    features = [single.stem(images)]
    for stage in path.stages:
        features.append(stage(features[-1]))
    return features, path.head(features[-1])


class MultiExitMethod(Method):
    """Auxiliary classifiers after the stages, as in BranchyNet (Teerapittayanon et al., arXiv 1709.01686).

    They are the plainest: global average pooling and a linear layer, where BranchyNet has some convolutions
    of its own in each exit and MSDNet (Huang et al. 2018, arXiv 1703.09844) an architecture made for early
    exits. All exits learn from the labels with equal weight. The exits cost a linear layer each.
    """

    settings = SINGLE_EXIT_SETTINGS | {"branch_after"}

    def build(self, plan: BuildPlan) -> nn.Module:
        """A `MultiExit` around the single network, pruned if asked.

        Raises:
            ValueError: `exits` is below 2, the branch points are not valid, or the features of a stage cannot
                be pooled.
        """
        exits = plan.fission.exits
        if exits < 2:
            raise ValueError(f"exits={exits}: method=multi-exit takes 2 exits or more")
        single = FissionMethod(self.config).build(plan.with_one_exit())
        assert isinstance(single, FissionNetwork)
        branches = resolve_branches(plan.fission.branch_after, exits, single.stage_names)
        with in_mode(single, training=False), torch.no_grad():
            features, logits = run_through(single, plan.example)
        with torch.random.fork_rng([]):
            torch.manual_seed(plan.fission.seed)
            early = [EarlyExit(features[after], logits.shape[1]) for after in branches]
        return MultiExit(single, branches, early)
