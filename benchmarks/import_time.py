"""Processor time until imports and commands are done, each in a fresh interpreter, in turn.

Prints the median of user and system time of each and its range, and writes
results/benchmark_import_time.json. Prediction is timed until its first forward pass ends.

    .venv/bin/python benchmarks/import_time.py --rounds 9
"""

import argparse
import json
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

# Code, run with the arguments of a command. What it prints last is the time.
TIMED = """
import os, resource, sys

def report():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(f"\\n{usage.ru_utime + usage.ru_stime}", flush=True)
    os._exit(0)
"""
HELP = """
from netfission.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    report()
"""
FIRST_FORWARD_PASS = """
from netfission.cli import main

class Patch:
    def find_spec(self, name, path=None, target=None):
        if name == "netfission.prediction":
            sys.meta_path.remove(self)
            from netfission.classifier import Classifier
            run = Classifier.logits
            Classifier.logits = lambda *given: (run(*given), report())
        return None

sys.meta_path.insert(0, Patch())
main(sys.argv[1:])
"""


def processor_seconds(code: str, *arguments: str) -> float:
    """Time code in a fresh interpreter, with the interpreter's own start."""
    command = [sys.executable, "-c", TIMED + code, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def make_files(folder: Path) -> tuple[str, str]:
    """Save a network of three exits with fresh weights, and an image; return their paths."""
    images = torch.zeros(2, 3, 32, 32)
    network = nf.fission(create_model("wrn-16-2", 10), exits=3, grouping="channels", example_input=images)
    classifier = nf.Classifier.from_network(
        network,
        model="wrn-16-2",
        classes=list("0123456789"),
        shape=(3, 32, 32),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    classifier.save_pretrained(folder / "model")
    Image.new("RGB", (32, 32)).save(folder / "image.png")
    return str(folder / "model"), str(folder / "image.png")


def measure(cases: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[float]]:
    """Time each case once per round, in turn, after a round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, case in cases.items():
            seconds[name].append(processor_seconds(*case))
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="runs of each that count, after one of warm-up")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        model, image = make_files(Path(folder))
        cases = {
            "import torch": ["import torch; report()"],
            "from netfission import fission": ["from netfission import fission; report()"],
            "netfission --help": [HELP, "--help"],
            "netfission train --help": [HELP, "train", "--help"],
            "netfission predict": [FIRST_FORWARD_PASS, "predict", model, image],
        }
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
        print(f"{name:32}{median(values):5.2f} s  ({min(values):.2f}–{max(values):.2f}, n = {rounds})")


if __name__ == "__main__":
    main()
