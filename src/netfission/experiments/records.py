"""What a grid keeps of each run: its folder, and a file with its result, the record."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from math import isnan
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from netfission.config import DataConfig
from netfission.data.sources import fingerprint, is_named
from netfission.experiments.grid import Cell, chosen_settings
from netfission.methods.registry import find_method
from netfission.models.weights import file_digest
from netfission.runs.folder import RunFolder
from netfission.tasks import task_kind
from netfission.tasks.base import EvaluationResult
from netfission.utils.errors import invalid
from netfission.utils.files import write_json
from netfission.utils.json_files import read_json
from netfission.utils.typed import typed


@dataclass(frozen=True)
class Record:
    """The result of one run.

    Attributes:
        key: `Cell.key`.
        contender: name of the contender.
        seed: seed of the run.
        settings: those that differ from their defaults.
        environment: versions, device, threads.
        seconds: duration of the training, over all sessions of a run that was stopped and resumed.
        evaluation: on the test split; None if the run failed.
        error: why the run failed, in one line; None if it did not.
        data: `fingerprint` of the data set's folder; None for a data set by name.
        weights: SHA-256 of the file of weights that the run started from; None if it started from others,
            such as those of another run.
    """

    key: str
    contender: str
    seed: int
    settings: dict[str, Any]
    environment: dict[str, Any]
    seconds: float
    evaluation: dict[str, Any] | None = None
    error: str | None = None
    data: str | None = None
    weights: str | None = None

    def read_evaluation(self) -> EvaluationResult:
        """Return the evaluation of a run that succeeded, of the type of its task."""
        return self._evaluation

    @cached_property
    def _evaluation(self) -> EvaluationResult:
        assert self.evaluation is not None
        kind = task_kind(self.settings.get("task", DataConfig.task)).evaluation_kind
        evaluation: EvaluationResult = typed(kind, self.evaluation)
        return evaluation


def run_folder(cell: Cell, out: Path) -> RunFolder:
    """Return the folder of a run, which need not exist yet."""
    return RunFolder(out / cell.folder)


@cache  # many runs share a folder
def _fingerprint(path: Path, task: str) -> str | None:
    return fingerprint(str(path), task_kind(task).targets)


def _data_fingerprint(cell: Cell) -> str | None:
    """The fingerprint of a run's folder of data; None for a data set by name."""
    data = cell.config.data
    return None if is_named(data.data) else _fingerprint(Path(data.data).resolve(), data.task)


def _weights_digest(cell: Cell) -> str | None:
    """Return the SHA-256 of the file of weights that a run starts from; None if no file exists.

    None, too, if it starts from another run: that run's settings are part of the key, and its weights differ
    by rounding if it is trained again on another machine.
    """
    path = cell.config.model.weights
    if path is None or cell.start is not None or not Path(path).exists():
        return None
    return file_digest(path)


def _check_same(argument: str, hashes: tuple[str | None, str | None], expected: str, **words: str) -> None:
    """Refuse what differs from what a record was made with, if both hashes, then and now, are known."""
    before, now = hashes
    if None not in (before, now) and before != now:
        raise invalid(argument, expected, **words)


def _has_nan(content: Any) -> bool:
    """Return whether there is NaN among the numbers in the content of a JSON file."""
    if isinstance(content, dict | list):
        return any(map(_has_nan, content.values() if isinstance(content, dict) else content))
    return isinstance(content, float) and isnan(content)


@dataclass(frozen=True)
class Records:
    """The records of a grid, and the locks that keep processes from doing the same run.

    Attributes:
        path: folder of the records, made with the first of them; the folder of locks is beside it.
    """

    path: Path

    def file(self, cell: Cell) -> Path:
        """Return the path of a run's record."""
        return self.path / f"{cell.key}.json"

    def find(self, cell: Cell) -> Record | None:
        """Return the record of a run; None if it has no record yet.

        Raises:
            ValueError: the file is damaged, of another run, or has NaN among its numbers.
        """
        file, hint = self.file(cell), "remove the file, and the run is done again"
        record = read_json(file, Record, hint=hint)
        if record is not None and record.key != cell.key:
            raise invalid(
                str(file), f"the record of run {cell.key}", found=f"that of {record.key}", hint=hint
            )
        if record is not None and _has_nan(record.evaluation):
            raise invalid(str(file), "a record of numbers", found="NaN among them", hint=hint)
        return record

    def find_success(self, cell: Cell) -> Record | None:
        """Return the record of a run that succeeded; None if it failed or has no record yet.

        A record whose ensemble averages by another rule than the run's method does not count: an older
        version wrote it.

        Raises:
            ValueError: the file is damaged, or the run had other data or weights of the same name.
        """
        record = self.find(cell)
        if record is None or record.error is not None:
            return None
        evaluation = record.read_evaluation()
        average = find_method(cell.config.method).average_of(cell.config.fission)
        if len(evaluation.exits) > 1 and evaluation.average != average:
            return None
        _check_same(
            "data",
            (record.data, _data_fingerprint(cell)),
            f"the data of {self.file(cell)}",
            found=f"other data of the same name ({cell.config.data.data})",
            hint="choose another folder for the runs on these data",
        )
        _check_same(
            "weights",
            (record.weights, _weights_digest(cell)),
            f"the file of {self.file(cell)}",
            found=f"{cell.config.model.weights} with other content",
            hint="choose another folder for the runs from these weights",
        )
        return record

    def write(self, cell: Cell, **result: Any) -> Record:
        """Write the record of a run.

        Args:
            cell: the run.
            result: the other fields of `Record`.
        """
        settings, data = chosen_settings(cell.config), _data_fingerprint(cell)
        weights = _weights_digest(cell)
        record = Record(cell.key, cell.contender, cell.seed, settings, data=data, weights=weights, **result)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.file(cell), json.dumps(asdict(record), indent=1) + "\n")
        return record

    @contextmanager
    def claimed(self, cell: Cell, *, wait: bool) -> Iterator[bool]:
        """Claim a run while the context lasts; give whether this process has the claim.

        Args:
            cell: the run.
            wait: if another process has the claim, wait until it ends.
        """
        locks = self.path.parent / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{cell.key}.lock")
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
