"""The Lightning module: loss, optimiser, schedule, and the figures shown while training."""

from typing import Any

import lightning
import torch
from torch import Tensor, nn

from netfission.config import MethodConfig, RunConfig, TrainingConfig
from netfission.data import Augmentation, Batches, ImageData, Split
from netfission.ensemble import ensemble_log_probabilities
from netfission.methods.base import Method
from netfission.methods.fission import FissionMethod
from netfission.runs.setup import augmentation, make_batches


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""


class Tally:
    """Running sums over one epoch, kept on the device so that no step waits for them."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, loss: Tensor | None = None) -> None:
        """Count a batch: logits `(batch, exits, classes)`; labels `(batch,)`, or soft `(batch, classes)`."""
        logits = logits.detach().float()
        if labels.ndim > 1:
            labels = labels.argmax(dim=1)
        ensemble = ensemble_log_probabilities(logits)
        votes = torch.cat([logits.argmax(dim=2), ensemble.argmax(dim=1, keepdim=True)], dim=1)
        correct = (votes == labels[:, None]).sum(dim=0)
        nll = -ensemble.gather(1, labels[:, None]).sum()
        number = len(labels)
        sums = torch.stack(
            [nll.new_tensor(number), nll, nll.new_zeros(()) if loss is None else loss.detach() * number]
        )
        sums = torch.cat([sums, correct.to(sums.dtype)]).double()
        self.sums = sums if self.sums is None else self.sums + sums

    def figures(self, prefix: str) -> dict[str, float]:
        """Accuracy of each exit and of the ensemble, its NLL, and the loss if any; {} at first."""
        if self.sums is None:
            return {}
        number, nll, loss, *correct = self.sums.tolist()
        figures = {f"{prefix}/exit{i}": c / number for i, c in enumerate(correct[:-1])}
        figures |= {f"{prefix}/ensemble": correct[-1] / number, f"{prefix}/nll": nll / number}
        return figures | ({f"{prefix}/loss": loss / number} if loss else {})


class TrainingModule(lightning.LightningModule):
    """Trains a network of logits `(batch, exits, classes)` by a method.

    Args:
        network: what the method built, or any module with such logits.
        config: how to train.
        seed: seed of dropout and the like, for each epoch afresh, so that a resumed epoch repeats.
        exits: number of predictions asked for.
        method: how the training departs from the common one; default that of fission.
    """

    def __init__(
        self,
        network: nn.Module,
        config: TrainingConfig,
        seed: int = 0,
        exits: int = 1,
        method: Method | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.seed = seed
        self.exits = exits
        self.method = method or FissionMethod(MethodConfig())
        self.loss = self.method.loss(config)
        self.tallies = {"train": Tally(), "val": Tally()}
        self.first_bad_step: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Images → logits `(batch, exits, classes)`."""
        if self.config.channels_last:
            images = images.to(memory_format=torch.channels_last)
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One batch's loss."""
        outcome = self.method.step(self, *batch, self.loss)
        self.tallies["train"].add(outcome.logits, outcome.labels, outcome.loss)
        self._watch(outcome.loss)
        return outcome.loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count one batch."""
        images, labels = batch
        self.tallies["val"].add(self(images), labels)

    def on_train_epoch_start(self) -> None:
        """Start the epoch's figures, order of images and random numbers."""
        self.tallies["train"] = Tally()
        assert isinstance(self.trainer.train_dataloader, Batches)
        self.trainer.train_dataloader.set_epoch(self.current_epoch)
        epoch_seed = (self.seed * 1_000_003 + self.current_epoch) * 1009 + self.global_rank
        torch.manual_seed(epoch_seed % 2**63)

    def on_validation_epoch_start(self) -> None:
        """Start the epoch's figures."""
        self.tallies["val"] = Tally()

    def stop_at_bad_loss(self) -> None:
        """Raise DivergedError with the first step whose loss was NaN or infinite, if there was one."""
        if self.first_bad_step is not None and self.first_bad_step.item() >= 0:
            raise self._diverged("the loss", f"at step {int(self.first_bad_step.item())}")

    def stop_if_diverged(self) -> None:
        """Raise DivergedError where a loss was not finite, or a weight no longer is; reads all weights."""
        self.stop_at_bad_loss()
        if not all(parameter.isfinite().all() for parameter in self.network.parameters()):
            raise self._diverged("a weight", f"by step {self.global_step}")

    def _diverged(self, what: str, when: str) -> DivergedError:
        return DivergedError(
            f"{what} stopped being a finite number {when} (epoch {self.current_epoch + 1}); try a lower "
            "learning_rate or clip=1"
        )

    def _watch(self, loss: Tensor) -> None:
        """Note the first step with a loss that is not finite, without waiting for the device."""
        step = torch.full_like(loss.detach(), self.global_step, dtype=torch.long)
        bad = torch.where(loss.detach().isfinite(), torch.full_like(step, -1), step)
        earlier = bad if self.first_bad_step is None else self.first_bad_step
        self.first_bad_step = torch.where(earlier >= 0, earlier, bad)

    def epoch_figures(self) -> dict[str, float]:
        """The epoch's figures over all devices: `train/…`, `val/…` where there was validation, the rate."""
        figures: dict[str, float] = {}
        for name, tally in self.tallies.items():
            if tally.sums is not None:
                tally.sums = self.trainer.strategy.reduce(tally.sums, reduce_op="sum")
                figures |= tally.figures(name)
        return figures | {"learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"]}

    def configure_optimizers(self) -> Any:
        """The optimiser, with its rate set anew at every step."""
        config = self.config
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                self.network.parameters(),
                lr=config.learning_rate or 0.1,
                momentum=config.momentum,
                weight_decay=5e-4 if config.weight_decay is None else config.weight_decay,
                nesterov=config.momentum > 0,
            )
        else:
            matrices = [p for p in self.network.parameters() if p.ndim > 1]
            vectors = [p for p in self.network.parameters() if p.ndim <= 1]
            groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(
                groups,
                lr=config.learning_rate or 1e-3,
                weight_decay=0.05 if config.weight_decay is None else config.weight_decay,
            )
        schedule = self.method.schedule(config.schedule, self.exits)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class RunDataModule(lightning.LightningDataModule):
    """Gives each process of a training its batches, on its device."""

    def __init__(self, config: RunConfig, data: ImageData) -> None:
        super().__init__()
        self.config = config
        self.data = data

    def train_dataloader(self) -> Batches:
        """Shuffled, augmented, this process's share."""
        return self._batches(self.data.train, shuffle=True, augment=augmentation(self.config.data, self.data))

    def val_dataloader(self) -> Batches | list[Batches]:
        """As they are; none where nothing is held out."""
        return [] if self.data.validation is None else self._batches(self.data.validation)

    def _batches(
        self, split: Split, *, shuffle: bool = False, augment: Augmentation | None = None
    ) -> Batches:
        assert self.trainer is not None
        return make_batches(
            split,
            self.data,
            self.config.training.batch_size,
            device=self.trainer.strategy.root_device,
            shuffle=shuffle,
            augment=augment,
            seed=self.config.fission.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            workers=self.config.data.workers,
        )
