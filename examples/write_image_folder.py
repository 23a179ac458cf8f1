"""Write images of a data set to a folder, as `train/CLASS/*.png` and `test/CLASS/*.png`.

python examples/write_image_folder.py cifar100 photographs --classes 10 --images 50
"""

import argparse
from collections import Counter
from pathlib import Path

from PIL import Image

from netfission.data import Split, load_data


def write(split: Split, folder: Path, names: list[str], images: int) -> None:
    """Write the first images of each class in `names`, at most `images` per class."""
    written: Counter[int] = Counter()
    for number in range(len(split)):
        label = int(split.labels[number])
        if label >= len(names) or written[label] >= images:
            continue
        pixels = split.images[number].permute(1, 2, 0).squeeze(2).numpy()
        file = folder / names[label] / f"{written[label]:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        written[label] += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="digits, cifar10, cifar100, or a folder of parquet shards")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=50, help="number per class and split")
    arguments = parser.parse_args()
    data = load_data(arguments.data, validation=0.0)
    names = data.classes[: arguments.classes]
    for name, split in {"train": data.train, "test": data.test}.items():
        write(split, arguments.folder / name, names, arguments.images)
    print(f"wrote {arguments.folder}")


if __name__ == "__main__":
    main()
