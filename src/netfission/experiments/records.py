"""One file a run: what came of it, written whole."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from netfission.data.sources import NAMES, fingerprint
from netfission.evaluation import Evaluation
from netfission.experiments.grid import Cell, chosen_settings
from netfission.utils.files import write_whole
from netfission.utils.typed import typed


@dataclass(frozen=True)
class Record:
    """What came of one run.

    Attributes:
        key: `Cell.key`.
        contender: whose run it was.
        seed: of the run.
        settings: those that differ from their defaults.
        environment: versions, device, threads.
        seconds: of training, over all sessions of a run that was stopped and resumed.
        evaluation: on the test split; None where the run failed.
        error: why it failed, in one line; None where it did not.
        data: of the folder that it was trained on, see `fingerprint`; None of a data set by name.
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

    def read_evaluation(self) -> Evaluation:
        """The figures of a run that did not fail."""
        assert self.evaluation is not None
        return Evaluation(**self.evaluation)


@cache  # of many runs
def _fingerprint(path: Path) -> str | None:
    return fingerprint(str(path))


def _data_of(cell: Cell) -> str | None:
    """What tells a run's folder of data from others of its name; None of a data set by name."""
    data = cell.config.data.data
    return None if data in NAMES else _fingerprint(Path(data).resolve())


@dataclass(frozen=True)
class Records:
    """The records of a grid in a folder, and who is at work on which.

    Attributes:
        path: the folder, made when the first record is written; beside it lies a folder of locks.
    """

    path: Path

    def file(self, cell: Cell) -> Path:
        """Where a run's record is, or is to be."""
        return self.path / f"{cell.key}.json"

    def find(self, cell: Cell) -> Record | None:
        """The record of a run; None where it has none yet.

        Raises:
            ValueError: the file is damaged.
        """
        file = self.file(cell)
        if not file.is_file():
            return None
        try:
            return typed(Record, json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{file}: is no whole record of a run ({reason}); remove it, and the run is recorded again"
            ) from error

    def done(self, cell: Cell) -> Record | None:
        """The record of a run that did not fail.

        Raises:
            ValueError: the file is damaged, or of a run on other data of the same name.
        """
        record = self.find(cell)
        if record is None or record.error is not None:
            return None
        now = _data_of(cell)
        if record.data is not None and now not in (None, record.data):
            raise ValueError(
                f"data={cell.config.data.data}: {self.file(cell)} is of other data of that name; takes "
                "another folder for what comes of these"
            )
        return record

    def write(self, cell: Cell, **outcome: Any) -> Record:
        """Keep what came of a run."""
        settings, data = chosen_settings(cell.config), _data_of(cell)
        record = Record(cell.key, cell.contender, cell.seed, settings, data=data, **outcome)
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.file(cell), json.dumps(asdict(record), indent=1) + "\n")
        return record

    @contextmanager
    def claimed(self, cell: Cell, *, wait: bool) -> Iterator[bool]:
        """Whether the run is this process's to do while the context lasts.

        Args:
            cell: the run.
            wait: until another process that is at work on it is through.
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
