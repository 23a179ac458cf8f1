"""Variants of the method, compared with it under one recipe: can the ensemble gain more at equal cost?

The grids `ablation-distillation`, `branching` and `figure5` compare the variants that are settings of
`netfission train`; this benchmark compares the others. Each differs in one point from channel groups with
their default settings. Several processes may share one folder; each does missing runs, as `netfission
reproduce` does. The benchmark prints a table, and writes it beside a record of each run.

    .venv/bin/python benchmarks/variants.py --data cifar100 --out variants
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netfission.config import MethodConfig, TrainingConfig
from netfission.experiments.compare import compare
from netfission.experiments.grid_files import read_grid
from netfission.grouping.copies import shuffle_weights
from netfission.losses import EnsembleDistillationLoss
from netfission.methods.base import BuildPlan, Loss, Network, StepResult, TrainingHook
from netfission.methods.fission import FissionMethod
from netfission.methods.registry import METHODS
from netfission.network import FissionNetwork


class WarmUp(FissionMethod):
    """The factor on the distillation grows from 0 to its final value over the first third of the training."""

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        self.ramp = _Ramp()

    def loss(self, training: TrainingConfig) -> EnsembleDistillationLoss:
        loss = super().loss(training)
        assert isinstance(loss, EnsembleDistillationLoss)
        self.ramp.loss = loss
        return loss

    def hooks(self, exits: int, training: TrainingConfig) -> list[TrainingHook]:
        return [self.ramp]


class _Ramp(TrainingHook):
    loss: EnsembleDistillationLoss

    def on_train_start(self, total_steps: int, epochs: int) -> None:
        self.total_steps = total_steps

    def on_batch_start(self, network: nn.Module, step: int) -> None:
        self.loss.weight = min(1.0, 3 * step / self.total_steps)


class OwnWeights(FissionMethod):
    """Layers that every path has (heads, projections) start from different values in each path."""

    def build(self, plan: BuildPlan) -> nn.Module:
        network = super().build(plan)
        assert isinstance(network, FissionNetwork)
        generator = torch.Generator().manual_seed(plan.fission.seed)
        for path in list(network.paths)[1:]:
            shuffle_weights(path, generator)
        return network


class _OtherLoss(FissionMethod):
    """Fission with another loss, from logits `(batch, exits, classes)` and labels."""

    terms: Callable[[Tensor, Tensor, Loss], Tensor]

    def step(self, network: Network, images: Tensor, labels: Tensor, loss_fn: Loss) -> StepResult:
        logits = network(images)
        return StepResult(type(self).terms(logits, labels, loss_fn), logits, labels)


class MeanOfExits(_OtherLoss):
    """The mean of the exits' losses, not their sum: shared stages get as much gradient as one exit gives."""

    @staticmethod
    def terms(logits: Tensor, labels: Tensor, loss_fn: Loss) -> Tensor:
        return loss_fn(logits, labels) / logits.shape[1]


class OneFree(_OtherLoss):
    """Exit 0 learns from the labels alone."""

    @staticmethod
    def terms(logits: Tensor, labels: Tensor, loss_fn: Loss) -> Tensor:
        distilled = torch.cat([logits[:, :1].detach(), logits[:, 1:]], dim=1)
        return loss_fn(distilled, labels) + F.cross_entropy(logits[:, 0], labels)


class Decorrelated(_OtherLoss):
    """The mean correlation of the exits' errors is added, so that they make different errors."""

    @staticmethod
    def terms(logits: Tensor, labels: Tensor, loss_fn: Loss) -> Tensor:
        errors = logits.softmax(dim=2) - F.one_hot(labels, logits.shape[2]).unsqueeze(1)
        unit = F.normalize(errors, dim=2)
        correlation = unit @ unit.transpose(1, 2)
        exits = logits.shape[1]
        pairs = (correlation.sum(dim=(1, 2)) - exits) / (exits * (exits - 1))
        return loss_fn(logits, labels) + pairs.mean()


class OfTheEnsemble(_OtherLoss):
    """The cross-entropy of the ensemble itself is added to that of its exits."""

    @staticmethod
    def terms(logits: Tensor, labels: Tensor, loss_fn: Loss) -> Tensor:
        return loss_fn(logits, labels) + F.cross_entropy(logits.mean(dim=1), labels)


VARIANTS: Mapping[str, type[FissionMethod]] = {
    "warm-up of the distillation": WarmUp,
    "weights of its own for each path": OwnWeights,
    "mean of exits": MeanOfExits,
    "exit 0 without distillation": OneFree,
    "decorrelated errors": Decorrelated,
    "cross-entropy of the ensemble": OfTheEnsemble,
}

GRID = """
title: Variants of the method, three exits by channels, on CIFAR-100
reference: as it is
settings: {exits: 3, grouping: channels}
contenders:
  as it is: {grouping: channels}
"""


def main() -> None:
    """Do the missing runs, compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="cifar100", help="data set (default: %(default)s)")
    parser.add_argument("--scale", default="laptop", help="paper or laptop (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each variant")
    parser.add_argument("--rounds", type=int, default=5, help="number of times that each is timed")
    parser.add_argument("--out", type=Path, default=Path("variants"), help="folder (default: %(default)s)")
    flags = parser.parse_args()
    for name, variant in VARIANTS.items():
        METHODS.register(name, variant)
    text = GRID + "".join(f"  {name}: {{method: {name}}}\n" for name in VARIANTS)
    grid = read_grid("variants", text).at(flags.scale, seeds=flags.seeds, data=flags.data)
    print(compare(grid, flags.out, rounds=flags.rounds).table())


if __name__ == "__main__":
    main()
