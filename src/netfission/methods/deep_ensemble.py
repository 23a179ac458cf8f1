"""Deep Ensembles (Lakshminarayanan et al. 2017, arXiv 1612.01474): separate networks, averaged."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from netfission.config import FissionConfig, TrainingConfig
from netfission.methods.base import SINGLE_EXIT_SETTINGS, BuildPlan, Method, TrainingHook
from netfission.methods.checks import check_several_exits
from netfission.methods.fission import FissionMethod
from netfission.methods.schedules import Schedule, repeated
from netfission.surgery.masks import MaskedModule
from netfission.utils.errors import invalid


class DeepEnsemble(MaskedModule):
    """Separate networks, run in turn: images → logits `(batch, members, classes)`.

    Args:
        members: networks of images → logits `(batch, classes)`, or `(batch, exits, classes)`, in which case
            the exits of all members are concatenated; both may be followed by height and width.

    Attributes:
        active: in train mode, the only member to run; None for all of them.

    Example:
        >>> ensemble = DeepEnsemble([nn.Linear(4, 10), nn.Linear(4, 10)])
        >>> ensemble(torch.rand(5, 4)).shape
        torch.Size([5, 2, 10])
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.training = any(member.training for member in members)
        self.active: int | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits `(batch, members, classes)`."""
        members = list(self.members)
        if self.training and self.active is not None:
            members = [members[self.active]]
        logits = [member(images) for member in members]
        # Logits of a member without exits have an even number of dimensions, with height and width too.
        return torch.cat([part if part.ndim % 2 else part.unsqueeze(1) for part in logits], dim=1)


class DeepEnsembleMethod(Method):
    """`exits` networks from different seeds, trained together on the same batches or one by one.

    The members are independent: trained together, each gets the gradients that it would get alone on those
    batches. Trained one by one, each member has all epochs to itself and sees the images in another order; a
    step then needs the memory of one network.
    """

    settings: ClassVar[frozenset[str]] = SINGLE_EXIT_SETTINGS | {"one_by_one"}

    deviations = ("members are trained on the same batches (one_by_one: each in an order of its own)",)
    differences = ("all members see the same batches (authors: separate ones; one_by_one)",)

    def check(self, fission: FissionConfig) -> None:
        """Check the settings of a network.

        Raises:
            ValueError: fewer than 2 exits.
        """
        check_several_exits(fission.exits, self.config.method)

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build members from the seeds `exits * seed`, `exits * seed + 1`, …, so that runs share none.

        From trained weights members differ by what is drawn anew, such as the classifier of other classes.

        Raises:
            ValueError: fewer than 2 exits, or what `netfission.fission` refuses. Or all members are equal and
                would stay so, as they are trained on the same batches.
        """
        self.check(plan.fission)
        first = plan.fission.exits * plan.fission.seed
        seeds = range(first, first + plan.fission.exits)
        members = [FissionMethod(self.config).build(plan.with_one_exit(seed)) for seed in seeds]
        if not self.config.one_by_one and _are_equal(members):
            hint = "no weight is drawn from a seed, and equal members would stay equal on the same batches"
            raise invalid("one_by_one", "True for members that start equal", False, hint=hint)
        return DeepEnsemble(members)

    def check_start(self, plan: BuildPlan) -> None:
        """Check that trained weights fit, and that members which start from them differ; see `build`."""
        self.build(plan)

    def epochs(self, epochs: int, exits: int) -> int:
        """Return the epochs in the settings, times the members if they are trained one by one."""
        return epochs * exits if self.config.one_by_one else epochs

    def schedule(self, training: TrainingConfig, exits: int) -> Schedule:
        """Return the schedule in the settings, repeated per member if they are trained one by one."""
        schedule = super().schedule(training, exits)
        return repeated(schedule, exits) if self.config.one_by_one else schedule

    def hooks(self, exits: int, training: TrainingConfig) -> list[TrainingHook]:
        """Switch from member to member if they are trained one by one.

        Raises:
            ValueError: members are to be trained one by one on several devices.
        """
        if not self.config.one_by_one:
            return []
        if training.devices * training.machines > 1:
            raise invalid("one_by_one", "False on more than one device", True)
        return [TrainOneByOne(training.epochs)]


def _are_equal(members: Sequence[nn.Module]) -> bool:
    """Whether all members have the same parameters."""
    first, *others = (list(member.parameters()) for member in members)
    return all(all(map(torch.equal, first, other)) for other in others)


class TrainOneByOne(TrainingHook):
    """Trains one member after another.

    Args:
        epochs: of each member.

    Example:
        >>> ensemble = DeepEnsemble([nn.Linear(4, 10), nn.Linear(4, 10)])
        >>> TrainOneByOne(epochs=30).on_epoch_start(ensemble, epoch=31)
        >>> ensemble.active
        1
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_epoch_start(self, network: nn.Module, epoch: int) -> None:
        """Choose the member that this epoch trains."""
        assert isinstance(network, DeepEnsemble)
        network.active = epoch // self.epochs
