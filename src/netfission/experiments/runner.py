"""Do the missing runs of a grid, one after another or several at once."""

import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from netfission.config import DataConfig, RunConfig
from netfission.data import ImageData
from netfission.data.sources import is_named
from netfission.experiments.grid import Cell
from netfission.experiments.ray_cluster import run_on_cluster
from netfission.experiments.records import Record, Records, run_folder
from netfission.experiments.time_limit import OUT_OF_TIME, OutOfTimeError, TimeLimit
from netfission.methods.base import call_with_seed
from netfission.models import create_model, read_weights
from netfission.runs.finetune_settings import check_division
from netfission.runs.folder import environment
from netfission.runs.setup import check_start, check_weights_task, data_task, load_run_data
from netfission.utils.errors import check_positive, check_positive_integer, invalid, within
from netfission.utils.interrupts import no_interrupts
from netfission.utils.quick import without_collection
from netfission.utils.text import count_noun


class RunBar(tqdm):  # type: ignore[type-arg]
    """A bar of runs, with lines above it that are printed once."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.printed: set[str] = set()
        self.failed: dict[str, str] = {}  # key of a run → why it failed just now

    def say(self, line: str) -> None:
        """Print a line unless it was printed before or the bar is disabled."""
        if line not in self.printed and not self.disable:
            self.write(line, file=sys.stderr)  # where the bar is
        self.printed.add(line)


def run_missing(
    cells: Sequence[Cell],
    out: Path,
    *,
    workers: int = 1,
    ray: str | None = None,
    minutes: float | None = None,
) -> list[Record]:
    """Do the runs that have not succeeded yet, and return the records of all runs.

    A run that fails is recorded and does not stop the others; the next call tries it again. Runs that
    another process is doing are left to it, and waited for at the end. A process that is killed loses the
    current epoch only.

    Args:
        cells: the runs, in the order they are done.
        out: folder; its subfolder `records/` holds one file per run, `runs/` the run folders.
        workers: number of processes that share the runs and the CPU's threads.
        ray: address of a Ray cluster that does the runs instead, see `netfission.experiments.ray_cluster`.
        minutes: stop after a whole epoch if the next one would probably end later than this from now.

    Raises:
        ValueError: `workers` or `minutes` is not positive, `minutes` are fewer than an epoch takes, no
            cluster answers, a record is damaged, trained weights cannot be read or do not suit a contender,
            or one that starts from another cannot be built.
        OutOfTimeError: the minutes are over, and runs are missing.
        ConnectionError: published weights cannot be downloaded.
        OSError: the disk is full, or the folder cannot be written.
        RuntimeError: a worker died.
    """
    check_positive_integer("workers", workers)
    limit = _time_limit(minutes, ray)
    records = Records(out / "records")
    with without_collection():  # thousands of records make many objects that stay
        known = [records.find_success(cell) for cell in cells]
    missing = [cell for cell, record in zip(cells, known, strict=True) if record is None]
    if missing:  # not in a worker, whose error for a missing package would be a traceback
        import lightning  # noqa: F401
    _check_folders(missing)
    load = _quiet_loader()
    _check_starts([cell for cell in missing if cell.start is None], load)
    _check_further([cell for cell in missing if cell.start is not None], load)
    _check_models([cell for cell in missing if not cell.config.model.trained], load)
    # The remaining time is estimated from the mean of all runs, since the last step of the bar is the time
    # between two looks at the records, not that of a run.
    with RunBar(total=len(cells), initial=len(cells) - len(missing), unit="run", smoothing=0.0) as bar:
        try:
            if ray is not None:
                _run_on_cluster(missing, out, bar, ray)
            elif workers == 1:
                _run_here(missing, out, bar, limit)
            else:
                _run_in_workers(missing, out, bar, min(workers, len(missing)), limit)
        except OutOfTimeError as error:
            _check_longer_than_epoch(error.epoch, minutes)
            done = sum(records.find_success(cell) is not None for cell in cells)
            message = f"{done} of {count_noun(len(cells), 'run')} done"
            raise OutOfTimeError(f"{message}; the same command goes on after the last whole epoch") from None
    found = [record or records.find(cell) for cell, record in zip(cells, known, strict=True)]
    return [record for record in found if record is not None]


def _time_limit(minutes: float | None, ray: str | None) -> TimeLimit | None:
    if minutes is None:
        return None
    check_positive("minutes", minutes)
    if ray is not None:
        raise invalid("minutes", "left out with ray", minutes)
    return TimeLimit(60 * minutes)


def _check_longer_than_epoch(epoch: float, minutes: float | None) -> None:
    """Refuse minutes within which no epoch ends; the one that was trained is kept."""
    assert minutes is not None
    if epoch > 60 * minutes:
        raise invalid("minutes", f"at least {ceil(epoch / 6) / 10:g}, which an epoch takes", minutes)


def _check_folders(cells: Sequence[Cell]) -> None:
    """Refuse a folder of data that does not exist, before each run fails for it."""
    for data in dict.fromkeys(cell.config.data.data for cell in cells):
        if not is_named(data) and not Path(data).exists():
            raise invalid("data", "the folder of the data set", found=f"{data}, which does not exist")


def _quiet_loader() -> Callable[[DataConfig, int], ImageData]:
    """Return what loads each data set once, without its warnings, which the runs repeat."""
    loaded: dict[str, ImageData] = {}

    def load(config: DataConfig, seed: int) -> ImageData:
        key = f"{config} {seed}"  # settings may be lists
        if key not in loaded:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded[key] = load_run_data(config, seed)
        return loaded[key]

    return load


def _check_starts(cells: Sequence[Cell], load: Callable[[DataConfig, int], ImageData]) -> None:
    """Refuse trained weights that do not suit a contender, before anything is trained."""
    first = {cell.contender: cell for cell in reversed(cells)}  # of each contender
    paths = {cell.config.model.weights for cell in first.values()}
    weights = {path: None if path is None else read_weights(path) for path in paths}
    for cell in reversed(first.values()):
        config = cell.config
        if not config.model.trained:
            continue
        data = load(config.data, cell.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the runs warn
            try:
                check_weights_task(config, weights[config.model.weights])
                check_start(config, data, weights[config.model.weights])
            except ValueError as error:
                raise within(f"contender {cell.contender}", error) from error


def _check_further(cells: Sequence[Cell], load: Callable[[DataConfig, int], ImageData]) -> None:
    """Refuse contenders that start from another and cannot be built, before that one is trained."""
    first = {cell.contender: cell for cell in reversed(cells)}  # of each contender
    for cell in reversed(first.values()):
        config = cell.config
        data = load(config.data, cell.seed)
        try:
            check_division(config, _single_network(config, data), data.shape)
        except ValueError as error:
            raise within(f"contender {cell.contender}", error) from error


def _single_network(config: RunConfig, data: ImageData) -> nn.Module:
    """Return the model of a run, with random weights; ValueError if it cannot be made."""
    create = partial(
        create_model,
        config.model.model,
        data_task(config, data).outputs,
        in_channels=data.shape[0],
        image_size=(data.shape[1], data.shape[2]),
    )
    return call_with_seed(create, config.fission.seed)


def _check_models(cells: Sequence[Cell], load: Callable[[DataConfig, int], ImageData]) -> None:
    """Refuse models that cannot be made, before contenders of other models are trained."""
    first = {cell.config.model.model: cell for cell in reversed(cells)}  # of each model
    for cell in reversed(first.values()) if len(first) > 1 else ():
        config = cell.config
        data = load(config.data, cell.seed)
        try:
            _single_network(config, data)
        except ValueError as error:
            raise within(f"contender {cell.contender}", error) from error


def _run_here(cells: Sequence[Cell], out: Path, bar: RunBar, limit: TimeLimit | None = None) -> None:
    """Do the runs that no other process is doing; then wait for the others, and do those that failed."""
    records = Records(out / "records")
    claimed = [cell for cell in cells if not _run_if_free(cell, out, records, bar, limit, wait=False)]
    for cell in claimed:
        _run_if_free(cell, out, records, bar, limit, wait=True)


def _run_on_cluster(cells: Sequence[Cell], out: Path, bar: RunBar, address: str) -> None:
    """Let a Ray cluster do the runs; then wait for those that other processes are doing."""
    claimed = []
    for cell, done in run_on_cluster(cells, address, partial(_run_remotely, out.resolve())):
        bar.update(done)
        _say_what_was_found([cell], out, bar)
        claimed += [] if done else [cell]
    _run_here(claimed, out, bar)


def _run_remotely(out: Path, cell: Cell) -> bool:
    return _run_if_free(cell, out, Records(out / "records"), RunBar(disable=True), wait=False)


def _run_in_workers(
    cells: Sequence[Cell], out: Path, bar: RunBar, workers: int, limit: TimeLimit | None
) -> None:
    """Let several processes do the runs, and move the bar as records come in."""
    threads = max(1, torch.get_num_threads() // workers)
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_worker, args=(cells, out, threads, limit)) for _ in range(workers)]
    records = Records(out / "records")
    try:
        with no_interrupts():
            for process in processes:
                process.start()
        while any(process.is_alive() for process in processes):
            multiprocessing.connection.wait([process.sentinel for process in processes], timeout=1.0)
            bar.update(bar.initial + sum(records.file(cell).is_file() for cell in cells) - bar.n)
            _say_what_was_found(cells, out, bar)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    statuses = {process.exitcode for process in processes} - {0}
    if statuses == {OUT_OF_TIME}:
        raise OutOfTimeError
    if statuses:
        raise RuntimeError(f"one of {workers} workers died; the same command does the missing runs")


def _worker(cells: Sequence[Cell], out: Path, threads: int, limit: TimeLimit | None) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _run_here(cells, out, RunBar(disable=True), limit)
    except OutOfTimeError:
        sys.exit(OUT_OF_TIME)


def _end_with_parent() -> None:
    """End a worker when the command ends, even if the command was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_if_free(
    cell: Cell, out: Path, records: Records, bar: RunBar, limit: TimeLimit | None = None, *, wait: bool
) -> bool:
    """Do the run unless another process is doing or has done it; return False if one is still doing it."""
    with records.claimed(cell, wait=wait) as claimed:
        if not claimed:
            return False
        if records.find_success(cell) is None and cell.key not in bar.failed:
            _do(cell, out, records, bar, limit)
        bar.update()
    return True


