"""Ensembles by dynamic sparse training: networks sparse from the start, whose connections move as they train.

`dst-ensemble` and `edst-ensemble` are FreeTickets (Liu et al. 2022, arXiv 2106.14568, sections 3.2 and 3.3),
`neurotrails` is NeuroTrails (Grooten et al. 2025, arXiv 2505.17909). What none of the papers says is taken
from RigL (Evci et al. 2020, arXiv 1911.11134).
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from netfission.config import MethodConfig, TrainingConfig
from netfission.methods.base import SINGLE_EXIT_SETTINGS, BuildPlan, Method, TrainingHook
from netfission.methods.deep_ensemble import DeepEnsemble
from netfission.methods.fission import FissionMethod
from netfission.methods.schedules import Schedule, cosine
from netfission.methods.snapshot import Snapshots
from netfission.network import FissionNetwork
from netfission.pruning.prune import CRITERIA, prune
from netfission.pruning.regrow import GROWTHS, forget, regrow
from netfission.surgery.masks import apply_masks, dense_gradients, prunable_weights
from netfission.utils.errors import check_choice

MOVE_INTERVAL = 1000  # steps from one move to the next, in the papers' trainings of some 80,000
MIN_MOVES = 50  # so many at least in shorter ones
LAST_MOVE = 0.75  # of a phase; no connection moves after that (RigL: T_end, about so much of a training)
JUMP_SHARE = 0.8  # of the connections move between two refinements (FreeTickets: q)
EXPLORATION_LENGTH = 1.5  # as long as so many refinements (FreeTickets' script: 150 epochs and 100)

Phases = Callable[[float], tuple[int, float]]  # share of the training done → phase, and share of it done


def one_phase(progress: float) -> tuple[int, float]:
    """The training is one phase."""
    return 0, progress


def refinements(exits: int, progress: float) -> tuple[int, float]:
    """Phase 0 is the exploration, phases 1 to `exits` the refinements, equally long.

    Args:
        exits: number of refinements.
        progress: share of the training done, in [0, 1].

    Returns:
        The phase, and the share of it that is done.
    """
    # In refinements since the first began; rounded, since it may lie a hair below a whole or half one.
    since = round(progress * (EXPLORATION_LENGTH + exits) - EXPLORATION_LENGTH, 6)
    if since < 0:
        return 0, 1 + since / EXPLORATION_LENGTH
    before = min(int(since), exits - 1)
    return 1 + before, since - before


def refining(exits: int, progress: float) -> float:
    """The factor on the learning rate of EDST: 1 to explore, then 0.1 and 0.01, half a refinement each.

    FreeTickets' code: 0.1, 0.01 and 0.001.
    """
    phase, done = refinements(exits, progress)
    return 1.0 if phase == 0 else 0.1 if done < 0.5 else 0.01


class Regrowth(TrainingHook):
    """Moves connections of the network in training, see `netfission.pruning.regrow`.

    At regular steps a share of each layer's connections moves. The share falls along half a cosine from the
    start of a phase to `LAST_MOVE` of it (RigL, section 3, update schedule; FreeTickets' code keeps the share
    constant, to the end). Between two refinements of `Snapshots`, a snapshot is taken and the share is
    `JUMP_SHARE`.

    Such a step trains no weight, as in RigL: its gradient, over all batches that are added up for it,
    chooses the connections. Chance follows from the training's seed and the step, and all else that lasts
    is in the network's buffers and the optimiser, so that a resumed training goes on as it would have.

    Args:
        config: how, how often and how much.
        phases: of the training.
    """

    def __init__(self, config: MethodConfig, phases: Phases = one_phase) -> None:
        self.config = config
        self.phases = phases
        self.steps = 0  # of the training
        self.opened = ExitStack()  # the gradients of removed weights, while they are wanted

    @property
    def every(self) -> int:
        """Steps from one move to the next."""
        return self.config.regrow_every or max(1, min(MOVE_INTERVAL, self.steps // MIN_MOVES))

    def phase_at(self, step: int) -> int:
        """The phase that a step, from 0, is part of."""
        return self.phases(step / self.steps)[0]

    def leaps_at(self, step: int) -> bool:
        """Whether a step begins a refinement other than the first."""
        return step > 0 and self.phase_at(step) > max(self.phase_at(step - 1), 1)

    def share_at(self, step: int) -> float:
        """The share of the connections that moves in place of a step, from 0; mostly 0."""
        if self.leaps_at(step):
            return JUMP_SHARE
        done = self.phases(step / self.steps)[1] / LAST_MOVE
        if step == 0 or step % self.every or done >= 1:
            return 0.0
        return self.config.regrow_share * cosine(done)

    def on_train_start(self, total_steps: int, epochs: int) -> None:
        """Refuse a training in which nothing would move, or that is too short for its phases.

        Raises:
            ValueError: so it is.
        """
        self.steps = total_steps
        phases = {self.phase_at(step) for step in range(self.steps)}
        if phases != set(range(self.phases(1.0)[0] + 1)):
            raise ValueError(
                f"epochs={epochs}: {self.steps} steps are too few for an exploration and "
                f"{self.phases(1.0)[0]} refinements"
            )
        exploring = [step for step in range(1, self.steps) if self.phase_at(step) == 0]
        longest = max(
            (step for step in exploring if self.phases(step / self.steps)[1] < LAST_MOVE), default=0
        )
        if not longest:
            raise ValueError(f"epochs={epochs}: {self.steps} steps are too few for any connection to move")
        if self.every > longest:
            raise ValueError(
                f"regrow_every={self.every}: no connection would move in a training of "
                f"{self.steps} steps; takes {longest} at most"
            )

    def on_batch_start(self, network: nn.Module, step: int) -> None:
        """Ask for the gradients of removed weights where this step is to choose among them."""
        if self.config.regrow == "gradient" and self.share_at(step) > 0:
            # Opened once more by each batch that is added up: closing in between would drop the earlier ones.
            self.opened.enter_context(dense_gradients(_in_training(network)))

    def on_before_step(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, step: int, seed: int
    ) -> None:
        """Move connections; the optimiser is then left without gradients, so that its step does nothing."""
        share = self.share_at(step)
        if share == 0:
            return
        if self.leaps_at(step):
            assert isinstance(network, Snapshots)
            network.take()
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        trained = _in_training(network)
        forget(optimizer, trained, regrow(trained, share, self.config.regrow, generator))
        optimizer.zero_grad(set_to_none=True)
        self.opened.close()

    def on_exception(self) -> None:
        """Leave the network as it is outside a training."""
        self.opened.close()


def _in_training(network: nn.Module) -> nn.Module:
    """The network, or what of it is trained."""
    return network.current if isinstance(network, Snapshots) else network


class SparseTrainingMethod(Method):
    """What the three methods share: a sparse start, and connections that move.

    Exactly `sparsity` of the weights outside the heads are removed at the start, over all layers together, by
    a criterion that looks at no data; the papers' is `erk`. How many a layer keeps never changes. (In the
    papers' code the heads are sparse as well.)
    """

    settings = SINGLE_EXIT_SETTINGS | {"regrow", "regrow_every", "regrow_share"}
    deviations: ClassVar[tuple[str, ...]] = (
        "connections move every regrow_every steps, and such a step trains no weight",
    )

    def sparse_network(self, plan: BuildPlan) -> FissionNetwork:
        """A network of `exits` full-width branches, with its weights and masks drawn from the seed."""
        settings = plan.fission
        whole = replace(settings, grouping="copies", sparsity=0.0, criterion="random", pruning_steps=None)
        network = FissionMethod(self.config).build(replace(plan, fission=whole))
        assert isinstance(network, FissionNetwork)
        _, of_exits = network.parts[-1]
        heads = {id(weight) for head in of_exits.values() for weight in head.parameters()}
        names = [name for name, weight in prunable_weights(network).items() if id(weight) not in heads]
        kept = prune(
            network,
            names,
            settings.sparsity,
            criterion=settings.criterion,
            steps=settings.pruning_steps,
            seed=settings.seed,
        )
        apply_masks(network, kept)
        return network

    def hooks(self, exits: int, training: TrainingConfig) -> list[TrainingHook]:
        """Moves connections.

        Raises:
            ValueError: the training averages weights.
        """
        if training.ema is not None:
            raise ValueError(
                f"ema={training.ema}: does not go with method={self.config.method}, whose weights come and "
                "go: an average would hold more of them than the network; takes none"
            )
        return [Regrowth(self.config)]

    def check(self, plan: BuildPlan) -> None:
        """Refuse what these methods do not take.

        Raises:
            ValueError: names the setting.
        """
        config, fission = self.config, plan.fission
        method = f"method={config.method}"
        check_choice("regrow", config.regrow, GROWTHS)
        if config.regrow_every is not None and config.regrow_every < 1:
            raise ValueError(f"regrow_every={config.regrow_every}: takes a number of steps from 1")
        if not 0 < config.regrow_share <= 1:
            raise ValueError(
                f"regrow_share={config.regrow_share}: takes a share of the connections, in (0, 1]"
            )
        if fission.exits < 2:
            raise ValueError(f"exits={fission.exits}: {method} takes 2 exits or more")
        if not 0 < fission.sparsity < 1:
            raise ValueError(
                f"sparsity={fission.sparsity}: {method} takes a share between 0 and 1, as it moves the "
                "weights that are left; the paper's is sparsity=0.8 with criterion=erk"
            )
        free = [name for name, criterion in CRITERIA.items() if criterion.needs == "nothing"]
        if check_choice("criterion", fission.criterion, CRITERIA) not in free:
            raise ValueError(
                f"criterion={fission.criterion!r}: {method} starts from masks that no data chose; takes erk "
                f"(the paper's) or another of {', '.join(free)}"
            )


class DSTEnsembleMethod(SparseTrainingMethod):
    """DST Ensemble: `exits` sparse networks, each by itself, trained together on the same batches."""

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build a `DeepEnsemble`, from the same seeds as `DeepEnsembleMethod`; see `check` for errors."""
        self.check(plan)
        exits, first = plan.fission.exits, plan.fission.exits * plan.fission.seed
        seeds = range(first, first + exits)
        return DeepEnsemble([self.sparse_network(plan.with_one_exit(seed)) for seed in seeds])


