"""How well the uncertainty of each network of a grid tells images of another data set from its test images.

The same figures as of `netfission evaluate RUN --ood DATA`, for all networks. Runs whose folder is gone are
left out, and networks that are measured already stay as they are.

Writes FOLDER/other_images.json, FOLDER being the output folder of `netfission reproduce`.

    .venv/bin/python benchmarks/other_images.py runs/finetune-flowers-200 cifar100
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finished_runs import measure_runs
from netfission.runs.folder import RunFolder
from netfission.runs.shift import evaluate_ood


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the networks of a grid."""
    parser = ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", help="name or folder of the other images")
    flags = parser.parse_args(arguments)

    def measure(run: RunFolder) -> dict[str, Any]:
        (found,) = evaluate_ood(run, run.load_config(), [flags.data])
        scores = {name: asdict(detection) for name, detection in found.scores.items()}
        return {"n": found.in_distribution, "n_other": found.out_of_distribution, "scores": scores}

    measure_runs(flags.folder, flags.folder / "other_images.json", measure, other=Path(flags.data).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
