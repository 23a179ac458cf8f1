"""Cut the data sets of two published grids from CIFAR's folders of parquet files.

`search` takes 20,000 images of CIFAR-100's training split to train on and 4,000 others to choose a form by
(results/finetune-search). `halves` divides CIFAR-10's test split at random (results/finetune-resnet and
results/finetune-vit).

    .venv/bin/python benchmarks/data_parts.py search cifar100 cifar100-search
    .venv/bin/python benchmarks/data_parts.py halves cifar10 cifar10-halves
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow.parquet import read_table, write_table

SEARCH_TRAIN, SEARCH_TEST = 20_000, 4_000  # rows, from the first on


def search(folder: Path) -> tuple[Any, Any]:
    """Return the images to train on and those to choose by."""
    table = read_table(min(folder.glob("train-*.parquet")))
    return table.slice(0, SEARCH_TRAIN), table.slice(SEARCH_TRAIN, SEARCH_TEST)


def halves(folder: Path) -> tuple[Any, Any]:
    """Return the two halves of the test split."""
    table = read_table(min(folder.glob("test-*.parquet")))
    rows = np.random.default_rng(0).permutation(len(table))
    middle = len(table) // 2
    return table.take(np.sort(rows[:middle])), table.take(np.sort(rows[middle:]))


PARTS: dict[str, Callable[[Path], tuple[Any, Any]]] = {"search": search, "halves": halves}


def main() -> None:
    """Write one of the data sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder", type=Path, help="of the parquet files")
    parser.add_argument("out", type=Path, help="folder to write")
    flags = parser.parse_args()
    train, test = PARTS[flags.part](flags.folder)
    flags.out.mkdir(parents=True, exist_ok=True)
    for split, table in (("train", train), ("test", test)):
        write_table(table, flags.out / f"{split}-00000-of-00001.parquet")
        print(f"{split}: {len(table):,} images")


if __name__ == "__main__":
    main()
