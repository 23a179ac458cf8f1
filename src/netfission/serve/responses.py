"""What is answered about an image, ready for JSON."""

from collections.abc import Sequence
from typing import Any

from netfission.classifier.predictions import Predictions

TOP = 5

Answer = dict[str, Any]


def answers(predictions: Predictions, names: Sequence[str], top: int = TOP) -> list[Answer]:
    """One answer for each image.

    Args:
        predictions: of n images.
        names: of the classes, in the order of the logits.
        top: how many of the ensemble's classes are listed, the most probable first, where there are as many.

    Returns:
        For each image `class` and `probability` of the ensemble; `probabilities`, a list of the same for the
        classes listed; `exits`, a list with `class` and `probability` of each exit and its `probabilities`
        of the classes listed, in the same order; `disagreement`, `entropy` and `mutual_information`, see
        `Predictions`; and, where there is a threshold, whether the ensemble `abstains`.
    """
    listed = predictions.probabilities.topk(min(top, len(names)))
    of_exits = predictions.exit_probabilities
    surest = of_exits.max(dim=2)
    shared = of_exits.gather(2, listed.indices[:, None].expand(-1, of_exits.shape[1], -1))
    abstains = predictions.abstains
    columns = zip(
        _shares(names, listed.indices.tolist(), listed.values.tolist()),
        _shares(names, surest.indices.tolist(), surest.values.tolist()),
        shared.tolist(),
        predictions.disagreement.tolist(),
        predictions.entropy.tolist(),
        predictions.mutual_information.tolist(),
        [None] * len(predictions) if abstains is None else abstains.tolist(),
        strict=True,
    )
    return [
        {
            **classes[0],
            "probabilities": classes,
            "exits": [own | {"probabilities": row} for own, row in zip(exits, rows, strict=True)],
            "disagreement": disagreement,
            "entropy": entropy,
            "mutual_information": mutual_information,
        }
        | ({} if abstained is None else {"abstains": abstained})
        for classes, exits, rows, disagreement, entropy, mutual_information, abstained in columns
    ]


def _shares(
    names: Sequence[str], indices: Sequence[Sequence[int]], values: Sequence[Sequence[float]]
) -> list[list[Answer]]:
    return [
        [{"class": names[i], "probability": p} for i, p in zip(own, shares, strict=True)]
        for own, shares in zip(indices, values, strict=True)
    ]
