"""Variants of dividing a fine-tuned network that are no settings of `netfission train`, under one recipe.

Each starts from the same fine-tuned network as the others of its seed, has three exits by channels after
stage 4 of 5, learns from that network, and differs in one point. Several processes may share one folder; each
does missing runs, as `netfission reproduce` does. The benchmark prints a table, and writes it beside a record
of each run.

    .venv/bin/python benchmarks/finetune_variants.py --data cifar100-search --weights lite0.pth
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netfission.config import MethodConfig, TrainingConfig
from netfission.experiments.compare import compare
from netfission.experiments.grid_files import read_grid
from netfission.methods.base import Distillation, Loss, Network, StepResult, TrainingHook
from netfission.methods.fission import FissionMethod
from netfission.methods.registry import METHODS
from netfission.network import FissionNetwork
from netfission.runs.lightning_module import TrainingModule

_FADED = 0.4  # share of the training after which the other paths are faded out
_SIMILARITY = 3000.0  # weight of Tung & Mori 2019, section 4.1
_BETA = 0.4  # of the shares of two images in the features of a path


class Fading(FissionMethod):
    """Each exit begins with the mean of all paths' logits; the other paths are faded out, not cut at once."""

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        self.fade = _Fade()

    def hooks(self, exits: int, training: TrainingConfig) -> list[TrainingHook]:
        """Return what counts the steps."""
        return [self.fade]

    def step(self, network: Network, images: Tensor, labels: Tensor, loss_fn: Loss) -> StepResult:
        """Compute the loss of exits that the other paths still help."""
        own = network(images)
        others = own.sum(dim=1, keepdim=True) - own
        logits = (own + self.fade.left * others) / (1 + self.fade.left * (own.shape[1] - 1))
        return StepResult(loss_fn(logits, labels), logits, labels)


class _Fade(TrainingHook):
    left = 1.0  # factor on the other paths' logits

    def on_train_start(self, total_steps: int, epochs: int) -> None:
        self.total_steps = total_steps

    def on_batch_start(self, network: nn.Module, step: int) -> None:
        self.left = max(0.0, 1 - step / (_FADED * self.total_steps))


class ErrorsOfEarlierExits(FissionMethod):
    """An image counts the more for an exit, the less likely the exits before it find its class (boosting)."""

    def step(self, network: Network, images: Tensor, labels: Tensor, loss_fn: Loss) -> StepResult:
        """Compute the usual loss, with weights on the cross-entropy of all exits but the first."""
        logits = network(images)
        of_class = logits.log_softmax(dim=2).gather(2, labels[:, None, None].expand(-1, logits.shape[1], 1))
        loss = loss_fn(logits, labels)
        for exit_ in range(1, logits.shape[1]):
            missing = 1 - of_class[:, :exit_, 0].detach().exp().mean(dim=1)
            weights = missing / missing.mean().clamp(min=1e-3)
            loss = loss - ((weights - 1) * of_class[:, exit_, 0]).mean()
        return StepResult(loss, logits, labels)


class OwnViews(FissionMethod):
    """Each path sees the features at the branch point mixed with those of other images, of its own choice.

    As manifold mixup (Verma et al. 2019, arXiv 1806.05236), with a permutation and a share for each path.
    Exits learn from the labels of both images and from the parent's logits, mixed likewise, and not from
    each other, as they see different images.
    """

    def step(self, network: Network, images: Tensor, labels: Tensor, loss_fn: Loss) -> StepResult:
        """Compute the cross-entropy of each exit for both images that it sees."""
        stages = _own_stages(_network_of(network))
        share = torch.distributions.Beta(_BETA, _BETA)
        self.mixtures = [(float(share.sample()), torch.randperm(len(images))) for _ in stages]
        with ExitStack() as hooks:
            for stage, mixture in zip(stages, self.mixtures, strict=True):
                hooks.enter_context(_hooked(stage, partial(_mix, mixture)))
            logits = network(images)
        losses = [
            own * F.cross_entropy(logits[:, exit_], labels)
            + (1 - own) * F.cross_entropy(logits[:, exit_], labels[order])
            for exit_, (own, order) in enumerate(self.mixtures)
        ]
        return StepResult(torch.stack(losses).sum(), logits, labels)

    def with_parent(
        self,
        result: StepResult,
        images: Tensor,
        parent: nn.Module | None,
        training: TrainingConfig,
        distil: Distillation | None = None,
    ) -> StepResult:
        """Add the distillation from the parent's logits, mixed for each exit."""
        assert parent is not None and distil is not None
        with torch.no_grad():
            teacher = parent(images)
            mixed = [own * teacher + (1 - own) * teacher[order] for own, order in self.mixtures]
        loss = distil(result.logits, torch.stack(mixed, dim=1), result.labels, training.temperature)
        return result._replace(loss=result.loss + training.parent_weight * loss)


