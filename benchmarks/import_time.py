"""Processor time until imports and commands are done, each in a fresh interpreter, in turn.

Prints the median of user and system time of each and its range, and writes
results/benchmark_import_time.json. Prediction is that of one image, until the process ends.

    .venv/bin/python benchmarks/import_time.py --rounds 9
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from PIL import Image

import netfission as nf
from netfission.models import create_model
from netfission.runs.folder import environment

RESULTS = Path(__file__).parents[1] / "results" / "benchmark_import_time.json"

IMAGE_SIZE = {"wrn-16-2": 32, "tf_efficientnet_lite0": 128}  # one model of this library, and one of timm


def processor_seconds(command: Sequence[str]) -> float:
    """Return the user and system time of a command, from the interpreter's start to its end."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_utime + usage.ru_stime


def without_teardown(code: str) -> list[str]:
    """Return the command that runs code and ends at once."""
    return ["-c", f"import os; {code}; os._exit(0)"]


def make_files(folder: Path, model: str) -> list[str]:
    """Save a network of three exits with fresh weights, and an image; return their paths."""
    size = IMAGE_SIZE[model]
    images = torch.zeros(2, 3, size, size)
    network = nf.fission(create_model(model, 10), exits=3, grouping="channels", example_input=images)
    classifier = nf.Classifier.from_network(
        network,
        model=model,
        classes=list("0123456789"),
        shape=(3, size, size),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    classifier.save_pretrained(folder / model)
    Image.new("RGB", (size, size)).save(folder / f"{model}.png")
    return [str(folder / model), str(folder / f"{model}.png")]


def measure(cases: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[float]]:
    """Time each case once per round, in turn, after a round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, case in cases.items():
            seconds[name].append(processor_seconds(case))
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="runs of each that count, after one of warm-up")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "import torch": without_teardown("import torch"),
            "from netfission import fission": without_teardown("from netfission import fission"),
            "netfission --help": ["-m", "netfission", "--help"],
            "netfission train --help": ["-m", "netfission", "train", "--help"],
        }
        for model in IMAGE_SIZE:
            files = make_files(Path(folder), model)
            cases[f"netfission predict, {model}"] = ["-m", "netfission", "predict", *files]
        seconds = measure(cases, rounds)
    record = {
        "benchmark": "import_time",
        "n": rounds,
        "processor_seconds": seconds,
        "median": {name: median(values) for name, values in seconds.items()},
        "environment": environment(),
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    for name, values in seconds.items():
        print(f"{name:42}{median(values):5.2f} s  ({min(values):.2f}–{max(values):.2f}, n = {rounds})")


if __name__ == "__main__":
    main()
