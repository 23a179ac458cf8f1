"""What a report shows of several labels per image."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from netfission.tasks.figures import (
    PALE,
    Bars,
    ConfidenceBins,
    Example,
    InspectedImages,
    Inspection,
    Panel,
    Reliability,
    Table,
    lowest,
    picture,
)
from netfission.utils.text import percent

_EXAMPLES = 6


def precision_bars(by_target: Mapping[str, Mapping[str, float]], n: int) -> Bars:
    """Return a bar for the average precision of each label."""
    values, which = lowest({name: measures.get("map") for name, measures in by_target.items()})
    return Bars(
        "average-precision",
        "Average precision of each label",
        f"On {n:,} test images: the area under the precision–recall curve; a dash for a "
        f"label that no test image has.{which}",
        values,
        "average precision, %",
    )


def inspect_labels(
    images: InspectedImages,
    names: Sequence[str],
    thresholds: Sequence[float],
    probabilities: Mapping[str, Tensor],
    truth: Tensor,
) -> Inspection:
    """Return precision and recall per label, the reliability, and the images with the most wrong labels.

    Args:
        images: of the test split.
        names: of the labels.
        thresholds: of the labels.
        probabilities: name of a figure → the ensemble's `(n, labels)`; the last ones are those of answers.
        truth: `(n, labels)`, 0 or 1.
    """
    *_, answered = probabilities.values()
    predicted = answered >= torch.tensor(thresholds, dtype=torch.float64)
    present = truth > 0
    return Inspection(
        [_reliability(name, found, present) for name, found in probabilities.items()],
        [_table(names, thresholds, predicted, present)],
        _examples(images, names, predicted, present, answered),
        f"The test images with the most wrong labels, of {len(truth):,}; of equal ones, those with the least "
        "probability of all their labels.",
    )


def _reliability(name: str, probabilities: Tensor, present: Tensor) -> Reliability:
    bins = ConfidenceBins()
    bins.add(probabilities, present)
    n, labels = present.shape
    return Reliability(
        name,
        "Reliability before scaling" if name == "reliability" else "Reliability after scaling",
        "Bars that end on the dashed line are calibrated: of the labels with a probability of 80 %, 80 % are "
        f"there. Over all {labels:,} labels of {n:,} test images. {PALE}",
        bins.result(),
        "probability of a label, %",
        "labels that are there, %",
        "labels, %",
    )


def _table(names: Sequence[str], thresholds: Sequence[float], predicted: Tensor, present: Tensor) -> Table:
    rows = []
    for label, (name, threshold) in enumerate(zip(names, thresholds, strict=True)):
        answers, truth = predicted[:, label], present[:, label]
        right, given, there = (int(part.sum()) for part in (answers & truth, answers, truth))
        precision = f"{percent(right / given, 1)} %" if given else "–"
        recall = f"{percent(right / there, 1)} %" if there else "–"
        rows.append([name, f"{there:,}", f"{given:,}", f"{percent(threshold, 1)} %", precision, recall])
    return Table(
        "Answers by label",
        f"Of {len(present):,} test images. Predicted: the probability reaches the threshold. Precision: "
        "share of the predicted ones that have the label. Recall: share of those with the label that are "
        "predicted.",
        ["label", "images with it", "predicted", "threshold", "precision", "recall"],
        rows,
    )


def _examples(
    images: InspectedImages, names: Sequence[str], predicted: Tensor, present: Tensor, probabilities: Tensor
) -> list[Example]:
    wrong = (predicted != present).sum(dim=1)
    likelihood = torch.where(present, probabilities, 1 - probabilities).clamp(min=1e-12).log().sum(dim=1)
    order = sorted(range(len(wrong)), key=lambda row: (-int(wrong[row]), float(likelihood[row])))
    examples = []
    for row in order[:_EXAMPLES]:
        if not wrong[row]:
            break
        pixels, _, _ = images.one(row)
        true, answered = present[row], predicted[row]
        parts = {"missed": true & ~answered, "falsely predicted": answered & ~true}
        lines = [f"{title}: {_named(names, chosen)}" for title, chosen in parts.items() if chosen.any()]
        right = _named(names, true & answered)
        examples.append(
            Example(
                f"{int(wrong[row])} wrong",
                [*lines, f"right: {right or 'none'}"],
                [Panel("", picture(pixels[0]))],
            )
        )
    return examples


def _named(names: Sequence[str], chosen: Tensor) -> str:
    return ", ".join(name for name, is_chosen in zip(names, chosen.tolist(), strict=True) if is_chosen)
