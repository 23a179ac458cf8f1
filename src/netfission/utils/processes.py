"""Processes of one command that torchrun or SLURM has started, as the environment tells."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """How many processes of this command were started.

    Attributes:
        launcher: what started them.
        devices: processes on each machine, one per device.
        machines: number of machines.
    """

    launcher: str
    devices: int
    machines: int


def find_launch() -> Launch | None:
    """Return how this command was started; None if it was started by itself.

    Example:
        >>> find_launch() is None
        True
    """
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        each = int(environment["LOCAL_WORLD_SIZE"])
        return Launch("torchrun", each, int(environment["WORLD_SIZE"]) // each)
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))  # of srun; a batch script itself has none
    if tasks == 1:
        return None
    machines = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    return Launch("srun", tasks // machines, machines)
