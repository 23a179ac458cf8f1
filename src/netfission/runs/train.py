"""One run, from its settings to a folder with a trained and evaluated network."""

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from netfission.config import RunConfig
from netfission.evaluation import Evaluation
from netfission.methods.registry import find_method
from netfission.runs.callbacks import AccuracyBar, EpochLines, EpochTable, MethodHooks, WholeCheckpoints
from netfission.runs.evaluate import evaluate
from netfission.runs.folder import RunFolder
from netfission.runs.lightning_module import RunDataModule, TrainingModule
from netfission.runs.setup import build_network, load_run_data, network_spec


def train(
    config: RunConfig,
    path: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> Evaluation | None:
    """Train, save and evaluate one network; everything it leaves is in the folder `path`.

    Args:
        config: all settings.
        path: the run's folder; new or empty, or with `resume` one that a run with the same settings began.
        resume: go on after the last whole epoch that the folder holds.
        progress: show a progress bar, or a line an epoch where standard output is no terminal.
        callbacks: Lightning callbacks of your own, run after ours.

    Returns:
        The figures of the trained network on the test split; None in the helper processes of a training
        on several devices.

    Raises:
        ValueError: a setting is not what it takes.
        OSError: a file cannot be read or written.
        DivergedError: the loss stopped being finite; the checkpoint of the last whole epoch is kept.
        KeyboardInterrupt: it was stopped; likewise.
    """
    folder = RunFolder(path)
    main_process = getattr(rank_zero_only, "rank", 0) == 0
    if main_process:
        folder.claim(config, resume)
    if resume and folder.weights.is_file():
        return evaluate(folder, config) if main_process else None
    checkpoint = folder.resumable() if resume else None
    with _quietly(), folder.locked() if main_process else nullcontext():
        try:
            method = find_method(config.method, config.fission)
            data = load_run_data(config.data, config.fission.seed)
            network = build_network(config, data)
            hooks = MethodHooks(method.hooks(config.fission.exits, config.training))
            epochs = method.epochs(config.training.epochs, config.fission.exits)
            trainer = _trainer(config, epochs, folder, progress, [hooks, *callbacks])
        except BaseException:
            if main_process and not resume:
                folder.release()
            raise
        seed, exits = config.fission.seed, config.fission.exits
        module = TrainingModule(network, config.training, seed, exits, method)
        if config.training.compile:
            network.compile()
        try:
            trainer.fit(
                module, datamodule=RunDataModule(config, data), ckpt_path=checkpoint, weights_only=False
            )
        except SystemExit as error:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from error
        except ValueError:  # a method refuses the training's length, which is known only now
            if main_process and not resume and not folder.checkpoint.is_file():
                folder.release()
            raise
        if not trainer.is_global_zero:
            return None
        folder.save_network(network, network_spec(config, data))
    return evaluate(folder, config, data)


def _trainer(
    config: RunConfig, epochs: int, folder: RunFolder, progress: bool, more: Sequence[Callback]
) -> lightning.Trainer:
    training = config.training
    callbacks: list[Callback] = [
        EpochTable(folder.metrics),
        ModelCheckpoint(
            folder.checkpoint.parent,
            filename=folder.checkpoint.stem,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
    ]
    if progress:
        callbacks.append(AccuracyBar() if sys.stdout.isatty() else EpochLines())
    if training.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=training.ema))
    try:
        return lightning.Trainer(
            accelerator=training.accelerator,
            devices=training.devices,
            num_nodes=training.machines,
            precision=training.precision,
            max_epochs=epochs,
            accumulate_grad_batches=training.accumulate,
            gradient_clip_val=training.clip,
            callbacks=[*callbacks, *more],
            plugins=[WholeCheckpoints()],
            logger=TensorBoardLogger(folder.path, name=None, version="tensorboard"),
            log_every_n_steps=50,
            num_sanity_val_steps=0,
            enable_progress_bar=progress and sys.stdout.isatty(),
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        asked = f"accelerator={training.accelerator!r}, devices={training.devices}"
        raise ValueError(f"{asked}: {error}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Lightning's remarks on things that are as they are meant to be here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for remark in (
                ".*does not have many workers.*",
                ".*Checkpoint directory .* exists and is not empty.*",
                ".*No `val_dataloader`.*",
                ".*validation_step.*val_dataloader.*",
                ".*LeafSpec.*deprecated.*",
                ".*smaller than the logging interval.*",
                ".*tensorboard.*",
                ".*dirpath has changed.*",
                ".*sync_dist.*",  # the figures are summed over the devices before they are logged
                ".*Total length of .* across ranks is zero.*",
            ):
                warnings.filterwarnings("ignore", remark)
            yield
    finally:
        logger.setLevel(level)
