"""Predictions of a classifier for image files."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from netfission.classifier import AnswerLimits, Classifier
from netfission.classifier.image_network import ImageNetwork
from netfission.data import files
from netfission.data.formats import open_image
from netfission.data.images import upright_size, why_unreadable
from netfission.utils.text import printable

T = TypeVar("T")
_READERS = 4  # threads; Pillow's decoders let others run


@dataclass(frozen=True)
class ImagePrediction:
    """The prediction for one image; see `netfission.Predictions`.

    Attributes:
        image: the file.
        name: name of the ensemble's most probable class.
        probability: the ensemble's probability of that class, calibrated if the classifier is.
        votes: name of each exit's most probable class, exit 0 first.
        disagreement: share of the pairs of exits with different votes, in [0, 1].
        entropy: entropy of the ensemble's probabilities, in nats.
        mutual_information: mutual information of class and exit, in nats.
        abstain: whether the ensemble abstains to keep to the accepted risk; None without a risk.
        probabilities: the ensemble's probability of every class, by name.
        classes: names of the classes in the prediction set; empty without a coverage.
        p_value: of coming from the distribution of the images of the calibration; None without them.
        out_of_distribution: whether it is marked as not coming from it; None without an accepted rate of
            false alarms.

    Example:
        >>> prediction = ImagePrediction(
        ...     Path("a.png"), "cat", 0.75, ["cat", "dog"], 1.0, 0.56, 0.13, None, {"cat": 0.75, "dog": 0.25}
        ... )
        >>> prediction.name, prediction.probabilities["dog"]
        ('cat', 0.25)
    """

    image: Path
    name: str
    probability: float
    votes: list[str]
    disagreement: float
    entropy: float
    mutual_information: float
    abstain: bool | None
    probabilities: dict[str, float]
    classes: list[str] = field(default_factory=list)
    p_value: float | None = None
    out_of_distribution: bool | None = None


class ReadImage(NamedTuple):
    """An image that was read.

    Attributes:
        image: the file.
        pixels: of the network, uint8 `(channels, height, width)`.
        size: height and width of the image in the file, turned upright.
    """

    image: Path
    pixels: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class Failure:
    """The reason why an image has no prediction.

    Attributes:
        image: the file.
        error: the reason, in one line.

    Example:
        >>> Failure(Path("a.png"), "no such file or directory").error
        'no such file or directory'
    """

    image: Path
    error: str


def find_images(names: Iterable[str]) -> list[Path | Failure]:
    """List files as they are named, and of each folder the images below it, in the order of the names.

    Args:
        names: names of files and folders.

    Returns:
        The files; a folder without images becomes a failure. Files need not exist.

    Warns:
        UserWarning: files of a folder are left out, as their names do not end as an image's.

    Example:
        >>> find_images(["a.png", "b.jpg"]) == [Path("a.png"), Path("b.jpg")]
        True
    """
    paths: list[Path | Failure] = []
    for name in names:
        if os.path.isdir(name):  # noqa: PTH112 - Path.is_dir raises if the name is too long
            paths += _images_below(Path(name))
        else:
            paths.append(Path(name))
    return paths


def _images_below(folder: Path) -> Sequence[Path | Failure]:
    found = files.find_images(folder)
    left_out = dict(found.left_out)
    missing = left_out.pop("missing", [])  # named as an image: it gets a line of its own
    left_out.pop("hidden", None)
    if left_out:
        reasons = "; ".join(
            f"{len(paths):,} {reason}, such as {printable(Path(paths[0]).name)}"
            for reason, paths in left_out.items()
        )
        hint = "name a file itself to have it tried"
        warnings.warn(f"{folder}: left out: {reasons}; {hint}", stacklevel=3)
    return sorted(map(Path, [*found.images, *missing])) or [Failure(folder, "the folder holds no images")]


def predict_images(
    classifier: Classifier,
    images: Sequence[Path | Failure],
    *,
    batch_size: int = 64,
    limits: AnswerLimits | None = None,
) -> Iterator[ImagePrediction | Failure]:
    """Predict images in their order, batch by batch, while the next batch is read.

    A prediction does not depend, beyond rounding, on the other images of its batch. An image that cannot be
    read, or has more pixels than Pillow's `Image.MAX_IMAGE_PIXELS`, yields a failure. Of an image with
    several frames the first is predicted.

    Args:
        classifier: runs on the device that it is on.
        images: files, and failures, which are yielded as they are.
        batch_size: number of images per batch.
        limits: accepted risk and coverage, see `Classifier.limits`. Default: none.

    Example:
        >>> import tempfile
        >>> import netfission as nf
        >>> from netfission.models import create_model
        >>> net = nf.fission(create_model("wrn-10-1", 2), exits=2, example_input=torch.zeros(1, 3, 8, 8))
        >>> classifier = nf.Classifier.from_network(
        ...     net, model="wrn-10-1", classes=["cat", "dog"], shape=(3, 8, 8), mean=[0.5] * 3, std=[0.2] * 3
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (20, 30)).save(Path(folder, "black.png"))
        ...     images = [Path(folder, "black.png"), Path(folder, "missing.png")]
        ...     prediction, failure = predict_images(classifier, images)
        >>> prediction.name in ("cat", "dog"), len(prediction.votes), failure.error
        (True, 2, 'no such file or directory')
    """
    chosen = limits or AnswerLimits()
    yield from in_batches(
        classifier, images, batch_size, lambda read: _predict_pixels(classifier, read, chosen)
    )


def in_batches(
    network: ImageNetwork,
    images: Sequence[Path | Failure],
    batch_size: int,
    predict: Callable[[Sequence[ReadImage]], Iterable[T]],
) -> Iterator[T | Failure]:
    """Predict images in their order, batch by batch, while the next batch is read; see `predict_images`.

    Args:
        network: prepares the images.
        images: files, and failures, which are yielded as they are.
        batch_size: number of images per batch.
        predict: images that were read → a prediction of each.
    """
    chunks = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    with warnings.catch_warnings(), ThreadPoolExecutor(_READERS) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of oddities that do not name the file
        warnings.simplefilter("error", Image.DecompressionBombWarning)

        def start_reading(chunk: Sequence[Path | Failure]) -> list[Future[ReadImage | Failure]]:
            return [pool.submit(read_image, image, network.pixels) for image in chunk]

        upcoming = start_reading(chunks[0]) if chunks else []
        for chunk in [*chunks[1:], []]:
            current, upcoming = upcoming, start_reading(chunk)
            yield from _predict([future.result() for future in current], predict)


def read_image(image: Path | Failure, to_pixels: Callable[[Image.Image], Tensor]) -> ReadImage | Failure:
    """Read an image file, or return why it cannot be read.

    Args:
        image: the file, or a failure, which is returned as it is.
        to_pixels: an opened image → its pixels.

    Example:
        >>> from netfission.data.images import to_pixels
        >>> read_image(Path("missing.png"), lambda image: to_pixels(image, "RGB", (8, 8))).error
        'no such file or directory'
    """
    if isinstance(image, Failure):
        return image
    try:
        if image.exists() and not image.is_file():
            return Failure(image, "not a regular file")  # opening a pipe would wait
        with open_image(image) as opened:
            return ReadImage(image, to_pixels(opened), upright_size(opened))
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and many more
        return Failure(image, why_unreadable(error))


def _predict(
    read: Sequence[ReadImage | Failure],
    predict: Callable[[Sequence[ReadImage]], Iterable[T]],
) -> Iterator[T | Failure]:
    readable = [entry for entry in read if not isinstance(entry, Failure)]
    predictions = iter(predict(readable))
    for entry in read:
        yield entry if isinstance(entry, Failure) else next(predictions)


def _predict_pixels(
    classifier: Classifier, read: Sequence[ReadImage], limits: AnswerLimits
) -> Iterator[ImagePrediction]:
    if not read:
        return
    names = classifier.spec.classes
    predictions = classifier.predict_within(torch.stack([one.pixels for one in read]), limits)
    # Each property is computed from the logits: once per batch, not once per image.
    classes, confidence = predictions.classes, predictions.confidence
    votes, probabilities = predictions.votes, predictions.probabilities
    disagreement, entropy = predictions.disagreement, predictions.entropy
    information, abstains = predictions.mutual_information, predictions.abstains
    sets = None if predictions.sets is None else predictions.sets.tolist()
    p_values, marked = predictions.p_values, predictions.out_of_distribution
    for row, one in enumerate(read):
        yield ImagePrediction(
            image=one.image,
            name=names[int(classes[row])],
            probability=confidence[row].item(),
            votes=[names[vote] for vote in votes[row].tolist()],
            disagreement=disagreement[row].item(),
            entropy=entropy[row].item(),
            mutual_information=information[row].item(),
            abstain=None if abstains is None else bool(abstains[row]),
            probabilities=dict(zip(names, probabilities[row].tolist(), strict=True)),
            classes=[] if sets is None else list(compress(names, sets[row])),
            p_value=None if p_values is None else p_values[row].item(),
            out_of_distribution=None if marked is None else bool(marked[row]),
        )
