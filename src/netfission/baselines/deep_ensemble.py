"""Deep Ensembles (Lakshminarayanan et al. 2017, arXiv 1612.01474): separate networks, averaged."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from netfission.pruning.masks import Guarded
from netfission.training.method import Fission, Method, Plan


class DeepEnsemble(Guarded):
    """Separate networks, run in turn: images → logits `(batch, members, classes)`.

    Args:
        members: each images → logits `(batch, classes)`, or `(batch, exits, classes)`, whose exits then stand
            side by side.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Images → logits `(batch, members, classes)`."""
        logits = [member(images) for member in self.members]
        return torch.cat([each if each.ndim == 3 else each.unsqueeze(1) for each in logits], dim=1)


class DeepEnsembleMethod(Method):
    """`exits` networks, each from a seed of its own, trained together on the same batches.

    Nothing couples them: each gets the gradients, and so the weights, that it would get alone on those
    batches.
    """

    def build(self, plan: Plan) -> nn.Module:
        """Members from the seeds `exits * seed`, `exits * seed + 1`, …, so that no two runs share one."""
        if plan.fission.exits < 2:
            raise ValueError(f"exits={plan.fission.exits}: a Deep Ensemble takes 2 members or more")
        first = plan.fission.exits * plan.fission.seed
        seeds = range(first, first + plan.fission.exits)
        return DeepEnsemble([Fission(self.config).build(plan.of_one_exit(seed)) for seed in seeds])
