"""Callbacks of the training loop: the table of epochs, progress, time, a method's hooks, checkpoints."""

import csv
import hashlib
import io
import json
import pickle
import time
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from torch import Tensor

from netfission.methods.base import TrainingHook
from netfission.runs.lightning_module import TrainingModule
from netfission.utils.errors import invalid
from netfission.utils.files import write_json, write_whole
from netfission.utils.json_files import read_json
from netfission.utils.text import decimal

_SETTINGS = "settings"  # entry of a checkpoint


class EpochTable(Callback):
    """Logs each epoch's metrics, and writes them to a CSV file with one row per epoch.

    The checkpoint holds the rows, so that a resumed run continues the table as it was at the checkpoint. A
    loss that is not finite, or grows without end, stops the training here, before the epoch's checkpoint is
    written.

    Args:
        path: the CSV file, written whole after each epoch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the loss every 50 steps, as reading it waits for the device."""
        if (batch_idx + 1) % 50 == 0:
            pl_module.stop_at_bad_loss()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add a row for the epoch."""
        assert isinstance(pl_module, TrainingModule)
        pl_module.stop_if_diverged()
        metrics = pl_module.epoch_metrics()
        pl_module.stop_if_growing(metrics, self.rows[-1] if self.rows else {})
        pl_module.log_dict(metrics, rank_zero_only=True)
        self.rows.append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **metrics})
        if trainer.is_global_zero:
            text = io.StringIO()
            writer = csv.DictWriter(text, fieldnames=list(self.rows[-1]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            write_whole(self.path, text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoint keeps."""
        return {"rows": list(self.rows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows."""
        self.rows = list(state_dict["rows"])


class KeepBest(Callback):
    """Keeps the weights of the epoch with the lowest validation NLL, and stops the training by patience.

    The weights are those that were validated: the average, if weights are averaged. Its place is after the
    table, whose rows it reads, and before the callback that averages, which puts other weights back after
    the validation. The checkpoint holds the weights, so that a resumed run keeps and stops as one piece.

    Args:
        patience: epochs without a lower NLL after which the training stops.
        table: the table of the epochs' metrics.
        progress: print which epoch is kept.
    """

    def __init__(self, patience: int, table: EpochTable, *, progress: bool = True) -> None:
        self.patience = patience
        self.table = table
        self.progress = progress
        self.validated: dict[str, Tensor] = {}
        self.best: dict[str, Any] = {"epoch": 0, "nll": inf, "weights": {}}

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Copy the weights that were validated."""
        state = pl_module.network.state_dict()
        self.validated = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Stop a resumed training that had stopped already."""
        self._stop_if_due(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Keep the epoch's weights if they are the best, or stop the training."""
        row = self.table.rows[-1]
        if row["val/nll"] < self.best["nll"]:
            self.best = {"epoch": int(row["epoch"]), "nll": row["val/nll"], "weights": self.validated}
        self._stop_if_due(trainer)

    def _stop_if_due(self, trainer: lightning.Trainer) -> None:
        if len(self.table.rows) - self.best["epoch"] >= self.patience:
            trainer.should_stop = True

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Load the best weights; after the end of the training, at which an average is loaded."""
        if self.best["epoch"]:
            pl_module.network.load_state_dict(self.best["weights"])
            if self.progress and trainer.is_global_zero:
                of_all = f"epoch {self.best['epoch']} of {len(self.table.rows)}"
                nll = decimal(self.best["nll"], 3)
                print(f"kept {of_all}, with the lowest validation NLL ({nll})", flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoint keeps."""
        return dict(self.best)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best epoch."""
        self.best = dict(state_dict)


class EpochLines(Callback):
    """Prints one line per epoch on standard output, for logs."""

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print the epoch's accuracies, in %."""
        assert isinstance(pl_module, TrainingModule)
        if trainer.is_global_zero:
            metrics = "  ".join(f"{name} {value}" for name, value in shown_metrics(pl_module).items())
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {metrics}", flush=True)


class Stopwatch(Callback):
    """Counts the seconds of a training over all its sessions, and writes them to a file after each epoch.

    Args:
        path: a JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = 0.0
        self.epoch_start = 0.0

    def read(self) -> float:
        """Return the seconds so far; 0 before the first epoch has ended."""
        kept = read_json(self.path, dict[str, float])
        return 0.0 if kept is None else kept["seconds"]

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start an epoch."""
        self.epoch_start = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add an epoch, its validation included."""
        self.seconds += time.perf_counter() - self.epoch_start
        if trainer.is_global_zero:
            write_json(self.path, json.dumps({"seconds": self.seconds}) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoint keeps."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.seconds = state_dict["seconds"]


class MethodHooks(Callback):
    """Calls a method's hooks from Lightning's training loop."""

    def __init__(self, hooks: Sequence[TrainingHook]) -> None:
        self.hooks = tuple(hooks)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Pass on the length of the training."""
        assert trainer.max_epochs is not None
        for hook in self.hooks:
            hook.on_train_start(int(trainer.estimated_stepping_batches), trainer.max_epochs)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Pass on the epoch."""
        for hook in self.hooks:
            hook.on_epoch_start(pl_module.network, trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pass on the number of the step."""
        for hook in self.hooks:
            hook.on_batch_start(pl_module.network, trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        """Pass on the optimiser."""
        for hook in self.hooks:
            hook.on_before_step(pl_module.network, optimizer, trainer.global_step, pl_module.seed)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pass on the number of finished steps."""
        for hook in self.hooks:
            hook.on_batch_end(pl_module.network, trainer.global_step)

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Pass on that the training stops by an error."""
        for hook in self.hooks:
            hook.on_exception()


class SameCheckpoint(Callback):
    """Refuses to resume if the processes of a training have not found the same checkpoint.

    A machine that lacks it, as it does not share the folder, would train from the start, and the others wait
    for it without end.

    Args:
        path: what this process resumes from; None for a start.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Compare this process's checkpoint with that of the first, before any is read."""
        if trainer.world_size == 1:
            return
        digest = self._digest()
        first: str = trainer.strategy.broadcast(digest)
        if not trainer.strategy.reduce_boolean_decision(digest == first):
            found = "another checkpoint, or none" if digest != first else "one that another process lacks"
            raise invalid("out", "a folder that all machines share, to resume its run", found=found)

    def _digest(self) -> str:
        if self.path is None:
            return ""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class WholeCheckpoints(TorchCheckpointIO):
    """Writes each checkpoint whole or not at all, keeps the one before, and runs no code of the one it reads.

    Args:
        previous: where the checkpoint before is kept.
        settings: digest of the run's settings, which each checkpoint holds; empty if they are not known.
    """

    def __init__(self, previous: Path, settings: str = "") -> None:
        super().__init__()
        self.previous = previous
        self.settings = settings

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replace the checkpoint at `path`, which takes the place of the one before."""
        content = io.BytesIO()
        torch.save(checkpoint | {_SETTINGS: self.settings}, content)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getvalue(), kept_as=self.previous)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> Any:
        """Read a checkpoint: tensors and plain data alone, whatever is asked for.

        Raises:
            ValueError: it holds something else, for which code would run, or is of a run with other settings.
        """
        try:
            checkpoint = super().load_checkpoint(path, map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            found = "one with other objects, which would run code"
            raise invalid(str(path), "a checkpoint of tensors and plain data", found=found) from error
        digest = checkpoint.get(_SETTINGS)  # None in those of earlier versions
        if digest and self.settings and digest != self.settings:
            folder = Path(path).parent
            raise invalid(
                str(path),
                f"a checkpoint of the run in {folder.parent}",
                found="one of a run with other settings",
                hint=f"restore it, or remove {folder} and resume, which starts the run again",
            )
        return checkpoint


class AccuracyBar(TQDMProgressBar):
    """A progress bar with the epoch's accuracy so far, in %, of every exit and of the ensemble."""

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the metrics; called when the bar is redrawn, not at every step."""
        assert isinstance(pl_module, TrainingModule)
        return {**shown_metrics(pl_module)}


def shown_metrics(module: TrainingModule) -> dict[str, str]:
    """Return the epoch's accuracies so far, in %, or other scores of the task, and the loss, as text."""
    shown = {}
    for prefix, running in module.running.items():
        for name, value in running.metrics(prefix).items():
            short = name.removeprefix("train/")
            if not short.endswith("nll"):
                shown[short] = decimal(value, 3) if short == "loss" else module.task.shown(value)
    return shown
