"""Time of `import netfission` over that of `import torch`, each in a fresh interpreter, in turn.

Prints the median of both, and the median and range of the ratios pair by pair. Writes
results/benchmark_import_time.json.

    .venv/bin/python benchmarks/import_time.py --rounds 15
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

from netfission.runs.folder import environment

RESULTS = Path(__file__).parents[1] / "results" / "benchmark_import_time.json"


def seconds_to_import(module: str) -> float:
    """Return the seconds of the import alone, without the start of the interpreter."""
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="imports of each that count, after one of warm-up"
    )
    rounds = parser.parse_args().rounds
    pairs = [(seconds_to_import("netfission"), seconds_to_import("torch")) for _ in range(rounds + 1)][1:]
    ratios = [netfission / torch for netfission, torch in pairs]
    record = {
        "benchmark": "import_time",
        "n": rounds,
        "netfission_seconds": [netfission for netfission, _ in pairs],
        "torch_seconds": [torch for _, torch in pairs],
        "ratio_median": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "environment": environment(),
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    print(
        f"import netfission {median(netfission for netfission, _ in pairs):.2f} s, import torch "
        f"{median(torch for _, torch in pairs):.2f} s, ratio {median(ratios):.3f} "
        f"(range {min(ratios):.3f}–{max(ratios):.3f}, n = {rounds})"
    )


if __name__ == "__main__":
    main()
