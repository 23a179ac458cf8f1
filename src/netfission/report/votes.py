"""The images on which a network's exits differ most, with each exit's vote."""

import base64
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

LOOKED_AT = 1000  # test images at most
SHOWN = 6  # of either kind
_BATCH = 100
_SIDE = 112  # pixels, of an image on the page at most


@dataclass(frozen=True)
class Vote:
    """What one exit says.

    Attributes:
        name: of the class.
        probability: that it gives that class.
        right: whether it is the label.
    """

    name: str
    probability: float
    right: bool


@dataclass(frozen=True)
class Example:
    """An image and what is said about it.

    Attributes:
        image: as a PNG in a `data:` address.
        side: its greater side in pixels.
        label: name of its class.
        ensemble: the ensemble's vote.
        exits: each exit's, exit 0 first.
    """

    image: str
    side: int
    label: str
    ensemble: Vote
    exits: list[Vote]


@dataclass(frozen=True)
class Votes:
    """How far exits agree on test images.

    Attributes:
        n: images looked at.
        of: images of the test split.
        agreed: how many all exits agree on.
        right_agreed: how many of those the ensemble is right about.
        right_differed: how many of the others.
        right: examples that exits differ on and the ensemble is right about, those of most doubt first.
        wrong: the same where it is wrong.
    """

    n: int
    of: int
    agreed: int
    right_agreed: int
    right_differed: int
    right: list[Example]
    wrong: list[Example]


def collect_votes(classifier: Classifier, data: ImageData) -> Votes:
    """Ask a network about test images, evenly spaced over the split; see `Votes`.

    Images are ordered by the share of pairs of exits that differ, and where that is equal by the mutual
    information of class and exit.

    Args:
        classifier: with several exits.
        data: with the classes that it knows.

    Raises:
        ValueError: an image cannot be read.
    """
    count = min(len(data.test), LOOKED_AT)
    rows = torch.arange(count) * len(data.test) // count
    batches = tqdm(rows.split(_BATCH), desc="votes", disable=None, leave=False)
    logits = torch.cat([classifier.logits(_pixels(data.test, batch)) for batch in batches])
    said = Predictions(logits / classifier.temperature)
    labels = data.test.labels[rows]
    differed, right = said.disagreement > 0, said.classes == labels
    order = (said.disagreement.double() * 1e3 + said.mutual_information).argsort(descending=True, stable=True)

    def examples(chosen: Tensor) -> list[Example]:
        own = order[chosen[order]][:SHOWN]
        return [
            _example(_pixels(data.test, rows[[index]])[0], said, index, int(labels[index]), data.classes)
            for index in own.tolist()
        ]

    return Votes(
        n=count,
        of=len(data.test),
        agreed=int((~differed).sum()),
        right_agreed=int((~differed & right).sum()),
        right_differed=int((differed & right).sum()),
        right=examples(differed & right),
        wrong=examples(differed & ~right),
    )


def _pixels(split: Split, rows: Tensor) -> Tensor:
    if isinstance(split, TensorSplit):
        return split.images[rows]
    return torch.stack([split[int(row)][0] for row in rows])


def _example(image: Tensor, said: Predictions, index: int, label: int, classes: Sequence[str]) -> Example:
    def vote(probabilities: Tensor) -> Vote:
        probability, answer = probabilities.max(dim=0)
        return Vote(classes[int(answer)], probability.item(), int(answer) == label)

    return Example(
        image=_png(image),
        side=max(image.shape[1:]),
        label=classes[label],
        ensemble=vote(said.probabilities[index]),
        exits=[vote(own) for own in said.exit_probabilities[index]],
    )


def _png(image: Tensor) -> str:
    """Pixels, uint8 `(channels, height, width)`, as a `data:` address of a small PNG."""
    picture = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)  # never enlarges
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
