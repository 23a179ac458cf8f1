"""Start-up and throughput of a folder of many small images, beside torchvision's ImageFolder, in turn.

Start-up is the time until images and classes are known: of `find_source`, which lists the files, with and
without `fingerprint`, which also asks for their sizes; and of `load_data` with and without its checks, which
also makes splits and reads some images. Throughput is that of `--read` images of 48x48 pixels, decoded and
resized to 32x32 by as many workers, with torchvision's DataLoader beside it.
Writes results/benchmark_folders.json; the images lie in a temporary folder and are deleted.

    .venv/bin/python benchmarks/folders.py --images 200000 --rounds 5
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, PILToTensor, Resize

from netfission.data.batches import decode_batches
from netfission.data.load import load_data
from netfission.data.sources import find_source, fingerprint
from netfission.data.splits import StreamedSplit
from netfission.runs.folder import environment
from netfission.utils.files import write_whole

RESULTS = Path(__file__).parents[1] / "results" / "benchmark_folders.json"
CLASSES = 100
ENCODED, SIZE = 48, 32  # pixels of the files, and of what is read
BATCH = 128
REFERENCE = "ImageFolder"


def make_images(folder: Path, count: int) -> None:
    """Write `count` JPEG files into one folder per class, each of other content."""
    pixels = np.random.default_rng(0).integers(0, 256, (ENCODED, ENCODED, 3), dtype=np.uint8)
    encoded = BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG")
    for number in range(count):
        path = folder / f"class {number % CLASSES:03}" / f"{number:07}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded.getvalue() + number.to_bytes(8))  # behind the end of the image


def start_ups(folder: Path) -> dict[str, Callable[[], object]]:
    """Return what is timed until images and classes are known."""
    return {
        REFERENCE: lambda: ImageFolder(folder),
        "find_source": lambda: find_source(str(folder)),
        "find_source and fingerprint": lambda: (find_source(str(folder)), fingerprint(str(folder))),
        "load_data without checks": lambda: load_data(
            str(folder), image_size=SIZE, memory_limit=0, checks=False
        ),
        "load_data": lambda: load_data(str(folder), image_size=SIZE, memory_limit=0),
    }


def epochs(folder: Path, read: int, workers: int) -> dict[str, Callable[[], object]]:
    """Return what is timed for reading some images, spread evenly."""
    files = ImageFolder(folder, transform=Compose([Resize(SIZE), PILToTensor()]))
    rows = np.linspace(0, len(files) - 1, read, dtype=np.int64)
    subset = Subset(files, rows.tolist())
    split = StreamedSplit(find_source(str(folder)).train, rows, (SIZE, SIZE))
    return {
        REFERENCE: lambda: [len(labels) for _, labels in DataLoader(subset, BATCH, num_workers=workers)],
        "netfission": lambda: [len(labels) for _, labels in decode_batches(split, BATCH, workers=workers)],
    }


def measure(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time each case once per round, in turn, after a round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Return the time of each case over that of the reference in the same round."""
    return {
        name: [value / reference for value, reference in zip(values, seconds[REFERENCE], strict=True)]
        for name, values in seconds.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=200_000, help="files in the folder")
    parser.add_argument("--read", type=int, default=20_000, help="images that are decoded")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one of warm-up")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the record")
    settings = parser.parse_args(arguments)
    load_before = os.getloadavg()[0]  # above 0.5, other processes ran beside the benchmark
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), settings.images)
        start_up = measure(start_ups(Path(folder)), settings.rounds)
        reading = measure(epochs(Path(folder), settings.read, settings.workers), settings.rounds)
    record = {
        "benchmark": "folders",
        "n": settings.rounds,
        "images": settings.images,
        "read": settings.read,
        "workers": settings.workers,
        "load_before": load_before,
        "start_up_seconds": start_up,
        "start_up_ratios": ratios(start_up),
        "reading_seconds": reading,
        "reading_ratios": ratios(reading),
        "environment": environment(),
    }
    write_whole(settings.out, json.dumps(record, indent=2) + "\n")
    for title, seconds in (("start-up", start_up), ("reading", reading)):
        for name, values in ratios(seconds).items():
            spread = f"({min(values):.2f}–{max(values):.2f}, n = {settings.rounds})"
            print(f"{title:9}{name:29}{median(seconds[name]):8.3f} s  {median(values):6.2f}x  {spread}")
    if load_before > 0.5:
        print(f"other processes ran beside this: load {load_before:.1f} before the start")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
