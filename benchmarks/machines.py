"""Train one network on two machines, as `torchrun --nnodes 2` does, and compare it with one machine's.

The machines are two network namespaces of this one, which share nothing but a virtual cable: root and `ip`
are needed. Trials: with a folder that both share; with a folder of each one's own; with a process of the
second machine killed amid the training, which is then resumed by a shared folder, or refused without one.

Writes results/benchmark_machines.json.

    sudo .venv/bin/python benchmarks/machines.py
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from netfission.runs.folder import environment
from netfission.utils.files import write_whole

RESULTS = Path(__file__).parents[1] / "results" / "benchmark_machines.json"
EPOCHS = 6
TRAIN = (
    *("train", "--data", "digits", "--limit-per-class", "10", "--model", "wrn-10-1", "--exits", "2"),
    *("--sparsity", "0.5", "--epochs", str(EPOCHS), "--batch-size", "25", "--accelerator", "cpu"),
)
COMPARED = ("model.safetensors", "metrics.csv", "evaluation.json", "calibration.json", "reliability.json")
ADDRESSES = {"netfission0": "10.77.0.1", "netfission1": "10.77.0.2"}  # of the machines
TIMEOUT_S = 200


@contextlib.contextmanager
def machines() -> Iterator[None]:
    """Make two network namespaces that reach each other by a cable, and nothing else."""
    first, second = ADDRESSES
    try:
        for name in ADDRESSES:
            _ip("netns", "add", name)
        _ip("link", "add", first, "type", "veth", "peer", "name", second)
        for name, address in ADDRESSES.items():
            _ip("link", "set", name, "netns", name)
            _ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", name, "up")
        yield
    finally:
        for name in ADDRESSES:
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def launch(arguments: Sequence[str], log: Path, machine: str | None = None) -> subprocess.Popen[bytes]:
    """Start torchrun on one of the two machines, or for two processes of this one."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    variables = {"OMP_NUM_THREADS": "1"}
    if machine is None:
        command += ["--nproc_per_node", "2", "--master_port", "29531"]
    else:
        rank = list(ADDRESSES).index(machine)
        master = next(iter(ADDRESSES.values()))
        command = ["ip", "netns", "exec", machine, *command, "--nnodes", "2", "--nproc_per_node", "1"]
        command += ["--node_rank", str(rank), "--master_addr", master, "--master_port", "29531"]
        variables["GLOO_SOCKET_IFNAME"] = machine  # the name of this computer is no address of a namespace
    with log.open("ab") as output:
        return subprocess.Popen(
            [*command, "-m", "netfission", *arguments],
            env=os.environ | variables,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def train(folders: Sequence[Path], *more: str, kill_after: int | None = None) -> list[int]:
    """Train on both machines; return the status of each.

    Args:
        folders: of the run, on each machine.
        more: flags.
        kill_after: epochs after which the second machine is gone.
    """
    log = folders[0].parent.with_suffix(".log")
    processes = [
        launch([*TRAIN, "--out", str(folder), *more], log, machine)
        for folder, machine in zip(folders, ADDRESSES, strict=True)
    ]
    if kill_after is not None:
        while processes[1].poll() is None and _epochs(folders[0]) < kill_after:
            time.sleep(0.005)
        _kill(processes[1])
    statuses = []
    for process in processes:
        try:
            statuses.append(process.wait(TIMEOUT_S))
        except subprocess.TimeoutExpired:
            _kill(process)
            statuses.append(-signal.SIGALRM)  # it hung
    return statuses


def _epochs(folder: Path) -> int:
    table = folder / "metrics.csv"
    return len(table.read_text("utf-8").splitlines()) - 1 if table.is_file() else 0


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill all processes of a machine, which torchrun puts into sessions of their own."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    for pid in [*map(int, children), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def differences(folder: Path, expected: Path) -> list[str]:
    """Return which files of results are not the same bytes."""
    return [
        name
        for name in COMPARED
        if not (folder / name).is_file() or (folder / name).read_bytes() != (expected / name).read_bytes()
    ]


def main() -> int:
    """Run all trials; return 1 if one ended otherwise."""
    trials: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place, machines():
        expected = Path(place) / "expected"
        status = launch([*TRAIN, "--out", str(expected)], Path(place) / "log").wait(TIMEOUT_S)
        assert status == 0, (Path(place) / "log").read_text("utf-8")
        for name, shared, killed in [
            ("shared folder", True, False),
            ("folders of their own", False, False),
            ("shared folder, killed and resumed", True, True),
            ("folders of their own, killed and resumed", False, True),
        ]:
            top = Path(place) / name.replace(" ", "-").replace(",", "")
            top.mkdir()
            folders = [top / "run", top / ("run" if shared else "run-of-second")]
            trial: dict[str, Any] = {"trial": name}
            if killed:
                trial["killed"] = train(folders, kill_after=2)
                trial["epochs_before"] = _epochs(folders[0])
            trial["statuses"] = train(folders, *(["--resume"] if killed else []))
            said = top.with_suffix(".log").read_text("utf-8")
            if killed and not shared:  # a machine that lacks the checkpoint
                trial["refused"] = said.count("out must be a folder that all machines share") == 2
                trial["good"] = trial["refused"] and all(trial["statuses"])
            else:
                trial["differ"] = differences(folders[0], expected)
                trial["good"] = not any(trial["statuses"]) and not trial["differ"]
            if not trial["good"]:
                trial["said"] = said[-3000:]
            trials.append(trial)
            print(json.dumps(trial), flush=True)
    content = {
        "benchmark": "machines",
        "command": "python benchmarks/machines.py",
        "environment": environment(),
        "trials": trials,
    }
    write_whole(RESULTS, json.dumps(content, indent=1) + "\n")
    return int(not all(trial["good"] for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
