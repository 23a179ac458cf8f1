"""Ensembles by dynamic sparse training: networks that are sparse from the start, whose connections move.

`dst-ensemble` and `edst-ensemble` are FreeTickets (Liu et al. 2022, arXiv 2106.14568, sections 3.2 and 3.3),
`neurotrails` is NeuroTrails (Grooten et al. 2025, arXiv 2505.17909). Details that these papers leave open
follow RigL (Evci et al. 2020, arXiv 1911.11134).
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from netfission.config import FissionConfig, MethodConfig, TrainingConfig
from netfission.methods.base import SINGLE_EXIT_SETTINGS, BuildPlan, Method, TrainingHook
from netfission.methods.checks import check_several_exits, check_unused
from netfission.methods.deep_ensemble import DeepEnsemble
from netfission.methods.fission import FissionMethod
from netfission.methods.schedules import Schedule, cosine
from netfission.methods.snapshot import Snapshots
from netfission.network import FissionNetwork
from netfission.pruning.prune import CRITERIA, prune
from netfission.pruning.regrow import GROWTHS, gradients_of, regrow, reset_state
from netfission.surgery.masks import apply_masks, dense_gradients, prunable_weights
from netfission.utils.errors import check_choice, check_positive_integer, invalid

MOVE_INTERVAL = 1000  # steps from one move to the next, in the papers' trainings of about 80,000 steps
MIN_MOVES = 50  # per training: shorter trainings have shorter intervals
LAST_MOVE = 0.75  # share of a phase after which no connection moves (RigL's T_end is about this)
JUMP_SHARE = 0.8  # share of the connections that move between two refinements (FreeTickets: q)
EXPLORATION_LENGTH = 1.5  # in refinements (FreeTickets' script: 150 epochs and 100)

Phases = Callable[[float], tuple[int, float]]  # share of the training done → phase, and share of it done


def one_phase(progress: float) -> tuple[int, float]:
    """Return phase 0, for a training of one phase, and the share of it that is done."""
    return 0, progress


def refinements(exits: int, progress: float) -> tuple[int, float]:
    """Return the phase of a training of `EDSTEnsembleMethod`, and the share of it that is done.

    Phase 0 is the exploration; phases 1 to `exits` are the refinements, equally long.

    Args:
        exits: number of refinements.
        progress: share of the training done, in [0, 1].

    Example:
        >>> [refinements(3, progress) for progress in (0.0, 0.5, 1.0)]
        [(0, 0.0), (1, 0.75), (3, 1.0)]
    """
    # In refinements since the first began; rounded, since it may lie slightly below a multiple of a half.
    since = round(progress * (EXPLORATION_LENGTH + exits) - EXPLORATION_LENGTH, 6)
    if since < 0:
        return 0, 1 + since / EXPLORATION_LENGTH
    before = min(int(since), exits - 1)
    return 1 + before, since - before


def refining(exits: int, progress: float) -> float:
    """Return the factor on the learning rate: 1 to explore, then 0.1 and 0.01, for half a refinement each.

    Source: FreeTickets' code, with rates of 0.1, 0.01 and 0.001.

    Example:
        >>> [refining(3, progress) for progress in (0.0, 0.4, 0.5)]
        [1.0, 0.1, 0.01]
    """
    phase, done = refinements(exits, progress)
    return 1.0 if phase == 0 else 0.1 if done < 0.5 else 0.01


class Regrowth(TrainingHook):
    """Moves connections of the network during training, see `netfission.pruning.regrow`.

    At regular steps a share of each layer's connections moves. The share falls along half a cosine from the
    start of a phase to `LAST_MOVE` of it (RigL, section 3, update schedule; FreeTickets' code keeps the share
    constant, to the end). Before the first step of a refinement other than the first, `Snapshots` takes a
    snapshot; with that step the share `JUMP_SHARE` moves.

    As in FreeTickets' code, the step trains the weights, then connections move by the gradient of the same
    step, accumulated over all its batches. In RigL, such a step trains no weight. Random numbers follow from
    the training's seed and the step, and between steps all state is in the network's buffers and the
    optimiser. So a resumed training continues as if it had not stopped.

    Args:
        config: the settings `regrow`, `regrow_every` and `regrow_share`.
        phases: share of the training done → phase, and share of the phase done.

    Example:
        >>> hook = Regrowth(MethodConfig("dst-ensemble", regrow_every=10))
        >>> hook.on_train_start(total_steps=100, epochs=1)
        >>> [step for step in range(100) if hook.share_at(step) > 0]
        [10, 20, 30, 40, 50, 60, 70]
    """

    def __init__(self, config: MethodConfig, phases: Phases = one_phase) -> None:
        self.config = config
        self.phases = phases
        self.steps = 0  # of the training
        self.move: Callable[[], None] | None = None  # due after the optimiser's step
        self.opened = ExitStack()  # keeps the gradients of removed weights open while they are needed

    @property
    def every(self) -> int:
        """Number of steps from one move to the next."""
        return self.config.regrow_every or max(1, min(MOVE_INTERVAL, self.steps // MIN_MOVES))

    def phase_at(self, step: int) -> int:
        """Return the phase of a step, counted from 0."""
        return self.phases(step / self.steps)[0]

    def leaps_at(self, step: int) -> bool:
        """Return whether a step begins a refinement other than the first."""
        return step > 0 and self.phase_at(step) > max(self.phase_at(step - 1), 1)

    def share_at(self, step: int) -> float:
        """Return the share of the connections that a step, counted from 0, moves; 0 for most steps."""
        if self.leaps_at(step):
            return JUMP_SHARE
        done = self.phases(step / self.steps)[1] / LAST_MOVE
        if step == 0 or step % self.every or done >= 1:
            return 0.0
        return self.config.regrow_share * cosine(done)

    def on_train_start(self, total_steps: int, epochs: int) -> None:
        """Check that the training is long enough for its phases, and that connections move in it.

        Raises:
            ValueError: it is too short.
        """
        self.steps = total_steps
        phases = {self.phase_at(step) for step in range(self.steps)}
        if phases != set(range(self.phases(1.0)[0] + 1)):
            expected = f"enough for an exploration and {self.phases(1.0)[0]} refinements"
            raise invalid("epochs", expected, found=f"{epochs} ({self.steps} steps)")
        exploring = [step for step in range(1, self.steps) if self.phase_at(step) == 0]
        longest = max(
            (step for step in exploring if self.phases(step / self.steps)[1] < LAST_MOVE), default=0
        )
        if not longest:
            expected = "enough for connections to move"
            raise invalid("epochs", expected, found=f"{epochs} ({self.steps} steps)")
        if self.every > longest:
            expected = f"at most {longest} in a training of {self.steps} steps"
            raise invalid("regrow_every", expected, self.every, hint="no connection would move")

    def on_batch_start(self, network: nn.Module, step: int) -> None:
        """Compute gradients of removed weights if this step chooses among them."""
        if self.config.regrow == "gradient" and self.share_at(step) > 0:
            # Opened again by each batch of the step: closing in between would drop the earlier gradients.
            self.opened.enter_context(dense_gradients(_in_training(network)))

    def on_before_step(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, step: int, seed: int
    ) -> None:
        """Take a snapshot if one is due, and note the gradients by which connections move after the step."""
        share = self.share_at(step)
        if share == 0:
            return
        if self.leaps_at(step):
            assert isinstance(network, Snapshots)
            network.take()
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        trained = _in_training(network)
        gradients = gradients_of(trained) if self.config.regrow == "gradient" else {}
        self.opened.close()  # the optimiser does not see the gradients of removed weights

        def move() -> None:
            changed = regrow(trained, share, self.config.regrow, generator, gradients)
            reset_state(optimizer, trained, changed)

        self.move = move

    def on_batch_end(self, network: nn.Module, steps_done: int) -> None:
        """Move connections, if the step that has ended chose among them."""
        if self.move is not None:
            self.move()
            self.move = None

    def on_exception(self) -> None:
        """Stop computing gradients of removed weights."""
        self.opened.close()
        self.move = None


def _in_training(network: nn.Module) -> nn.Module:
    """Return the part of the network that is trained."""
    return network.current if isinstance(network, Snapshots) else network


class SparseTrainingMethod(Method):
    """Base of the methods whose networks are sparse from the start, and whose connections move.

    At the start, exactly the share `sparsity` of the weights outside the heads is removed, over all layers
    together. The criterion must not read data; that of the papers is `erk`. The number of weights of each
    layer then stays constant. In the papers' code the heads are sparse as well.
    """

    settings = SINGLE_EXIT_SETTINGS | {"regrow", "regrow_every", "regrow_share"}
    loses_weights: ClassVar[str] = "most of them are removed at the start, whatever their values"
    revision: ClassVar[int] = 1  # the steps that move connections train as well
    average_source = "FreeTickets' code (github.com/VITA-Group/FreeTickets, evaluate_ensemble)"
    deviations: ClassVar[tuple[str, ...]] = ("connections move every regrow_every steps",)
    differences: ClassVar[tuple[str, ...]] = (
        "connections move every 12 steps of 620, every 1000 of 78,000 (authors: every 1000)",
        "the share that moves falls from 0.5 to 0 at 75 % of a phase (FreeTickets: 0.5 to the end)",
        "the classifiers' layers are dense (authors: sparse, too)",
    )

    def sparse_network(self, plan: BuildPlan) -> FissionNetwork:
        """Build a network of `exits` full-width branches, its weights and masks drawn from the seed."""
        settings = plan.fission
        dense = replace(settings, grouping="copies", sparsity=0.0, criterion="random", pruning_steps=None)
        network = FissionMethod(self.config).build(replace(plan, fission=dense))
        assert isinstance(network, FissionNetwork)
        _, heads = network.parts[-1]
        head_weights = {id(weight) for head in heads.values() for weight in head.parameters()}
        names = [name for name, weight in prunable_weights(network).items() if id(weight) not in head_weights]
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
        """Move connections.

        Raises:
            ValueError: the training averages weights.
        """
        hint = "an average over moving connections would be less sparse than the network"
        check_unused("ema", training.ema, None, self.config.method, hint)
        return [Regrowth(self.config)]

    def check(self, fission: FissionConfig) -> None:
        """Check the settings that these methods share.

        Raises:
            ValueError: one is not valid.
        """
        config = self.config
        check_choice("regrow", config.regrow, GROWTHS)
        if config.regrow_every is not None:
            check_positive_integer("regrow_every", config.regrow_every)
        if not 0 < config.regrow_share <= 1:
            raise invalid("regrow_share", "a share of the connections, in (0, 1]", config.regrow_share)
        check_several_exits(fission.exits, config.method)
        if not 0 < fission.sparsity < 1:
            expected = f"a share between 0 and 1 with method={config.method}"
            hint = "the paper has sparsity=0.8 with criterion=erk"
            raise invalid("sparsity", expected, fission.sparsity, hint=hint)
        free = [name for name, criterion in CRITERIA.items() if criterion.needs == "nothing"]
        if check_choice("criterion", fission.criterion, CRITERIA) not in free:
            expected = f"one that reads no data ({', '.join(free)}) with method={config.method}"
            raise invalid("criterion", expected, fission.criterion, hint="the paper has erk")


class DSTEnsembleMethod(SparseTrainingMethod):
    """DST Ensemble: `exits` separate sparse networks, trained together on the same batches."""

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build a `DeepEnsemble`, from the same seeds as `DeepEnsembleMethod`; see `check` for errors."""
        self.check(plan.fission)
        exits, first = plan.fission.exits, plan.fission.exits * plan.fission.seed
        seeds = range(first, first + exits)
        return DeepEnsemble([self.sparse_network(plan.with_one_exit(seed)) for seed in seeds])


