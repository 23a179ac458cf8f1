"""One run of a grid: its training and evaluation, and their record."""

import errno
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import Callback, LambdaCallback

from netfission.experiments.grid import Cell
from netfission.experiments.records import Record, Records, run_folder
from netfission.experiments.time_limit import OutOfTimeError, TimeLimit
from netfission.runs.callbacks import Stopwatch
from netfission.runs.folder import environment
from netfission.runs.lightning_module import RunDataModule
from netfission.runs.train import train


def run_cell(
    cell: Cell, out: Path, records: Records, say: Callable[[str], None], limit: TimeLimit | None = None
) -> Record:
    """Train and evaluate one run, or resume it, and write its record.

    Args:
        cell: the run.
        out: folder of the grid.
        records: of the grid.
        say: called with the line that says what was found in the data set, before the first epoch.
        limit: on the time of the training.

    Raises:
        OSError: the disk is full.
        OutOfTimeError: the limit is over.
        KeyboardInterrupt: the run was stopped.
    """
    folder = run_folder(cell, out)
    config = cell.config
    if cell.start is not None:
        config = replace(
            config, model=replace(config.model, weights=str((out / cell.start.folder).resolve()))
        )
    started = folder.config.is_file()
    if folder.path.exists() and not started:  # killed before it started
        shutil.rmtree(folder.path)
    stopwatch = Stopwatch(folder.training_time)
    announcement = LambdaCallback(on_fit_start=lambda trainer, _: say(_found(trainer)))
    limits = [] if limit is None else [WithinLimit(limit)]
    try:
        evaluation = train(
            config, folder.path, resume=started, progress=False, callbacks=[stopwatch, announcement, *limits]
        )
    except OutOfTimeError:
        raise
    except Exception as error:  # whatever a method or a model may raise
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        reason = " ".join((str(error) or type(error).__name__).split())
        return records.write(cell, environment=environment(), seconds=stopwatch.read(), error=reason)
    assert evaluation is not None
    return records.write(
        cell, environment=environment(), seconds=stopwatch.read(), evaluation=json.loads(evaluation.to_json())
    )


def _found(trainer: lightning.Trainer) -> str:
    """Return the line that says what was found in the data set of a run."""
    data: RunDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return data.data.summary.text()


class WithinLimit(Callback):
    """Ends a training before an epoch that would end after the limit, if each takes as long as the last.

    The epochs before it are whole, and their checkpoint is written.
    """

    def __init__(self, limit: TimeLimit) -> None:
        self.limit = limit
        self.begun: float | None = None

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Check the limit."""
        now = time.time()
        self.limit.check(0.0 if self.begun is None else now - self.begun)
        self.begun = now
