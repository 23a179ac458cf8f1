"""Runs of a grid spread over the machines of a Ray cluster, which share the grid's folder."""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from netfission.experiments.grid import Cell
from netfission.utils.errors import invalid
from netfission.utils.extras import extra

TIMEOUT_S = 5.0  # for a cluster's address to answer


def run_on_cluster(
    cells: Sequence[Cell], address: str, run: Callable[[Cell], bool]
) -> Iterator[tuple[Cell, bool]]:
    """Call `run` on each cell somewhere in the cluster; yield cells with results in the order they finish.

    A run occupies one GPU if the cluster has any, else one CPU.

    Args:
        cells: the runs.
        address: `auto` (the cluster that this machine is part of), `HOST:PORT`, `ray://HOST:PORT` or `local`
            (a cluster of this machine alone, for as long as the runs last).
        run: must be picklable, like everything that it reads.

    Raises:
        ValueError: nothing answers at the address.
        MissingExtraError: Ray is not installed.
    """
    ray = _import_ray()
    with _connected(ray, address):
        needs = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
        task = ray.remote(**needs)(_call)
        waiting = {task.remote(run, cell): cell for cell in cells}
        while waiting:
            for reference in ray.wait(list(waiting))[0]:
                yield waiting.pop(reference), ray.get(reference)


def _call(run: Callable[[Cell], bool], cell: Cell) -> bool:
    return run(cell)


def _import_ray() -> ModuleType:
    with extra("ray", "a Ray cluster"):
        import ray
    module: ModuleType = ray
    return module


@contextmanager
def _connected(ray: ModuleType, address: str) -> Iterator[None]:
    """Take part in the cluster while the context lasts."""
    if address not in ("auto", "local"):
        _check_answer(address)
    own = {"include_dashboard": False} if address == "local" else {}  # nobody could look at it in time
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, ValueError) as error:
        raise _no_answer(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answer(address: str) -> None:
    """ValueError if nothing answers: Ray itself tries for minutes, then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _no_answer(address, error) from error


def _no_answer(address: str, error: Exception) -> ValueError:
    expected = "the address of a Ray cluster (auto, local, HOST:PORT or ray://HOST:PORT)"
    return invalid("ray", expected, found=f"no answer at {address} ({str(error).splitlines()[0]})")
