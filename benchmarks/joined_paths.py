"""Training of three narrow convolutions: one after another, or joined as one grouped convolution.

Paths that divide a stage hold narrow convolutions of the same shape. `deploy` joins them to one grouped
convolution. This compares both ways in training, forward and backward, beside the one wide convolution that
they divide, of about as many multiply-accumulates. Writes results/benchmark_joined_paths.json.

    .venv/bin/python benchmarks/joined_paths.py --rounds 15
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from netfission.profiling.timing import Quartiles, device_name, times_in_turn
from netfission.utils.files import write_whole

RESULTS = Path(__file__).parents[1] / "results" / "benchmark_joined_paths.json"
PATHS = 3
# Channels of the wide convolution, those of each path, and the height of the features: ResNet-18 at 32x32
# pixels, of width 16 and of width 64, in its last three stages.
SHAPES = [(32, 18, 16), (64, 37, 8), (128, 74, 4), (128, 74, 16), (256, 148, 8), (512, 296, 4)]


def ways(channels: int, narrow: int, side: int, batch: int, device: str) -> dict[str, Callable[[], None]]:
    """Return the ways of one shape: each a forward and a backward pass."""

    def tensor(*shape: int) -> Tensor:
        values = torch.randn(*shape, device=device)
        return values.to(memory_format=torch.channels_last).requires_grad_()

    wide, wide_weight = tensor(batch, channels, side, side), tensor(channels, channels, 3, 3)
    features = [tensor(batch, narrow, side, side) for _ in range(PATHS)]
    weights = [tensor(narrow, narrow, 3, 3) for _ in range(PATHS)]
    together = tensor(batch, PATHS * narrow, side, side)

    def one_wide() -> None:
        conv2d(wide, wide_weight, padding=1).sum().backward()

    def one_by_one() -> None:
        outputs = [conv2d(x, w, padding=1).sum() for x, w in zip(features, weights, strict=True)]
        torch.stack(outputs).sum().backward()

    def joined() -> None:
        conv2d(together, torch.cat(weights), padding=1, groups=PATHS).sum().backward()

    return {"wide": one_wide, "one by one": one_by_one, "joined": joined}


def main() -> None:
    """Measure each shape, print and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for channels, narrow, side in SHAPES:
        runs = ways(channels, narrow, side, flags.batch, device)
        times = times_in_turn(runs, torch.device(device), rounds=flags.rounds)
        ratios = {name: Quartiles.of_ratios(times[name], times["wide"]) for name in ("one by one", "joined")}
        rows.append(
            {"channels": channels, "of each path": narrow, "side": side, "wide_seconds": times["wide"]}
            | {name: asdict(quartiles) for name, quartiles in ratios.items()}
        )
        shown = ", ".join(
            f"{name} {q.median:.2f} ({q.lower:.2f}-{q.upper:.2f})" for name, q in ratios.items()
        )
        print(f"{channels} channels at {side}x{side}, {PATHS} paths of {narrow}: {shown}", flush=True)
    conditions = {
        "batch": flags.batch,
        "rounds": flags.rounds,
        "threads": flags.threads,
        "device": device_name(torch.device(device)),
        "torch": torch.__version__,
    }
    write_whole(RESULTS, json.dumps({"conditions": conditions, "shapes": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
