import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_calibration_error,
    multiclass_jaccard_index,
)

from netfission.evaluation.metrics import classification_metrics
from netfission.evaluation.pixels import PixelScores
from netfission.evaluation.selective import RiskCoverage

CLASSES, VOID = 4, 9


def maps(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES - 1, (6, 9, 7), generator=generator)  # the last class never occurs
    logits = torch.randn(6, CLASSES, 9, 7, generator=generator)
    logits += 2 * torch.nn.functional.one_hot(labels, CLASSES).movedim(-1, 1)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = VOID
    return logits.log_softmax(dim=1), labels


def scores(log_probabilities: Tensor, labels: Tensor, batch: int) -> PixelScores:
    found = PixelScores(CLASSES, ignore_index=VOID)
    for part in zip(log_probabilities.split(batch), labels.split(batch), strict=True):
        found.add(*part)
    return found


def test_measures_equal_those_of_all_pixels_at_once() -> None:
    log_probabilities, labels = maps()
    found = scores(log_probabilities, labels, batch=2)
    result = found.result()
    counts = labels.flatten() != VOID
    rows = log_probabilities.movedim(1, -1).reshape(-1, CLASSES)[counts]
    flat = labels.flatten()[counts]
    expected = classification_metrics(rows, flat)
    assert found.pixels == len(flat)
    for name, other in (("pixel_accuracy", "top1"), ("nll", "nll"), ("brier", "brier")):
        assert result[name] == pytest.approx(expected[other], rel=1e-5)
    ece = multiclass_calibration_error(rows.exp(), flat, CLASSES, n_bins=15)
    assert result["ece"] == pytest.approx(ece.item(), abs=1e-5)
    iou = multiclass_jaccard_index(log_probabilities.exp(), labels, CLASSES, average=None, ignore_index=VOID)
    torch.testing.assert_close(found.class_iou().float(), iou)
    assert result["mean_iou"] == pytest.approx(iou.mean().item())
    confidence, answers = rows.max(dim=1)
    auroc = binary_auroc(-confidence, (answers != flat).int())
    assert result["error_auroc"] == pytest.approx(auroc.item(), abs=2e-3)
    selective = (answers != flat)[confidence.argsort(descending=True)].double().cumsum(0)
    aurc = (selective / torch.arange(1, len(flat) + 1)).mean().item()
    assert result["aurc"] == pytest.approx(aurc, abs=2e-3)


@pytest.mark.parametrize("wrong", [[True] + [False] * 1000, [False, True] * 20])
def test_pixels_of_one_confidence_count_as_their_mean(wrong: list[bool]) -> None:
    """As in the risk–coverage curve of images."""
    labels = torch.tensor(wrong).long().view(1, 1, -1)
    first = torch.full((len(wrong),), 0.8)
    first[0] = 0.9
    found = PixelScores(2)
    found.add(torch.stack([first, 1 - first]).log().view(1, 2, 1, -1), labels)
    curve = RiskCoverage.from_confidence(first, labels.flatten() == 0)
    assert found.result()["aurc"] == pytest.approx(curve.area, rel=1e-9)


def test_batches_do_not_matter() -> None:
    results = [scores(*maps(), batch=batch).result() for batch in (1, 6)]
    assert results[0] == pytest.approx(results[1])


def test_a_class_that_is_nowhere_counts_not() -> None:
    found = PixelScores(3)
    found.add(torch.tensor([[[[1.0, 0.9]], [[0.0, 0.1]], [[0.0, 0.0]]]]).log(), torch.zeros(1, 1, 2).long())
    assert found.class_iou().isnan().tolist() == [False, True, True]
    assert found.result()["mean_iou"] == 1


@pytest.mark.parametrize(
    ("log_probabilities", "labels", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(1).long(), "log_probabilities must be floats of shape"),
        (torch.zeros(1, 5, 2, 2), torch.zeros(1, 2, 2).long(), "log_probabilities must be of 4 classes"),
        (torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 3).long(), r"labels must be int64 of shape \(1, 2, 2\)"),
        (
            torch.full((1, 4, 2, 2), 0.25).log(),
            torch.full((1, 2, 2), 4),
            r"labels must be class numbers from 0 to 3, got 4 \(4 pixels out of range\)",
        ),
        (
            torch.zeros(1, 4, 2, 2),
            torch.zeros(1, 2, 2).long(),
            "must be the output of log_softmax in float32 or wider, got probabilities that sum to 4$",
        ),
        (
            torch.full((1, 4, 2, 2), torch.nan),
            torch.zeros(1, 2, 2).long(),
            "got probabilities that sum to nan$",
        ),
        (
            torch.tensor([2.5, 1.5, 2.0, 2.5]).view(1, 4, 1, 1).bfloat16().log_softmax(dim=1),
            torch.zeros(1, 1, 1).long(),
            r"in float32 or wider, got probabilities that sum to 0\.9963$",
        ),
    ],
)
def test_bad_maps_are_refused(log_probabilities: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelScores(CLASSES, VOID).add(log_probabilities, labels)


def test_void_alone_cannot_be_measured() -> None:
    found = PixelScores(CLASSES, VOID)
    found.add(torch.full((1, 4, 2, 2), 0.25).log(), torch.full((1, 2, 2), VOID))
    with pytest.raises(ValueError, match="masks must be of at least one pixel that is not void, got none"):
        found.result()
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        PixelScores(1)
