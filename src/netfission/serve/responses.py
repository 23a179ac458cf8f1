"""Predictions as JSON."""

from collections.abc import Sequence
from itertools import compress
from typing import Any

from netfission.classifier.predictions import AnswerLimits, Predictions
from netfission.serve.answerer import Answer

TOP = 5


def json_answers(
    predictions: Predictions, names: Sequence[str], top: int = TOP, *, limits: AnswerLimits | None = None
) -> list[Answer]:
    """Return one answer per image, of types that JSON has.

    Args:
        predictions: of n images.
        names: of the classes, in the order of the logits.
        top: number of classes to list, those that the ensemble finds most probable; all if there are fewer.
        limits: that the predictions keep to; default none.

    Returns:
        n dictionaries. `class` and `probability` are the ensemble's prediction. `probabilities` lists the
        same for the top classes. `exits` lists `class` and `probability` of each exit, and its
        `probabilities` of the top classes in the same order. `disagreement`, `entropy` and
        `mutual_information` are those of `Predictions`. What the limits ask for has the names that it has
        in `netfission predict`: `abstain`, `set`, `p_value`, `out_of_distribution`, and what they rest on.

    Example:
        >>> import torch
        >>> predictions = Predictions(torch.tensor([[[2.0, 0.0], [1.0, 0.0]]]), average="logits")
        >>> (answer,) = json_answers(predictions, ["cat", "dog"])
        >>> answer["class"], [vote["class"] for vote in answer["exits"]]
        ('cat', ['cat', 'cat'])
    """
    limits = limits or AnswerLimits()
    listed = predictions.probabilities.topk(min(top, len(names)))
    exit_probabilities = predictions.exit_probabilities
    votes = exit_probabilities.max(dim=2)
    of_listed = exit_probabilities.gather(
        2, listed.indices[:, None].expand(-1, exit_probabilities.shape[1], -1)
    )
    columns = zip(
        predictions.classes.tolist(),
        predictions.confidence.tolist(),
        _with_names(names, listed.indices.tolist(), listed.values.tolist()),
        _with_names(names, votes.indices.tolist(), votes.values.tolist()),
        of_listed.tolist(),
        predictions.disagreement.tolist(),
        predictions.entropy.tolist(),
        predictions.mutual_information.tolist(),
        _promised(predictions, names, limits),
        strict=True,
    )
    return [
        {
            "class": names[answer],
            "probability": confidence,
            "probabilities": classes,
            "exits": [vote | {"probabilities": row} for vote, row in zip(exits, rows, strict=True)],
            "disagreement": disagreement,
            "entropy": entropy,
            "mutual_information": mutual_information,
            **promised,
        }
        for (
            answer,
            confidence,
            classes,
            exits,
            rows,
            disagreement,
            entropy,
            mutual_information,
            promised,
        ) in columns
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


def _promised(predictions: Predictions, names: Sequence[str], limits: AnswerLimits) -> list[Answer]:
    """Return what each answer says of sets, bounds and marks; the images have the keys in common."""
    columns: dict[str, list[Any]] = {}
    shared: Answer = {}
    if predictions.abstains is not None:
        columns["abstain"] = predictions.abstains.tolist()
    if limits.delta is not None:
        shared |= {"risk": limits.risk, "delta": limits.delta}
    if predictions.sets is not None:
        columns["set"] = [list(compress(names, row)) for row in predictions.sets.tolist()]
        shared |= {"coverage": limits.coverage, "score": limits.score, "class_wise": limits.class_wise}
    if predictions.p_values is not None and limits.detector is not None:
        columns["p_value"] = predictions.p_values.tolist()
        shared["detector"] = limits.detector.score
    if predictions.out_of_distribution is not None:
        columns["out_of_distribution"] = predictions.out_of_distribution.tolist()
        shared["accept_false_alarms"] = limits.accept_false_alarms
    return [
        {name: values[row] for name, values in columns.items()} | shared for row in range(len(predictions))
    ]
