"""Images to check, calibrate or measure an exported file with: of a run's data set, or of any folder."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from netfission.classifier import Classifier, Predictor
from netfission.classifier.folder import NetworkSpec
from netfission.config import RunConfig
from netfission.data import ImageData, Split
from netfission.data.batches import decode_batches
from netfission.data.files import find_images
from netfission.data.formats import open_image
from netfission.data.images import why_unreadable
from netfission.data.splits import TensorSplit
from netfission.runs.setup import check_run_data, load_run_data, same_statistics
from netfission.utils.errors import invalid

CHECK_IMAGES = 256  # to check a file with
BATCH = 64


def load_training_data(
    spec: NetworkSpec, recipe: RunConfig | None, data: str | None, *, alternative: str = ""
) -> tuple[ImageData, int]:
    """Load the data set that a network was trained on.

    Args:
        spec: the description of the network.
        recipe: the settings it was trained with, which name the data set; None if they are not known.
        data: where the data set is now; None if it has not moved.
        alternative: what else the user can pass; ends the messages of errors.

    Returns:
        The data set, and the number of processes that decode its images.

    Raises:
        ValueError: there is no recipe, or the data set cannot be read or is another one.
    """
    if recipe is None:
        raise invalid("run", f"a folder with config.yaml{alternative}", found="one without it")
    settings = recipe.to_dict()
    config = RunConfig.from_dict(settings | ({} if data is None else {"data": data}))
    try:
        found = load_run_data(config.data, config.fission.seed)
    except (OSError, ValueError) as error:
        raise invalid(
            "data",
            "the data set that the network was trained on",
            found=f"{config.data.data} ({error})",
            hint=f"pass --data, where the data set is now{alternative}",
        ) from error
    if found.classes != spec.classes or list(found.shape) != list(spec.shape):
        raise invalid(
            "data",
            f"the data set of {len(spec.classes)} classes and images of shape {tuple(spec.shape)} that the "
            "network was trained on",
            found=f"{config.data.data} with {len(found.classes)} classes and images of shape {found.shape}",
        )
    if data is not None:
        check_run_data(recipe, spec, data)
    if not same_statistics(found, spec):
        raise invalid(
            "data",
            "the data set that the network was trained on",
            found=f"{config.data.data}, whose training images have another mean or standard deviation",
            hint="images have been added or removed",
        )
    return found, config.data.workers


def labelled_batches(split: Split, workers: int, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all of a split, in batches of a size: uint8 `(batch, channels, height, width)`, and labels."""
    if isinstance(split, TensorSplit):
        return zip(split.images.split(size), split.labels.split(size), strict=True)
    return decode_batches(split, size, workers=workers)


def sample_split(split: Split, n: int) -> Tensor:
    """Return at most `n` images, evenly spaced over a split, uint8 `(n, channels, height, width)`.

    Example:
        >>> split = TensorSplit(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1), torch.zeros(5).long())
        >>> sample_split(split, 3).flatten()
        tensor([0, 2, 4], dtype=torch.uint8)
    """
    rows = _even_rows(len(split), n)
    if isinstance(split, TensorSplit):
        return split.images[rows]
    return torch.stack([split[row][0] for row in rows.tolist()])


def sample_folder(classifier: Classifier | Predictor, folder: Path, n: int) -> Tensor:
    """Return at most `n` of the images in a folder and its subfolders, as the classifier's pixels.

    Raises:
        ValueError: there is no image, or one cannot be read.
    """
    paths = find_images(folder).images
    if not paths:
        raise invalid("images", "a folder with images", str(folder))
    return torch.stack([_read(classifier, Path(paths[row])) for row in _even_rows(len(paths), n).tolist()])


def _even_rows(count: int, n: int) -> Tensor:
    """Return at most `n` row numbers, evenly spaced over `count` rows."""
    return torch.linspace(0, count - 1, min(n, count)).long()


def _read(classifier: Classifier | Predictor, path: Path) -> Tensor:
    try:
        with open_image(path) as image:
            return classifier.pixels(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and many more
        found = f"{path} ({why_unreadable(error)})"
        raise invalid("images", "files that can be read", found=found) from error