class EDSTEnsembleMethod(SparseTrainingMethod):
    """EDST Ensemble: one sparse network, trained once, of which `exits` subnetworks are kept.

    It explores at the full learning rate, then refines `exits` times at a low one. A subnetwork is the
    network at the end of a refinement (in FreeTickets' code, at its best epoch on validation images). Between
    two refinements `JUMP_SHARE` of the connections move at once. The training is as long as that of a single
    network (FreeTickets' is longer: 450 epochs beside 250).
    """

    joint = False
    follows_schedule = False
    may_stop_early = False
    deviations = (
        *SparseTrainingMethod.deviations,
        "one network is trained; the exits are what it was at the end of each refinement",
        "the learning rate is held while exploring, then a tenth and a hundredth of it in each refinement",
    )
    differences = (
        *SparseTrainingMethod.differences,
        "the training is as long as a single network's (authors: 1.8 times)",
    )

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build `Snapshots`; see `check` for errors."""
        self.check(plan.fission)
        return Snapshots(self.sparse_network(plan.with_one_exit()), plan.fission.exits)

    def schedule(self, training: TrainingConfig, exits: int) -> Schedule:
        """Return `refining`, whatever the schedule in the settings."""
        return partial(refining, exits)

    def hooks(self, exits: int, training: TrainingConfig) -> list[TrainingHook]:
        """Move connections, and take snapshots between refinements.

        Raises:
            ValueError: the training averages weights.
        """
        super().hooks(exits, training)
        return [Regrowth(self.config, partial(refinements, exits))]


class NeuroTrailsMethod(SparseTrainingMethod):
    """NeuroTrails: a shared trunk with one branch per exit, all sparse, whose connections move.

    Each exit learns by cross-entropy; the loss is the mean over exits, as in the authors' code. The branches
    leave after `branch_after`, by default all after the first stage (its CIFAR script: 8 of the 12 blocks of
    WRN-28-10 are in the branches). `sparsity` is that of trunk and branches together.
    """

    settings = SparseTrainingMethod.settings | {"branch_after"}
    average = "logits"
    average_source = "the authors' code (github.com/bramgrooten/neurotrails, evaluate_nll)"
    reduction = "mean"

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build a `FissionNetwork`; see `check` and `netfission.algorithm.fission` for errors."""
        self.check(plan.fission)
        after = plan.branch_after or [1] * (plan.fission.exits - 1)
        return self.sparse_network(replace(plan, fission=replace(plan.fission, branch_after=after)))
