"""Cut the data sets of grids from CIFAR's folders of parquet files, and from a folder of photographs.

`search` takes 20,000 images of CIFAR-100's training split to train on and 4,000 others to choose a form by.
`halves` divides CIFAR-10's test split at random (results/finetune-resnet and results/finetune-vit).
`photographs` links the training images of a folder, without those that `finetune` tests on: 60 % of a class
to train on, the others to choose by (results/finetune-recipe).

    .venv/bin/python benchmarks/data_parts.py search cifar100 cifar100-search
    .venv/bin/python benchmarks/data_parts.py halves cifar10 cifar10-halves
    .venv/bin/python benchmarks/data_parts.py photographs flowers flowers-search
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow.parquet import read_table, write_table

from netfission.data.load import find_splits
from netfission.data.split_names import SplitName
from netfission.data.splits import FileRecords

SEARCH_TRAIN, SEARCH_TEST = 20_000, 4_000  # rows, from the first on


def search(folder: Path, out: Path) -> None:
    """Write the images to train on and those to choose by."""
    table = read_table(min(folder.glob("train-*.parquet")))
    write(out, train=table.slice(0, SEARCH_TRAIN), test=table.slice(SEARCH_TRAIN, SEARCH_TEST))


def halves(folder: Path, out: Path) -> None:
    """Write the two halves of the test split."""
    table = read_table(min(folder.glob("test-*.parquet")))
    rows = np.random.default_rng(0).permutation(len(table))
    middle = len(table) // 2
    write(out, train=table.take(np.sort(rows[:middle])), test=table.take(np.sort(rows[middle:])))


def write(out: Path, **splits: Any) -> None:
    """Write the table of each split as a parquet file."""
    out.mkdir(parents=True)
    for split, table in splits.items():
        write_table(table, out / f"{split}-00000-of-00001.parquet")
        print(f"{split}: {len(table):,} images")


def photographs(folder: Path, out: Path) -> None:
    """Link the training images, and those to choose by."""
    splits = find_splits(str(folder.resolve()), validation=0.4)
    names: dict[SplitName, str] = {"train": "train", "validation": "test"}
    for split, name in names.items():
        records, rows = splits[split].records, splits[split].rows
        assert isinstance(records, FileRecords)
        for path in (Path(records.paths[row]) for row in rows):
            link = out / name / path.parent.name / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        print(f"{name}: {len(rows):,} images")


PARTS: dict[str, Callable[[Path, Path], None]] = {
    "search": search,
    "halves": halves,
    "photographs": photographs,
}


def main() -> None:
    """Write one of the data sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder", type=Path, help="of the parquet files, or of the photographs")
    parser.add_argument("out", type=Path, help="folder to write")
    flags = parser.parse_args()
    if flags.out.exists():
        parser.error(f"{flags.out} exists")
    PARTS[flags.part](flags.folder, flags.out)


if __name__ == "__main__":
    main()