def _mix(mixture: tuple[float, Tensor], _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    own, order = mixture
    return (own * inputs[0] + (1 - own) * inputs[0][order],)


class FeaturesOfTheParent(FissionMethod):
    """Images that the parent's last features find alike are to be alike in those of each path.

    Features of a path have fewer channels than the parent's, so that similarities are compared, as by Tung &
    Mori 2019 (arXiv 1907.09682, equations 1 to 4).
    """

    def step(self, network: Network, images: Tensor, labels: Tensor, loss_fn: Loss) -> StepResult:
        """Compute the usual loss, and keep the features of each path."""
        self.features: list[Tensor] = []
        with ExitStack() as hooks:
            for path in _network_of(network).exit_paths:
                hooks.enter_context(_hooked(path.head, partial(_keep, self.features)))
            return super().step(network, images, labels, loss_fn)

    def with_parent(
        self,
        result: StepResult,
        images: Tensor,
        parent: nn.Module | None,
        training: TrainingConfig,
        distil: Distillation | None = None,
    ) -> StepResult:
        """Add the distance of the similarities to the distillation of logits."""
        assert parent is not None
        of_parent: list[Tensor] = []
        with _hooked(parent.get_submodule("global_pool"), partial(_keep, of_parent)):
            result = super().with_parent(result, images, parent, training, distil)
        target = _similarities(of_parent[0])
        distances = [F.mse_loss(_similarities(features), target) for features in self.features]
        return result._replace(loss=result.loss + _SIMILARITY * torch.stack(distances).sum())


def _keep(kept: list[Tensor], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    kept.append(inputs[0])


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Call a hook before each pass of a module while the context lasts."""
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _similarities(features: Tensor) -> Tensor:
    """Return those of all pairs of images `(batch, batch)`, each row of length 1."""
    rows = features.flatten(1)
    return F.normalize(rows @ rows.T, dim=1)


def _network_of(module: Network) -> FissionNetwork:
    """Return the network that a training calls, or a measurement of its cost."""
    return cast(FissionNetwork, module.network if isinstance(module, TrainingModule) else module)


def _own_stages(network: FissionNetwork) -> list[nn.Module]:
    """Return the first stage of each path after the branch point, which is the same for all."""
    (shared,) = set(network.branch_after)
    trunk, *branches = network.exit_paths
    return [trunk.stages[shared], *(branch.stages[0] for branch in branches)]


VARIANTS: Mapping[str, type[FissionMethod]] = {
    "other paths faded out": Fading,
    "errors of earlier exits count more": ErrorsOfEarlierExits,
    "a view of its own for each path": OwnViews,
    "features of the parent as targets": FeaturesOfTheParent,
}

GRID = """
title: Variants of dividing a fine-tuned network, EfficientNet-Lite0
reference: fission after stage 4
settings:
  {limit_per_class: 20, model: tf_efficientnet_lite0, image_size: 64, validation: 0.0, crop_padding: 4,
   flip: true, epochs: 5, batch_size: 64, optimizer: adamw, learning_rate: 0.0005, schedule: one_cycle,
   channels_last: true, exits: 3}
scales: {search: {}}
contenders:
  fine-tuned network: {exits: 1, multiply: {epochs: 1.6}}
  fission after stage 4: &fission
    {from: fine-tuned network, grouping: channels, branch_after: [4, 4], assignment: importance,
     criterion: magnitude, reconstruct: true, pruning_batches: 32, parent_weight: 1.0}
"""


def main() -> None:
    """Do the missing runs, compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="cifar100", help="data set (default: %(default)s)")
    parser.add_argument("--weights", help="file of trained weights (default: published ones)")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each variant")
    parser.add_argument("--rounds", type=int, default=5, help="number of times that each is timed")
    parser.add_argument("--out", type=Path, default=Path("finetune-variants"), help="default: %(default)s")
    flags = parser.parse_args()
    for name, variant in VARIANTS.items():
        METHODS.register(name, variant)
    text = GRID + "".join(f"  {name}: {{<<: *fission, method: {name}}}\n" for name in VARIANTS)
    start: dict[str, Any] = {"pretrained": True} if flags.weights is None else {"weights": flags.weights}
    grid = read_grid("finetune-variants", text).at("search", seeds=flags.seeds, data=flags.data, **start)
    print(compare(grid, flags.out, rounds=flags.rounds).table())


if __name__ == "__main__":
    main()
