"""The Lightning trainer of a run, and the context that hides its irrelevant messages."""

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from netfission.config import TrainingConfig
from netfission.runs.callbacks import AccuracyBar, EpochLines, EpochTable, KeepBest, WholeCheckpoints
from netfission.runs.folder import RunFolder
from netfission.utils.errors import first_line, invalid

# Lightning's warnings about what is intended here, as regular expressions.
_IRRELEVANT = (
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*No `val_dataloader`.*",
    ".*validation_step.*val_dataloader.*",
    ".*LeafSpec.*deprecated.*",
    ".*smaller than the logging interval.*",
    ".*tensorboard.*",
    ".*dirpath has changed.*",
    ".*sync_dist.*",  # the metrics are summed over the devices before they are logged
    ".*AMP with fp16 is not supported on CPU.*",  # refused
    ".*Total length of .* across ranks is zero.*",
)


def make_trainer(
    config: TrainingConfig,
    epochs: int,
    folder: RunFolder,
    *,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> lightning.Trainer:
    """Make the trainer that writes metrics, checkpoints and TensorBoard events into a run's folder.

    Args:
        config: how to train.
        epochs: length of the training.
        folder: folder of the run.
        progress: show a progress bar on a terminal, else one line per epoch.
        callbacks: callbacks to run after the trainer's own.

    Raises:
        ValueError: the machine lacks the accelerator or the devices, or does not run the precision.
    """
    table = EpochTable(folder.metrics)
    writers: list[Callback] = [
        table,
        ModelCheckpoint(
            folder.checkpoint.parent,
            filename=folder.checkpoint.stem,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
    ]
    # A process on a machine without the folder writes no checkpoint.
    settings = folder.settings_sha256() if folder.config.is_file() else ""
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    if progress:
        writers.append(AccuracyBar() if on_terminal else EpochLines())
    if config.patience is not None:  # before the average, see `KeepBest`
        writers.append(KeepBest(config.patience, table, progress=progress))
    if config.ema is not None:
        writers.append(EMAWeightAveraging(decay=config.ema))
    try:
        trainer = lightning.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.machines,
            precision=config.precision,
            max_epochs=epochs,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.clip,
            callbacks=[*writers, *callbacks],
            plugins=[WholeCheckpoints(folder.previous_checkpoint, settings)],
            logger=TensorBoardLogger(folder.path, name=None, version=folder.tensorboard.name),
            log_every_n_steps=50,
            num_sanity_val_steps=0,
            enable_progress_bar=progress and on_terminal,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        found = f"accelerator={config.accelerator!r}, devices={config.devices} ({first_line(error)})"
        raise invalid("accelerator and devices", "what this machine has", found=found) from error
    if trainer.precision != config.precision:  # Lightning takes another where this one does not run
        expected = f"32-true or {trainer.precision} without a GPU"
        raise invalid("precision", expected, config.precision)
    return trainer


@contextmanager
def without_irrelevant_messages() -> Iterator[None]:
    """Hide Lightning's log lines below errors, and its warnings about what is intended here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in _IRRELEVANT:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.setLevel(level)
