"""Predictions as JSON."""

from collections.abc import Sequence
from typing import Any

from netfission.classifier.predictions import Predictions

TOP = 5

Answer = dict[str, Any]


def json_answers(predictions: Predictions, names: Sequence[str], top: int = TOP) -> list[Answer]:
    """Return one answer per image, of types that JSON has.

    Args:
        predictions: of n images.
        names: of the classes, in the order of the logits.
        top: number of classes to list, those that the ensemble finds most probable; all if there are fewer.

    Returns:
        n dictionaries. `class` and `probability` are the ensemble's prediction. `probabilities` lists the
        same for the top classes. `exits` lists `class` and `probability` of each exit, and its
        `probabilities` of the top classes in the same order. `disagreement`, `entropy` and
        `mutual_information` are those of `Predictions`. `abstains` is there if the predictions have a
        threshold.

    Example:
        >>> import torch
        >>> predictions = Predictions(torch.tensor([[[2.0, 0.0], [1.0, 0.0]]]), average="logits")
        >>> (answer,) = json_answers(predictions, ["cat", "dog"])
        >>> answer["class"], [vote["class"] for vote in answer["exits"]]
        ('cat', ['cat', 'cat'])
    """
    listed = predictions.probabilities.topk(min(top, len(names)))
    exit_probabilities = predictions.exit_probabilities
    votes = exit_probabilities.max(dim=2)
    of_listed = exit_probabilities.gather(
        2, listed.indices[:, None].expand(-1, exit_probabilities.shape[1], -1)
    )
    abstains = predictions.abstains
    columns = zip(
        _with_names(names, listed.indices.tolist(), listed.values.tolist()),
        _with_names(names, votes.indices.tolist(), votes.values.tolist()),
        of_listed.tolist(),
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
            "exits": [vote | {"probabilities": row} for vote, row in zip(exits, rows, strict=True)],
            "disagreement": disagreement,
            "entropy": entropy,
            "mutual_information": mutual_information,
        }
        | ({} if abstained is None else {"abstains": abstained})
        for classes, exits, rows, disagreement, entropy, mutual_information, abstained in columns
    ]


def _with_names(
    names: Sequence[str], indices: Sequence[Sequence[int]], probabilities: Sequence[Sequence[float]]
) -> list[list[Answer]]:
    """Return classes and their probabilities, both `(n, k)`, as dictionaries with the classes' names."""
    return [
        [
            {"class": names[index], "probability": probability}
            for index, probability in zip(index_row, probability_row, strict=True)
        ]
        for index_row, probability_row in zip(indices, probabilities, strict=True)
    ]
