"""Real images, as pixels: of a run's data set, or of any folder."""

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from netfission.classifier import Classifier
from netfission.config import RunConfig
from netfission.data import ImageData, Split
from netfission.data.images import why_unreadable
from netfission.data.splits import TensorSplit
from netfission.data.unlabelled import list_images
from netfission.runs.setup import load_run_data

CHECKED = 256  # images that a file is checked with
_BATCH = 64


def data_of(classifier: Classifier, data: str | None, *, otherwise: str = "") -> tuple[ImageData, int]:
    """The data set that a network was trained on, and how many processes are to decode its images.

    Args:
        classifier: whose recipe names it.
        data: where it is now; default where it was.
        otherwise: what else can be passed, to end messages with.

    Raises:
        ValueError: it is not to be had, or another; says what to pass instead.
    """
    if classifier.recipe is None:
        raise ValueError(
            f"run: does not say what it was trained on; takes a folder with config.yaml{otherwise}"
        )
    flat = classifier.recipe.to_dict()
    config = RunConfig.from_dict(flat | ({} if data is None else {"data": data}))
    try:
        found = load_run_data(config.data, config.fission.seed)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data={config.data.data}: cannot be read ({error}); pass --data, where the data set is "
            f"now{otherwise}"
        ) from error
    if found.classes != classifier.spec.classes or list(found.shape) != list(classifier.spec.shape):
        raise ValueError(
            f"data={config.data.data}: has {len(found.classes)} classes of images {found.shape}; takes the "
            f"{len(classifier.spec.classes)} classes of {tuple(classifier.spec.shape)} it was trained on"
        )
    return found, config.data.workers


def batches_of(split: Split, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All of a split: pixels, uint8 `(batch, channels, height, width)`, and labels `(batch,)`."""
    if isinstance(split, TensorSplit):
        return zip(split.images.split(_BATCH), split.labels.split(_BATCH), strict=True)
    return iter(DataLoader(split, _BATCH, num_workers=workers))


def spread(split: Split, most: int) -> Tensor:
    """At most so many images from all over a split, uint8 `(n, channels, height, width)`."""
    rows = torch.linspace(0, len(split) - 1, min(most, len(split))).long()
    if isinstance(split, TensorSplit):
        return split.images[rows]
    return torch.stack([split[int(row)][0] for row in rows])


def read_folder(classifier: Classifier, folder: Path, most: int) -> Tensor:
    """At most so many of the images in a folder and those below it, made ready for a classifier.

    Raises:
        ValueError: there are none, or one cannot be read; names it.
    """
    paths = list_images(folder)
    if not paths:
        raise ValueError(f"images={folder}: takes a folder that holds images")
    rows = torch.linspace(0, len(paths) - 1, min(most, len(paths))).long().tolist()
    return torch.stack([_read(classifier, paths[row]) for row in rows])


def _read(classifier: Classifier, path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            return classifier.pixels(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and many more
        raise ValueError(f"images={path}: {why_unreadable(error)}") from error
