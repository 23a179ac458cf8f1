"""What temperature scaling alone gives each network of a grid, fitted to training images that it did not see.

A grid whose runs have a `limit_per_class` leaves most training images out. A random 2,000 of them, the same
for each contender of a seed, give the temperature of each network; the test split is measured with it and
without. Runs whose folder is gone are left out, and networks that are measured already stay as they are.

Writes FOLDER/temperature.json, FOLDER being the output folder of `netfission reproduce`.

    .venv/bin/python benchmarks/temperature.py runs/finetune-cifar100
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finished_runs import measure_runs
from netfission.classifier import Classifier
from netfission.config import RunConfig
from netfission.data import StreamedSplit
from netfission.data.batches import decode_batches
from netfission.data.load import find_splits
from netfission.data.sources import find_source
from netfission.data.splits import Rows
from netfission.ensemble import fit_temperature
from netfission.evaluation import evaluate_logits
from netfission.runs.folder import RunFolder

IMAGES = 2000
BATCH = 250
METRICS = ("top1", "nll", "ece", "brier")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the networks of a grid."""
    parser = ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    measure_runs(folder, folder / "temperature.json", measure, images=IMAGES)
    return 0


def measure(run: RunFolder) -> dict[str, Any]:
    """Return the temperature of a run's network, and its metrics on the test split without and with it."""
    config = run.load_config()
    classifier = Classifier.from_pretrained(run.path)
    average = classifier.spec.average
    unseen, test = held_out(config, classifier.spec.shape)
    temperature = fit_temperature(*logits_of(classifier, unseen), average)
    logits, labels = logits_of(classifier, test)
    plain, scaled = (
        evaluate_logits(logits / divisor, labels, average=average).ensemble for divisor in (1, temperature)
    )
    return {
        "temperature": temperature,
        "plain": {name: plain[name] for name in METRICS},
        "scaled": {name: scaled[name] for name in METRICS},
        "n": len(test),
    }


def held_out(config: RunConfig, shape: Sequence[int]) -> tuple[StreamedSplit, StreamedSplit]:
    """Return training images that the run has not seen, and its test images."""
    data, seed = config.data, config.fission.seed
    source = find_source(data.data)
    splits = find_splits(
        data.data,
        validation=data.validation,
        seed=seed,
        limit_per_class=data.limit_per_class,
        source=source,
    )
    used: list[Rows] = [split.rows for split in splits.values() if split.records is source.train]
    rest = np.setdiff1d(np.arange(len(source.train.labels)), np.concatenate(used))
    chosen = np.random.default_rng(seed).permutation(rest)[:IMAGES]
    size = (shape[1], shape[2])
    test = splits["test"]
    return StreamedSplit(source.train, np.sort(chosen), size), StreamedSplit(test.records, test.rows, size)


def logits_of(classifier: Classifier, split: StreamedSplit) -> tuple[Tensor, Tensor]:
    """Return the logits `(n, exits, classes)` of images, and their labels."""
    logits = [classifier.logits(pixels) for pixels, _ in decode_batches(split, BATCH)]
    return torch.cat(logits), split.labels


if __name__ == "__main__":
    sys.exit(main())
