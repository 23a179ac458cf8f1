"""Exits without fission: one whole network with linear classifiers on its early features."""

from dataclasses import replace

from torch import nn

from netfission.config import FissionConfig
from netfission.methods.base import SINGLE_EXIT_SETTINGS, BuildPlan, Method
from netfission.methods.checks import check_several_exits
from netfission.methods.fission import FissionMethod
from netfission.surgery.backbone import cut, resolve_branches


class MultiExitMethod(Method):
    """Linear exits of the whole network, as in BranchyNet (Teerapittayanon et al., arXiv 1709.01686).

    It is fission with one exit and `linear_exits`, whose losses have no distillation. Each linear exit is
    global average pooling and a linear layer; for a class of each pixel, a 1×1 convolution of the features,
    enlarged to the image. BranchyNet also has convolutions in each exit, and MSDNet (Huang et al. 2018, arXiv
    1703.09844) has an architecture made for early exits. All exits learn from the labels with equal weight:
    the sum of their losses, as in MSDNet's code.
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
        """Build a `FissionNetwork` of one exit and linear exits, pruned if the settings say so.

        Raises:
            ValueError: fewer than 2 exits, invalid branch points, or features that cannot be pooled.
        """
        settings = plan.fission
        self.check(settings)
        model = plan.create(settings.seed)
        names = cut(model, plan.example, settings.stages).stage_names
        if settings.stages is None and len(names) < settings.exits:  # equal blocks in more groups
            names = cut(model, plan.example, exits=settings.exits).stage_names
        branches = resolve_branches(plan.branch_after, settings.exits, names)
        one = plan.with_one_exit()
        settings = replace(one.fission, stages=list(names), linear_exits=list(branches), linear_weight=1.0)
        return FissionMethod(self.config).build(replace(one, create=lambda seed: model, fission=settings))
