"""From image files to what a classifier says of each."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from netfission.classifier import Classifier
from netfission.data.images import why_unreadable
from netfission.data.unlabelled import list_images_and_others

_READERS = 4  # threads; Pillow's decoders let others run


@dataclass(frozen=True)
class ImagePrediction:
    """What is said of one image.

    Attributes:
        image: the file.
        name: of the ensemble's most probable class.
        probability: the ensemble's, of that class, calibrated where the classifier is.
        votes: name of each exit's most probable class, exit 0 first.
        disagreement: share of the pairs of exits with different votes.
        entropy: of the ensemble's probabilities, in nats.
        mutual_information: of class and exit, in nats.
        abstain: whether the ensemble is less sure than the bearable risk asks; None where none was given.
        probabilities: the ensemble's, of every class.
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


@dataclass(frozen=True)
class Failure:
    """Why an image has no answer.

    Attributes:
        image: the file.
        error: the reason, in one line.
    """

    image: Path
    error: str


def find_images(names: Iterable[str]) -> list[Path | Failure]:
    """Files by name, and the images below folders by name, in that order; see `list_images_and_others`.

    Warns of what is left out in folders.
    """
    paths: list[Path | Failure] = []
    for path in map(Path, names):
        if path.is_dir():
            paths += _images_below(path)
        else:
            paths.append(path)
    return paths


def _images_below(folder: Path) -> Sequence[Path | Failure]:
    images, others = list_images_and_others(folder)
    if others:
        warnings.warn(
            f"{folder}: files left out by how their names end: {len(others):,}, such as {others[0].name}; "
            "one that is named itself is tried",
            stacklevel=3,
        )
    return images or [Failure(folder, "is a folder without images")]


def predict_images(
    classifier: Classifier,
    images: Sequence[Path | Failure],
    *,
    batch_size: int = 64,
    risk: float | None = None,
) -> Iterator[ImagePrediction | Failure]:
    """Answer for images, in their order, a batch at a time; the next batch is read meanwhile.

    An answer is the same, within rounding, whatever else is in its batch. An image that cannot be read, or
    has more pixels than Pillow's `Image.MAX_IMAGE_PIXELS`, is a failure, and the others go on. Of several
    frames the first is taken.

    Args:
        classifier: a network; on its device.
        images: files, and failures, which come back as they are.
        batch_size: images that the network is given at once.
        risk: see `Classifier.predict`.

    Raises:
        ValueError: see `Classifier.predict`.
    """
    classifier.threshold(risk)  # a risk that cannot be borne is refused before the work
    chunks = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    with warnings.catch_warnings(), ThreadPoolExecutor(_READERS) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of oddities that do not name the file
        warnings.simplefilter("error", Image.DecompressionBombWarning)

        def reading(chunk: Sequence[Path | Failure]) -> list[Future[tuple[Path, Tensor] | Failure]]:
            return [pool.submit(_read, classifier, image) for image in chunk]

        coming = reading(chunks[0]) if chunks else []
        for chunk in [*chunks[1:], []]:
            now, coming = coming, reading(chunk)
            yield from _answered(classifier, [each.result() for each in now], risk)


def _read(classifier: Classifier, image: Path | Failure) -> tuple[Path, Tensor] | Failure:
    if isinstance(image, Failure):
        return image
    try:
        if image.exists() and not image.is_file():
            return Failure(image, "is no regular file")  # a pipe would be waited for
        with Image.open(image) as opened:
            return image, classifier.pixels(opened)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and many more
        return Failure(image, why_unreadable(error))


def _answered(
    classifier: Classifier, read: Sequence[tuple[Path, Tensor] | Failure], risk: float | None
) -> Iterator[ImagePrediction | Failure]:
    readable = [each for each in read if not isinstance(each, Failure)]
    said = iter(_said(classifier, readable, risk))
    for each in read:
        yield each if isinstance(each, Failure) else next(said)


def _said(
    classifier: Classifier, read: Sequence[tuple[Path, Tensor]], risk: float | None
) -> Iterator[ImagePrediction]:
    if not read:
        return
    names = classifier.spec.classes
    of = classifier.predict(torch.stack([pixels for _, pixels in read]), risk=risk)
    # Each of these is derived from the logits: once a batch, not once an image.
    classes, confidence, votes, probabilities = of.classes, of.confidence, of.votes, of.probabilities
    disagreement, entropy, information, abstains = (
        of.disagreement,
        of.entropy,
        of.mutual_information,
        of.abstains,
    )
    for row, (image, _) in enumerate(read):
        yield ImagePrediction(
            image=image,
            name=names[int(classes[row])],
            probability=confidence[row].item(),
            votes=[names[vote] for vote in votes[row].tolist()],
            disagreement=disagreement[row].item(),
            entropy=entropy[row].item(),
            mutual_information=information[row].item(),
            abstain=None if abstains is None else bool(abstains[row]),
            probabilities=dict(zip(names, probabilities[row].tolist(), strict=True)),
        )
