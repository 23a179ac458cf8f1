"""Seconds and peak memory of each pruning criterion, from scores to masks.

Every run has a process of its own, so that no peak hides behind an earlier one; the criteria take turns. The
results hold the load average before each run: on a machine shared with other work, read the minimum. On a
CPU, memory is the process's peak resident set (getrusage), before and after pruning. On a GPU it is the most
that PyTorch allocated.

    .venv/bin/python benchmarks/pruning.py                      # WRN-28-10 at 90 percent, all criteria
    .venv/bin/python benchmarks/pruning.py --model wrn-16-2 --criteria snip grasp --runs 5
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

CRITERIA = ["random", "erk", "magnitude", "snip", "grasp", "synflow"]
RESULT = Path(__file__).parents[1] / "results" / "benchmark_pruning.json"


def main() -> None:
    """Measure, print and record."""
    options = parse_arguments()
    if options.one:
        print(json.dumps(measure(options, options.one)))
        return
    rows: dict[str, list[dict[str, Any]]] = {criterion: [] for criterion in options.criteria}
    for run in range(options.runs):
        for criterion in options.criteria:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", criterion]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            rows[criterion].append(json.loads(answer.splitlines()[-1]))
            seconds, memory = (rows[criterion][-1][key] for key in ("seconds", "peak_memory_mib"))
            progress = f"run {run + 1}/{options.runs}: {criterion} {seconds:.2f} s, {memory:.0f} MiB"
            print(progress, file=sys.stderr)
    conditions = next(iter(rows.values()))[0]["conditions"] | {"runs": options.runs}
    results = {criterion: summary(runs) for criterion, runs in rows.items()}
    print(table(results, conditions))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"conditions": conditions, "criteria": results}, indent=2))
    print(f"wrote {options.output}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wrn-28-10")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--criteria", nargs="+", default=CRITERIA, choices=CRITERIA)
    parser.add_argument("--batches", type=int, default=1, help="batches of random images")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--one", choices=CRITERIA, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options: argparse.Namespace, criterion: str) -> dict[str, Any]:
    """Prune once. Imports stand in the functions, since a parent's peak would count as its children's."""
    import torch

    import netfission
    from netfission.models import create_model
    from netfission.pruning.prune import prune
    from netfission.surgery.masks import prunable_weights

    torch.manual_seed(0)
    device = torch.device(options.device)
    model = create_model(options.model, options.classes).to(device)
    head = last_linear(model)
    names = [name for name in prunable_weights(model) if name != head]
    size = (options.batch_size, 3, options.image_size, options.image_size)
    batches = [
        (torch.randn(size, device=device), torch.randint(options.classes, size[:1], device=device))
        for _ in range(options.batches)
    ]
    load, before = os.getloadavg()[0], peak_memory(device)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the table shows emptied layers
        masks = prune(model, names, options.sparsity, criterion=criterion, batches=batches, seed=0)
    synchronize(device)
    seconds = time.perf_counter() - start
    after = peak_memory(device)
    kept = [int(mask.sum()) for mask in masks.values()]
    return {
        "seconds": seconds,
        "load_before": load,
        "peak_memory_mib": after,
        "peak_memory_before_mib": before,
        "weights_kept": sum(kept),
        "weights": sum(mask.numel() for mask in masks.values()),
        "layers_emptied": kept.count(0),
        "layers": len(kept),
        "conditions": {
            "model": options.model,
            "classes": options.classes,
            "sparsity": options.sparsity,
            "batches": options.batches,
            "batch_shape": list(size),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "memory": "peak resident set" if device.type == "cpu" else "peak allocated on device",
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "netfission": getattr(netfission, "__version__", None),
        },
    }


def last_linear(model: Any) -> str:
    """Return the name of the classifier's weight, which is never pruned."""
    import torch

    layers = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    return f"{layers[-1]}.weight"


def peak_memory(device: Any) -> float:
    """Return the highest memory so far, in MiB."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Linux counts KiB, macOS bytes.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def synchronize(device: Any) -> None:
    """Wait for the device."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: Any) -> str:
    """Return the name of the device."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"cpu ({names[0] if names else platform.processor()})"


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median and range of the seconds, the highest peak, and the counts, which all runs share."""
    seconds = [run["seconds"] for run in runs]
    return {
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "load_average_before_max": max(run["load_before"] for run in runs),
        "peak_memory_mib": max(run["peak_memory_mib"] for run in runs),
        "peak_memory_before_mib": max(run["peak_memory_before_mib"] for run in runs),
    } | {name: runs[0][name] for name in ("weights_kept", "weights", "layers_emptied", "layers")}


def table(results: dict[str, dict[str, Any]], conditions: dict[str, Any]) -> str:
    """Return the results as aligned text."""
    lines = [
        "{model}, {sparsity:.0%} of the weights removed, {batches} × {batch_shape} images, {device}, "
        "{threads} threads, torch {torch}, {runs} runs; memory: {memory}".format(**conditions),
        f"{'criterion':<10} {'seconds':>9} {'min-max':>17} {'peak MiB':>9} {'before':>7} "
        f"{'kept':>10} {'layers emptied':>15}",
    ]
    for criterion, row in results.items():
        spread = f"{row['seconds_min']:.2f}-{row['seconds_max']:.2f}"
        emptied = f"{row['layers_emptied']} of {row['layers']}"
        lines.append(
            f"{criterion:<10} {row['seconds_median']:>9.2f} {spread:>17} "
            f"{row['peak_memory_mib']:>9.0f} {row['peak_memory_before_mib']:>7.0f} "
            f"{row['weights_kept'] / row['weights']:>10.4%} {emptied:>15}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
