"""Exits without fission: one whole network with auxiliary classifiers on its early features."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from netfission.config import FissionConfig
from netfission.methods.base import SINGLE_EXIT_SETTINGS, BuildPlan, Method
from netfission.methods.checks import check_several_exits
from netfission.methods.fission import FissionMethod
from netfission.network import FissionNetwork, LinearExit
from netfission.surgery.backbone import cut, resolve_branches
from netfission.surgery.features import Features
from netfission.surgery.masks import MaskedModule
from netfission.utils.modes import in_mode
from netfission.utils.seeds import seeded


class MultiExit(MaskedModule):
    """A network with auxiliary classifiers on its early features; each of its layers runs once.

    Exit 0 is the network's own; exit k leaves after stage `branch_after[k - 1]`, counted from 1.

    Args:
        single: the network, of one exit.
        branch_after: for each exit from exit 1, the stage after which it leaves.
        early: the classifiers of these exits.
    """

    def __init__(
        self, single: FissionNetwork, branch_after: Sequence[int], early: Sequence[LinearExit]
    ) -> None:
        super().__init__()
        self.single = single
        self.training = single.training
        self.branch_after = tuple(branch_after)
        self.early = nn.ModuleList(early)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits `(batch, exits, classes)`."""
        features, logits = run_through(self.single, images)
        early = [exit_(features[after]) for exit_, after in zip(self.early, self.branch_after, strict=True)]
        return torch.stack([logits, *early], dim=1)


def run_through(single: FissionNetwork, images: Tensor) -> tuple[list[Features], Tensor]:
    """Return the features after the stem and after each stage of a network of one exit, and its logits.

    Example:
        >>> from netfission import fission
        >>> from netfission.models import create_model
        >>> images = torch.rand(2, 3, 8, 8)
        >>> single = fission(create_model("wrn-10-1", 10), exits=1, example_input=images)
        >>> features, logits = run_through(single, images)
        >>> [tuple(values.shape) for values in features], tuple(logits.shape)
        ([(2, 16, 8, 8), (2, 16, 8, 8), (2, 32, 4, 4), (2, 64, 2, 2)], (2, 10))
    """
    (path,) = single.exit_paths
    logits, features = path(single.stem(images), range(len(path.stages) + 1))
    return features, logits


class MultiExitMethod(Method):
    """Auxiliary classifiers after the stages, as in BranchyNet (Teerapittayanon et al., arXiv 1709.01686).

    Each is global average pooling and a linear layer. BranchyNet also has convolutions in each exit, and
    MSDNet (Huang et al. 2018, arXiv 1703.09844) has an architecture made for early exits. All exits learn
    from the labels with equal weight: the sum of their losses, as in MSDNet's code.
    """

    settings = SINGLE_EXIT_SETTINGS | {"branch_after"}
    average = "logits"
    average_source = "chosen here as for fission; the authors of BranchyNet and MSDNet answer with one exit"
    differences = (
        "exits are linear layers, without convolutions, and all are averaged (authors: one exit answers)",
    )

    def check(self, fission: FissionConfig) -> None:
        """Check the settings of a network.

        Raises:
            ValueError: fewer than 2 exits.
        """
        check_several_exits(fission.exits, self.config.method)

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build a `MultiExit` around the single network, pruned if the settings say so.

        Raises:
            ValueError: fewer than 2 exits, invalid branch points, or features that cannot be pooled.
        """
        exits = plan.fission.exits
        self.check(plan.fission)
        single = self._single(plan, plan.fission.stages)
        if plan.fission.stages is None and len(single.stage_names) < exits:  # equal blocks in more groups
            names = cut(plan.create(plan.fission.seed), plan.example, exits=exits).stage_names
            single = self._single(plan, list(names))
        branches = resolve_branches(plan.fission.branch_after, exits, single.stage_names)
        with in_mode(single, training=False), torch.no_grad():
            features, logits = run_through(single, plan.example)
        with seeded(plan.fission.seed):
            early = [LinearExit(features[after], logits.shape[1], plan.example) for after in branches]
        return MultiExit(single, branches, early)

    def _single(self, plan: BuildPlan, stages: list[str] | None) -> FissionNetwork:
        one = plan.with_one_exit()
        single = FissionMethod(self.config).build(replace(one, fission=replace(one.fission, stages=stages)))
        assert isinstance(single, FissionNetwork)
        return single
