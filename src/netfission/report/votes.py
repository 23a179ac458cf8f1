"""Collect the images on which a network's exits disagree most, with each exit's vote."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from netfission.classifier import Classifier
from netfission.classifier.predictions import Predictions
from netfission.data import ImageData, Split, TensorSplit
from netfission.utils.png import png_address

MAX_IMAGES = 1000  # test images that the exits vote on
MAX_EXAMPLES = 6  # of correct predictions, and of wrong ones
_BATCH = 100
_MAX_SIDE = 112  # of an image on the page, in pixels


@dataclass(frozen=True)
class Vote:
    """The prediction of one exit for one image.

    Attributes:
        name: of the predicted class.
        probability: of that class.
        right: whether the class is the label.
    """

    name: str
    probability: float
    right: bool


@dataclass(frozen=True)
class Example:
    """An image with the votes for it.

    Attributes:
        image: PNG in a `data:` address.
        side: longer side of the original in pixels.
        label: name of the class.
        ensemble: prediction of the ensemble.
        exits: vote of each exit, exit 0 first.
    """

    image: str
    side: int
    label: str
    ensemble: Vote
    exits: list[Vote]


@dataclass(frozen=True)
class Votes:
    """Agreement of the exits on test images.

    Attributes:
        n: number of images that the exits voted on.
        total: number of images of the test split.
        agreed: number of images on which all exits agree.
        right_agreed: number of those that the ensemble classifies correctly.
        right_disagreed: number of the other images that the ensemble classifies correctly.
        right: images on which the exits disagree and the ensemble is correct, most uncertain first.
        wrong: the same for a wrong ensemble.
    """

    n: int
    total: int
    agreed: int
    right_agreed: int
    right_disagreed: int
    right: list[Example]
    wrong: list[Example]


def collect_votes(classifier: Classifier, data: ImageData) -> Votes:
    """Classify test images, evenly spaced over the split, and compare the exits.

    Images are ordered by the share of pairs of exits that disagree, then by the mutual information of class
    and exit.

    Args:
        classifier: with several exits.
        data: data set with the classifier's classes.

    Raises:
        ValueError: an image cannot be read.
    """
    count = min(len(data.test), MAX_IMAGES)
    rows = torch.arange(count) * len(data.test) // count
    batches = tqdm(rows.split(_BATCH), desc="votes", disable=None, leave=False)
    logits = torch.cat([classifier.logits(_pixels(data.test, batch)) for batch in batches])
    predictions = Predictions(logits / classifier.temperature, average=classifier.spec.average)
    labels = data.test.labels[rows]
    disagreed, right = predictions.disagreement > 0, predictions.classes == labels
    uncertainty = predictions.disagreement.double() * 1e3 + predictions.mutual_information
    order = uncertainty.argsort(descending=True, stable=True)

    def examples(chosen: Tensor) -> list[Example]:
        first = order[chosen[order]][:MAX_EXAMPLES]
        return [
            _example(
                _pixels(data.test, rows[[index]])[0], predictions, index, int(labels[index]), data.classes
            )
            for index in first.tolist()
        ]

    return Votes(
        n=count,
        total=len(data.test),
        agreed=int((~disagreed).sum()),
        right_agreed=int((~disagreed & right).sum()),
        right_disagreed=int((disagreed & right).sum()),
        right=examples(disagreed & right),
        wrong=examples(disagreed & ~right),
    )


def _pixels(split: Split, rows: Tensor) -> Tensor:
    if isinstance(split, TensorSplit):
        return split.images[rows]
    return torch.stack([split[int(row)][0] for row in rows])


def _example(
    image: Tensor, predictions: Predictions, index: int, label: int, classes: Sequence[str]
) -> Example:
    def vote(probabilities: Tensor) -> Vote:
        probability, predicted = probabilities.max(dim=0)
        return Vote(classes[int(predicted)], probability.item(), int(predicted) == label)

    return Example(
        image=_png(image),
        side=max(image.shape[1:]),
        label=classes[label],
        ensemble=vote(predictions.probabilities[index]),
        exits=[vote(probabilities) for probabilities in predictions.exit_probabilities[index]],
    )


def _png(image: Tensor) -> str:
    """Return pixels, uint8 `(channels, height, width)`, as the `data:` address of a small PNG."""
    picture = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
    picture.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)  # never enlarges
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return png_address(file.getvalue())
