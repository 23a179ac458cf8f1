"""TreeNets (Lee et al. 2015, arXiv 1511.06314): a shared trunk and whole branches."""

from dataclasses import replace

from torch import nn

from netfission.config import FissionConfig
from netfission.methods.base import BuildPlan, Method
from netfission.methods.checks import check_several_exits
from netfission.methods.fission import FissionMethod


class TreeNetMethod(Method):
    """One network whose later stages are repeated for each exit, at their full width.

    Each branch learns from the labels alone. The branches leave after `branch_after`, by default all after
    the first stage.
    """

    settings = frozenset({"branch_after", "stages"})
    average_source = "Lee et al. 2015, arXiv 1511.06314"
    differences = (
        "branches leave after whole stages, by default the first (authors: after the first layers)",
    )

    def check(self, fission: FissionConfig) -> None:
        """Check the settings of a network.

        Raises:
            ValueError: fewer than 2 exits.
        """
        check_several_exits(fission.exits, self.config.method)

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build a `FissionNetwork` of copies; see `netfission.algorithm.fission` for errors.

        Raises:
            ValueError: fewer than 2 exits, or what `fission` refuses.
        """
        settings = plan.fission
        self.check(plan.fission)
        after = plan.branch_after or [1] * (settings.exits - 1)
        copies = replace(settings, grouping="copies", branch_after=after)
        return FissionMethod(self.config).build(replace(plan, fission=copies))
