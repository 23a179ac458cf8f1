"""Runs of a grid spread over the machines of a Ray cluster, which share the grid's folder."""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from netfission.experiments.grid import Cell

TIMEOUT_S = 5.0  # that a cluster's address may take to answer


def spread(cells: Sequence[Cell], address: str, run: Callable[[Cell], bool]) -> Iterator[tuple[Cell, bool]]:
    """Run `run` on each cell somewhere in the cluster; each cell and what `run` gave, as they come in.

    A run takes one GPU where the cluster has any, else one CPU.

    Args:
        cells: the runs.
        address: `auto` (the cluster that this machine is part of), `HOST:PORT`, `ray://HOST:PORT` or `local`
            (one of this machine alone, for as long as the runs last).
        run: must be picklable, and so must what it reads.

    Raises:
        ValueError: Ray is not installed, or nothing answers at the address.
    """
    ray = _ray()
    with _connected(ray, address):
        needs = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
        task = ray.remote(**needs)(_call)
        waiting = {task.remote(run, cell): cell for cell in cells}
        while waiting:
            for reference in ray.wait(list(waiting))[0]:
                yield waiting.pop(reference), ray.get(reference)


def _call(run: Callable[[Cell], bool], cell: Cell) -> bool:
    return run(cell)


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise ValueError("ray: is not installed; pip install 'netfission[ray]'") from error
    module: ModuleType = ray
    return module


@contextmanager
def _connected(ray: ModuleType, address: str) -> Iterator[None]:
    """Be part of the cluster for a while."""
    if address not in ("auto", "local"):
        _check_answer(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"ray={address}: {_ANSWER} ({str(error).splitlines()[0]})") from error
    try:
        yield
    finally:
        ray.shutdown()


_ANSWER = "no Ray cluster answers; takes auto, local, HOST:PORT or ray://HOST:PORT"


def _check_answer(address: str) -> None:
    """ValueError where nothing answers: Ray itself tries for minutes, then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(f"ray={address}: {_ANSWER} ({error})") from error
