"""What every grouping offers: one stage in, one smaller stage per path out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from netfission.config import FissionConfig
from netfission.profiling.macs import macs_by_weight
from netfission.surgery.coupling import ChannelGroup, Coupling, find_coupling
from netfission.surgery.features import Features


@dataclass(frozen=True)
class Stage:
    """A stage to divide. What is known about it is computed when it is first needed, once.

    Attributes:
        module: features → features.
        features: an example of its input, batch first; a tuple if the stage reads several tensors.

    Example:
        >>> Stage(nn.Conv2d(8, 8, 1, bias=False), torch.zeros(1, 8, 4, 4)).macs
        {'weight': 1024}
    """

    module: nn.Module
    features: Features

    @cached_property
    def coupling(self) -> Coupling:
        """Its internal channel groups, see `find_coupling`."""
        return find_coupling(self.module, self.features)

    @cached_property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of one example by prunable weight, see `macs_by_weight`."""
        return macs_by_weight(self.module, self.features)


@dataclass(frozen=True)
class RepeatedLayer:
    """A layer that every path repeats as it is.

    Attributes:
        layer: name of its weight in the stage.
        reason: why it is not divided.
        macs: multiply-accumulates of one copy for one image.

    Example:
        >>> RepeatedLayer("0.shortcut.weight", "its channels are the stage's input or output", 1024).macs
        1024
    """

    layer: str
    reason: str
    macs: int


@dataclass(frozen=True)
class StageSplit:
    """A stage divided among the paths that run through it.

    Attributes:
        paths: one module per path, each from the stage's input to the stage's output.
        repeated: layers that every path holds whole although they were to be divided.
        cost: multiply-accumulates of all paths relative to the stage; 1 if the grouping does not choose it.
        kept: for each path, tensor name → dimension → int64 indices of the stage's tensor that it holds, as
            far as they are not all; empty if paths are not made so.

    Example:
        >>> StageSplit([nn.Identity(), nn.Identity()]).cost
        1.0
    """

    paths: list[nn.Module]
    repeated: tuple[RepeatedLayer, ...] = ()
    cost: float = 1.0
    kept: Sequence[Mapping[str, Mapping[int, Tensor]]] = ()


class Grouping(ABC):
    """Divides the weights of a stage among the paths that run through it.

    A grouping of your own overrides `split`, and the other members if their defaults do not suit it. It is
    passed to `netfission.fission` as an object, or by its name once it is entered in `GROUPINGS`.

    Example:
        >>> import copy
        >>> from netfission.surgery.masks import apply_masks
        >>> class EqualCopies(Grouping):
        ...     def split(self, stage, kept, shares, generator, scores):
        ...         paths = [copy.deepcopy(stage.module) for _ in shares]
        ...         for path in paths:
        ...             apply_masks(path, kept)
        ...         return StageSplit(paths)
        >>> stage = Stage(nn.Linear(2, 1), torch.zeros(1, 2))
        >>> kept = {"weight": torch.tensor([[True, False]])}
        >>> split = EqualCopies().split(stage, kept, [1.0, 1.0], torch.Generator(), {})
        >>> [int(path.weight.count_nonzero()) for path in split.paths]
        [1, 1]
    """

    masks_weights: ClassVar[bool] = True
    """Whether pruned weights stay in their layers as masked zeros, in the stem too."""

    divides_heads: ClassVar[bool] = False
    """Whether heads are divided, too, if copies of them would cost much."""

    @property
    def needs_scores(self) -> bool:
        """Whether `split` reads the scores of the pruning criterion."""
        return False

    @classmethod
    def from_config(cls, config: FissionConfig) -> Self:
        """Make the grouping with the settings of a `fission` call."""
        return cls()

    def within(self, cost: float) -> "Grouping":
        """Return the grouping whose paths together cost about as much as a stage, times a factor.

        Args:
            cost: the factor; other than 1 only if the settings have a `budget`.
        """
        assert cost == 1
        return self

    def prunable_units(self, stage: Stage) -> Sequence[ChannelGroup]:
        """Return the channel groups of which pruning removes whole units; if empty, it removes weights."""
        return ()

    def can_divide(self, stage: Stage, paths: int) -> bool:
        """Return whether a stage can be divided among some paths; by default all can."""
        return True

    @abstractmethod
    def split(
        self,
        stage: Stage,
        kept: Mapping[str, Tensor],
        shares: Sequence[float],
        generator: torch.Generator,
        scores: Mapping[str, Tensor],
    ) -> StageSplit:
        """Make the stage of each path, without the weights that pruning removed.

        `kept` is not applied elsewhere. If `masks_weights`, apply it to every path with
        `netfission.surgery.masks.apply_masks`, as it is or divided; else leave the removed weights out.

        Args:
            stage: the stage; its module is not changed.
            kept: prunable weight of the stage → bool tensor of its shape, True where pruning kept it;
                empty if nothing was pruned.
            shares: relative share of each path, positive; exit 0 first.
            generator: a CPU generator, the only source of randomness.
            scores: prunable weight of the stage → its importance, of the weight's shape; empty unless
                `needs_scores`.
        """