class EDSTEnsembleMethod(SparseTrainingMethod):
    """EDST Ensemble: one sparse network, trained once, that leaves `exits` subnetworks on its way.

    It explores at the full learning rate, then refines `exits` times at a low one. A subnetwork is the
    network at the end of a refinement (in FreeTickets' code, at its best epoch on validation images). Between
    two refinements `JUMP_SHARE` of the connections move at once. The training is as long as that of a single
    network (FreeTickets' is longer: 450 epochs beside 250).
    """

    deviations = (
        *SparseTrainingMethod.deviations,
        "one network is trained; the exits are what it was at the end of each refinement",
        "the learning rate is held while exploring, then a tenth and a hundredth of it in each refinement",
    )

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build `Snapshots`; see `check` for errors."""
        self.check(plan)
        return Snapshots(self.sparse_network(plan.with_one_exit()), plan.fission.exits)

    def schedule(self, asked: str, exits: int) -> Schedule:
        """`refining`, whatever is asked for."""
        return partial(refining, exits)

    def hooks(self, exits: int, training: TrainingConfig) -> list[TrainingHook]:
        """See `SparseTrainingMethod.hooks`."""
        super().hooks(exits, training)
        return [Regrowth(self.config, partial(refinements, exits))]


class NeuroTrailsMethod(SparseTrainingMethod):
    """NeuroTrails: a shared trunk with a branch of its own for each exit, all of them sparse and on the move.

    Every exit learns by cross-entropy. The branches leave after `branch_after`, by default all after the
    first stage (its CIFAR script: 8 of the 12 blocks of WRN-28-10 are in the branches). `sparsity` is of
    trunk and branches together.
    """

    settings = SparseTrainingMethod.settings | {"branch_after"}

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build a `FissionNetwork`; see `check` and `netfission.algorithm.fission` for errors."""
        self.check(plan)
        after = plan.fission.branch_after or [1] * (plan.fission.exits - 1)
        return self.sparse_network(replace(plan, fission=replace(plan.fission, branch_after=after)))
