"""Runs of a grid that are still missing, one after another or several at once."""

import errno
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from netfission.experiments.grid import Cell
from netfission.experiments.ray_cluster import spread
from netfission.experiments.records import Record, Records
from netfission.runs.folder import RunFolder, environment
from netfission.runs.train import train
from netfission.utils.files import write_whole


def run_missing(
    cells: Sequence[Cell], out: Path, *, workers: int = 1, ray: str | None = None
) -> list[Record]:
    """Do the runs that have no record of success, and give the records of all.

    A run that fails is recorded and does not stop the rest; it is tried again the next time. Runs that
    another process is at work on are left to it, and waited for at the end. A process that is killed loses
    the epoch that it was in.

    Args:
        cells: in the order they run.
        out: folder; `records/` in it holds a file a run, `runs/` the run folders.
        workers: processes that share the runs, each with its part of the CPU's threads.
        ray: instead, address of a Ray cluster that does the runs, see `netfission.experiments.ray_cluster`.

    Raises:
        ValueError: `workers` is below 1, no cluster answers, or a record is damaged.
        OSError: the disk is full, or the folder cannot be written.
        RuntimeError: a worker died.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: takes a whole number from 1")
    records = Records(out / "records")
    missing = [cell for cell in cells if records.done(cell) is None]
    # The time left is told from the mean of all runs: the last step's is one look at the records long.
    with tqdm(total=len(cells), initial=len(cells) - len(missing), unit="run", smoothing=0.0) as bar:
        if ray is not None:
            _spread(missing, out, bar, ray)
        elif workers == 1:
            _work(missing, out, bar)
        else:
            _share(missing, out, bar, min(workers, len(missing)))
    found = [records.find(cell) for cell in cells]
    return [record for record in found if record is not None]


def run_folder(cell: Cell, out: Path) -> RunFolder:
    """Where a run is, or is to be."""
    return RunFolder(out / "runs" / cell.key)


def _work(cells: Sequence[Cell], out: Path, bar: Any) -> None:
    """Do the runs that nobody else is at work on; then see to those, should the others not come through."""
    records = Records(out / "records")
    left = [cell for cell in cells if not _run_if_free(cell, out, records, bar, wait=False)]
    for cell in left:
        _run_if_free(cell, out, records, bar, wait=True)


def _spread(cells: Sequence[Cell], out: Path, bar: Any, address: str) -> None:
    """Let a Ray cluster do the runs; then see to those that others were at work on."""
    left = []
    for cell, done in spread(cells, address, partial(_run_away, out.resolve())):
        bar.update(done)
        left += [] if done else [cell]
    _work(left, out, bar)


def _run_away(out: Path, cell: Cell) -> bool:
    return _run_if_free(cell, out, Records(out / "records"), tqdm(disable=True), wait=False)


def _share(cells: Sequence[Cell], out: Path, bar: Any, workers: int) -> None:
    """Let several processes do the runs, and move the bar as records come in."""
    threads = max(1, torch.get_num_threads() // workers)
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_worker, args=(cells, out, threads)) for _ in range(workers)]
    records = Records(out / "records")
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            multiprocessing.connection.wait([process.sentinel for process in processes], timeout=1.0)
            bar.update(bar.initial + sum(records.file(cell).is_file() for cell in cells) - bar.n)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"workers={workers}: one of them died; the same command does what is missing")


def _worker(cells: Sequence[Cell], out: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work(cells, out, tqdm(disable=True))


def _end_with_parent() -> None:
    """Let a worker not outlive the command, however that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_if_free(cell: Cell, out: Path, records: Records, bar: Any, *, wait: bool) -> bool:
    """Whether the run is done, here or, meanwhile, elsewhere; False if another process is at work on it."""
    with records.claimed(cell, wait=wait) as ours:
        if not ours:
            return False
        if records.done(cell) is None:
            bar.set_description(f"{cell.contender}, seed {cell.seed}")
            run_cell(cell, out, records)
        bar.update()
    return True


def run_cell(cell: Cell, out: Path, records: Records) -> Record:
    """Train and evaluate one run, or go on with it, and record what came of it.

    Raises:
        OSError: the disk is full.
        KeyboardInterrupt: it was stopped.
    """
    folder = run_folder(cell, out)
    begun = folder.config.is_file()
    if folder.path.exists() and not begun:  # killed before it began
        shutil.rmtree(folder.path)
    stopwatch = Stopwatch(folder.training_time)
    try:
        evaluation = train(cell.config, folder.path, resume=begun, progress=False, callbacks=[stopwatch])
    except Exception as error:  # whatever a method or a model may raise
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        reason = " ".join((str(error) or type(error).__name__).split())
        return records.write(cell, environment=environment(), seconds=stopwatch.read(), error=reason)
    assert evaluation is not None
    return records.write(
        cell, environment=environment(), seconds=stopwatch.read(), evaluation=json.loads(evaluation.to_json())
    )


class Stopwatch(Callback):
    """Counts the seconds of a training over all its sessions, and keeps them in a file after each epoch.

    Args:
        path: a JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = 0.0
        self.since = 0.0

    def read(self) -> float:
        """Seconds so far; 0 before the first epoch has ended."""
        if not self.path.is_file():
            return 0.0
        return float(json.loads(self.path.read_text(encoding="utf-8"))["seconds"])

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start an epoch."""
        self.since = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add an epoch, its validation with it."""
        self.seconds += time.perf_counter() - self.since
        if trainer.is_global_zero:
            write_whole(self.path, json.dumps({"seconds": self.seconds}) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds = state_dict["seconds"]
