"""Write tables of photographs with masks: the classes that occur in each, and the share of one class in it.

python examples/write_target_tables.py camvid tables --share road
netfission train --task multilabel --data tables/labels.csv --image-size 96 --model tf_efficientnet_lite0
netfission train --task regression --data tables/road.csv --image-size 96 --model tf_efficientnet_lite0

The folder holds SPLIT/images/NAME.jpg and SPLIT/masks/NAME.png, with the number of a class in each pixel.
"""

import argparse
import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

CAMVID = [
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
]


def pairs(folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield split, image and mask of each photograph."""
    for image in sorted(folder.glob("*/images/*")):
        split = image.parents[1]
        mask = split / "masks" / f"{image.stem}.png"
        if not mask.is_file():
            raise SystemExit(f"{image} has no mask {mask}")
        yield split.name, image, mask


def shares(mask: Path, classes: int) -> list[float]:
    """Return the share of the pixels of each class; other numbers, such as that of void, belong to none."""
    with Image.open(mask) as opened:
        counts = np.bincount(np.asarray(opened).ravel(), minlength=classes)
    return [float(count) for count in counts[:classes] / counts.sum()]


def write(table: Path, header: list[str], rows: Iterable[list[object]]) -> None:
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    print(f"wrote {table}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, help="folder of the tables")
    parser.add_argument("--classes", nargs="+", default=CAMVID, help="names, in the order of their numbers")
    parser.add_argument("--share", default="road", help="the class whose share is written")
    arguments = parser.parse_args()
    classes = arguments.classes
    found = [
        (split, str(image.resolve()), shares(mask, len(classes)))
        for split, image, mask in pairs(arguments.folder)
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    occurring = ([image, *(int(share > 0) for share in parts), split] for split, image, parts in found)
    write(arguments.out / "labels.csv", ["path", *classes, "split"], occurring)
    chosen = classes.index(arguments.share)
    of_one = ([image, f"{parts[chosen]:.6f}", split] for split, image, parts in found)
    write(arguments.out / f"{arguments.share}.csv", ["path", arguments.share, "split"], of_one)


if __name__ == "__main__":
    main()
