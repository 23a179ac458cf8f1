"""The Lightning module: loss, optimiser, schedule, and the metrics shown while training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf, isfinite
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from netfission.config import DataConfig, MethodConfig, RunConfig, TrainingConfig
from netfission.data import Augmentation, Batches, ImageData, Split
from netfission.data.augment import Balance
from netfission.data.batches import PairTransform
from netfission.ensemble import Average
from netfission.evaluation import run_batches
from netfission.methods.base import Method
from netfission.methods.fission import FissionMethod
from netfission.methods.optimizers import make_optimizer
from netfission.runs.setup import augmentation, data_task, make_batches
from netfission.tasks import Task, find_task
from netfission.tasks.base import Collected
from netfission.utils.text import decimal

LARGEST_NLL = 1e3  # nats, of a network that has not diverged; a guess among a million classes has 14
_ADVICE = "try a lower learning_rate or clip=1"
_CHECKED_IMAGES = 32  # of which the NLL is computed


class DivergedError(RuntimeError):
    """The loss or a weight is no longer a finite number, or the trained network's NLL is absurdly large."""


class RunningMetrics:
    """Sums over one epoch, kept on the device so that no step waits for them.

    Args:
        average: what the ensemble averages over the exits.
        task: what is scored, and how; default the classes of images.
    """

    def __init__(self, average: Average, task: Task | None = None) -> None:
        self.average = average
        self.task = task or find_task(DataConfig().task, ())
        self.sums: Tensor | None = None

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, loss: Tensor | None = None) -> None:
        """Add a batch: outputs `(batch, exits, outputs)` of the network, and targets as the task has them."""
        correct, nll = self.task.progress(logits.detach().float(), labels, self.average)
        count = len(labels)
        sums = torch.stack(
            [nll.new_tensor(count), nll, nll.new_zeros(()) if loss is None else loss.detach() * count]
        )
        sums = torch.cat([sums, correct.to(sums.dtype)]).double()
        self.sums = sums if self.sums is None else self.sums + sums

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the score of each exit and of the ensemble, its NLL, and the loss; {} before a batch.

        The score is the accuracy, or what `Task.progress` of another task says.
        """
        if self.sums is None:
            return {}
        count, nll, loss, *correct = self.sums.tolist()
        metrics = {f"{prefix}/exit{exit_}": right / count for exit_, right in enumerate(correct[:-1])}
        metrics |= {f"{prefix}/ensemble": correct[-1] / count, f"{prefix}/nll": nll / count}
        return metrics | ({f"{prefix}/loss": loss / count} if loss else {})


class _Shared:
    """Holds a module that is no part of the module that has it: neither trained, saved nor copied with it."""

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self


class TrainingModule(lightning.LightningModule):
    """Trains a network with logits `(batch, exits, classes)` by a method.

    Args:
        network: what the method built, or any module with such logits.
        config: how to train.
        seed: seed of dropout and mixing, set anew per epoch so that a resumed epoch repeats.
        exits: number of predictions in the settings.
        method: loss, steps and schedule of the training; default those of fission.
        scales: name of a parameter → factor on its learning rate; default 1 for all.
        parent: the network that the training started from, images → logits `(batch, classes)`, if it teaches;
            neither trained nor saved.
        task: what the network learns; default the classes of images.
    """

    def __init__(
        self,
        network: nn.Module,
        config: TrainingConfig,
        seed: int = 0,
        exits: int = 1,
        method: Method | None = None,
        scales: Mapping[str, float] | None = None,
        parent: nn.Module | None = None,
        task: Task | None = None,
    ) -> None:
        super().__init__()
        self.task = task or find_task(DataConfig().task, ())
        self._parent = _Shared(None if parent is None else parent.eval().requires_grad_(False))
        self.network = network
        self.config = config
        self.seed = seed
        self.exits = exits
        self.method = method or FissionMethod(MethodConfig())
        self.scales = scales
        self.loss = self.task.loss(self.method, config)
        self.average: Average = getattr(network, "exit_weights", None) or self.method.average
        self.running = {name: RunningMetrics(self.average, self.task) for name in ("train", "val")}
        self.first_bad_step: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits `(batch, exits, classes)`."""
        if self.config.channels_last:
            images = images.to(memory_format=torch.channels_last)
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        outcome = self.method.step(self, *batch, self.loss)
        parent = self._parent.module and self._parent.module.to(self.device)
        outcome = self.method.with_parent(outcome, batch[0], parent, self.config, self.task.distil)
        self.running["train"].add(outcome.logits, outcome.labels, outcome.loss)
        self._watch(outcome.loss)
        return outcome.loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add one batch to the metrics."""
        images, labels = batch
        self.running["val"].add(self(images), labels)

    def on_train_epoch_start(self) -> None:
        """Start the epoch's metrics, order of images and random numbers."""
        self.running["train"] = RunningMetrics(self.average, self.task)
        assert isinstance(self.trainer.train_dataloader, Batches)
        self.trainer.train_dataloader.set_epoch(self.current_epoch)
        epoch_seed = (self.seed * 1_000_003 + self.current_epoch) * 1009 + self.global_rank
        torch.manual_seed(epoch_seed % 2**63)

    def on_validation_epoch_start(self) -> None:
        """Start the epoch's metrics."""
        self.running["val"] = RunningMetrics(self.average, self.task)

    def stop_at_bad_loss(self) -> None:
        """Raise DivergedError if a loss was NaN or infinite; the message names the first such step."""
        if self.first_bad_step is not None and self.first_bad_step.item() >= 0:
            raise self._diverged("the loss", f"at step {int(self.first_bad_step.item())}")

    def stop_if_diverged(self) -> None:
        """Raise DivergedError if a loss was not finite, or a weight is not; reads all weights."""
        self.stop_at_bad_loss()
        if not all(parameter.isfinite().all() for parameter in self.network.parameters()):
            raise self._diverged("a weight", f"by step {self.global_step}")

    def stop_if_growing(self, metrics: Mapping[str, float], before: Mapping[str, float]) -> None:
        """Raise DivergedError if an epoch's training NLL is above `LARGEST_NLL`, and above that before it.

        Args:
            metrics: of the epoch.
            before: of the epoch before; empty for the first epoch.
        """
        nll, earlier = metrics["train/nll"], before.get("train/nll", inf)
        if nll > max(LARGEST_NLL, earlier):
            epochs = f"from {decimal(earlier, 2)} to {decimal(nll, 2)} in epoch {self.current_epoch + 1}"
            raise DivergedError(f"the NLL of the training images grows, {epochs}; {_ADVICE}")

    def stop_if_useless(self, data: ImageData) -> None:
        """Raise DivergedError if the trained network's NLL is above `LARGEST_NLL` on a few training images.

        A step that ruins the weights shows in the loss of the next step, which the last one lacks. An NLL
        that is finite, and is large by the running statistics of batch norms alone, is no sign of that: after
        few steps they are far from those of a batch.

        Args:
            data: the run's data set.
        """
        count = self.task.batch_size(data.shape, _CHECKED_IMAGES)
        batch = next(iter(make_batches(data.train, data, count, shuffle=True)))
        with torch.compiler.set_stance("force_eager"):  # no compiling for a batch of this size
            nll = self._nll(batch)
            if nll <= LARGEST_NLL:
                return
            if isfinite(nll):
                with _statistics_of_batches(self.network):
                    if self._nll(batch) <= LARGEST_NLL:
                        return
        raise DivergedError(f"the trained network's NLL is {decimal(nll, 2)} after the last step; {_ADVICE}")

    def _nll(self, batch: tuple[Tensor, Tensor]) -> float:
        running = Collected(lambda outputs, targets: self.task.progress(outputs, targets, self.average))
        run_batches(self.network, [batch], running.add, self.device)
        _, nll = running.result()
        return (nll / len(batch[1])).item()

    def _diverged(self, what: str, when: str) -> DivergedError:
        return DivergedError(f"{what} is no longer finite {when} (epoch {self.current_epoch + 1}); {_ADVICE}")

    def _watch(self, loss: Tensor) -> None:
        """Note the first step with a loss that is not finite, without waiting for the device."""
        step = torch.full_like(loss.detach(), self.global_step, dtype=torch.long)
        bad = torch.where(loss.detach().isfinite(), torch.full_like(step, -1), step)
        earlier = bad if self.first_bad_step is None else self.first_bad_step
        self.first_bad_step = torch.where(earlier >= 0, earlier, bad)

    def epoch_metrics(self) -> dict[str, float]:
        """Return the epoch's metrics over all devices: `train/…`, `val/…` if validated, `learning_rate`."""
        metrics: dict[str, float] = {}
        for name, running in self.running.items():
            if running.sums is not None:
                running.sums = self.trainer.strategy.reduce(running.sums, reduce_op="sum")
                metrics |= running.metrics(name)
        return metrics | {"learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"]}

    def configure_optimizers(self) -> Any:
        """Return the optimiser, and the schedule that sets its learning rate at every step."""
        optimizer = make_optimizer(self.network, self.config, self.scales)
        schedule = self.method.schedule(self.config, self.exits)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class RunDataModule(lightning.LightningDataModule):
    """Gives each process of a training its share of the batches, on its device."""

    def __init__(self, config: RunConfig, data: ImageData) -> None:
        super().__init__()
        self.config = config
        self.data = data

    def train_dataloader(self) -> Batches:
        """Return the shuffled, augmented training batches."""
        config, data = self.config.data, self.data
        split = data.train if data.crops is None else data.crops
        transform = data_task(self.config, data).transform(config, data)
        if transform is not None:  # of targets that the loss itself balances
            return self._batches(split, shuffle=True, transform=transform)
        augment = augmentation(config, data)
        return self._batches(split, shuffle=True, augment=augment, balance=config.balance)

    def val_dataloader(self) -> Batches | list[Batches]:
        """Return the validation batches; none if there is no validation split."""
        return [] if self.data.validation is None else self._batches(self.data.validation)

    def _batches(
        self,
        split: Split,
        *,
        shuffle: bool = False,
        augment: Augmentation | None = None,
        transform: PairTransform | None = None,
        balance: Balance = "none",
    ) -> Batches:
        assert self.trainer is not None
        return make_batches(
            split,
            self.data,
            self.config.training.batch_size,
            device=self.trainer.strategy.root_device,
            shuffle=shuffle,
            augment=augment,
            transform=transform,
            balance=balance,
            seed=self.config.fission.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            workers=self.config.data.workers,
        )


@contextmanager
def _statistics_of_batches(network: nn.Module) -> Iterator[None]:
    """Let batch norms use the statistics of each batch, as in training, and keep their running ones."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    running = [(norm.running_mean, norm.running_var) for norm in norms]
    try:
        for norm in norms:
            norm.running_mean = norm.running_var = None
        yield
    finally:
        for norm, (mean, variance) in zip(norms, running, strict=True):
            norm.running_mean, norm.running_var = mean, variance