def _do(cell: Cell, out: Path, records: Records, bar: RunBar, limit: TimeLimit | None) -> None:
    """Do a run, and before it the run that it starts from, unless that run's network exists.

    A run whose start has failed is recorded as failed, too, with the reason.
    """
    if cell.start is not None:
        with records.claimed(cell.start, wait=True):
            if cell.start.key not in bar.failed and not run_folder(cell.start, out).weights.is_file():
                _do(cell.start, out, records, bar, limit)
        if cell.start.key in bar.failed:
            reason = f"{cell.start.contender} failed: {bar.failed[cell.start.key]}"
            records.write(cell, environment=environment(), seconds=0.0, error=reason)
            return
    bar.set_description(f"{cell.contender}, seed {cell.seed}")
    if limit is not None:
        limit.check()
    # Imports Lightning, which takes seconds that a grid without a missing run does not need.
    from netfission.experiments.one_run import run_cell

    record = run_cell(cell, out, records, bar.say, limit)
    if record.error is not None:
        bar.failed[cell.key] = record.error


def _say_what_was_found(cells: Sequence[Cell], out: Path, bar: RunBar) -> None:
    """Say what other processes found in the data sets of their runs."""
    for cell in cells:
        if (summary := run_folder(cell, out).load_data_summary()) is not None:
            bar.say(summary.text())
