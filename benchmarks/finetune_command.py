"""What `netfission finetune` gives and takes as one command, over several seeds.

Each case is a command with other flags, which each seed repeats in a folder of its own. It goes on where it
stopped. Writes results/finetune_command.json: of each case and seed the figures of both networks on the test
split, calibrated, the seconds of their trainings, and those of the whole command if it was not stopped.

    .venv/bin/python benchmarks/finetune_command.py cifar100 --weights lite0.pth --limit-per-class 50
    .venv/bin/python benchmarks/finetune_command.py flowers --weights lite0.pth --cases recipe short
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from netfission.cli import main as netfission
from netfission.evaluation.gain import Gain, NetworkFigures
from netfission.models.weights import file_digest
from netfission.runs.folder import RunFolder
from netfission.utils.files import write_whole

RESULTS = Path(__file__).parents[1] / "results" / "finetune_command.json"
MODEL = "tf_efficientnet_lite0"
CASES: Mapping[str, Sequence[str]] = {
    "whole": (),  # fine-tuned from the weights, then made an ensemble
    "given": ("--finetuned", "{whole}/single/model.safetensors", "--ensemble-epochs", "2"),
    "recipe": ("--recipe", "finetune"),
    "short": ("--epochs", "20"),  # the recipe without strong augmentation, as long
}


def run(case: str, seed: int, out: Path, given: Sequence[str], weights: str) -> float | None:
    """Run a case's command unless it is finished; return its seconds, None if it had begun before."""
    folder = RunFolder(out / f"{case}-{seed}")
    whole = out / f"whole-{seed}"
    flags = [flag.format(whole=whole) for flag in CASES[case]]
    start = [] if "--finetuned" in flags else ["--weights", weights]
    is_new, begun = not folder.path.exists(), time.perf_counter()
    status = netfission(
        ["finetune", *given, *start, *flags, "--seed", str(seed), "--out", str(folder.path)],
    )
    assert status == 0
    return time.perf_counter() - begun if is_new else None


def figures(network: NetworkFigures) -> dict[str, Any]:
    """Return what the result keeps of a network."""
    kept = {name: network.metrics[name] for name in ("top1", "nll", "ece", "brier")}
    return kept | {"macs": network.macs, "training_seconds": network.seconds}


def main() -> None:
    """Run the cases and write the result after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="data set, or folder of images")
    parser.add_argument("--weights", required=True, help=f"file of published weights of {MODEL}")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--limit-per-class", type=int, default=50)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["whole", "given"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("finetune-command"), help="default: %(default)s")
    flags = parser.parse_args()
    given = [flags.data, "--model", MODEL, "--channels-last", "true", "--image-size", str(flags.image_size)]
    given += ["--limit-per-class", str(flags.limit_per_class)]
    runs = json.loads(RESULTS.read_text("utf-8"))["runs"] if RESULTS.is_file() else []
    images = {
        "data": Path(flags.data).name,
        "image_size": flags.image_size,
        "images_per_class": flags.limit_per_class,
    }
    out = flags.out / "-".join(map(str, images.values()))
    for seed, case in product(range(flags.seeds), flags.cases):
        which = {**images, "case": case, "seed": seed}
        seconds = run(case, seed, out, given, flags.weights)
        if any(which.items() <= done.items() for done in runs):
            continue
        gain = RunFolder(out / f"{case}-{seed}").current_gain()
        assert isinstance(gain, Gain)
        result = {
            "test_images": gain.n,
            "single": figures(gain.single),
            "ensemble": figures(gain.ensemble),
            "time": {size: asdict(quartiles) for size, quartiles in gain.time.items()},
            "command_seconds": seconds,
            "weights": file_digest(flags.weights),
            "environment": gain.environment,
        }
        runs.append(which | result)
        write_whole(RESULTS, json.dumps({"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
