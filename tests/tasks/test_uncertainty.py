"""How uncertain networks of labels, numbers and pixels are about images of another kind."""

import json
import shutil

import pytest
import torch

from netfission.cli import main
from netfission.evaluation.out_of_distribution import OutOfDistribution
from netfission.runs.folder import RunFolder
from netfission.runs.shift import evaluate_ood
from netfission.tasks import find_task

SHAPES = {"multilabel": (2,), "regression": (4,), "segmentation": (2, 5, 6)}
SCORES = {
    "multilabel": ["entropy", "mutual information"],
    "regression": ["standard deviation", "disagreement"],
    "segmentation": ["maximum probability", "entropy", "mutual information"],
}


@pytest.mark.parametrize("task", SHAPES)
def test_scores_are_higher_where_exits_are_unsure_or_disagree(task):
    learned = find_task(task, ["a", "b"], {"mean": [0.0, 5.0], "std": [1.0, 100.0]})
    sure = torch.zeros(3, 2, *SHAPES[task])
    if task == "regression":
        sure[:, :, 2:] = -5.0  # logarithms of variances
    else:
        sure[:, :, 0] = 8.0
        sure[:, :, 1] = -8.0
    unsure, differing = torch.zeros_like(sure), sure.clone()
    differing[:, 1, :2] *= -1
    differing[:, 1, :2] += 3.0 * (task == "regression")
    found = [learned.uncertainty_scores(outputs, average="logits") for outputs in (sure, unsure, differing)]
    assert [list(scores) for scores in found] == 3 * [SCORES[task]]
    assert all(values.shape == (3,) and values.dtype == torch.float64 for values in found[0].values())
    total, *_, of_disagreement = SCORES[task]
    assert (found[1][total] > found[0][total] + 0.1).all()
    assert (found[2][of_disagreement] > found[0][of_disagreement] + 0.1).all()
    assert (found[1][of_disagreement] < 1e-6).all()
    of_one = learned.uncertainty_scores(unsure[:, :1], average="logits")
    assert list(of_one) == SCORES[task][:-1]


def test_a_number_of_large_units_does_not_outweigh_others():
    learned = find_task("regression", ["a", "b"], {"mean": [0.0, 5.0], "std": [1.0, 100.0]})
    outputs = torch.zeros(2, 1, 4)
    outputs[0, 0, 2], outputs[1, 0, 3] = 2.0, 2.0  # the first is unsure of a, the second of b
    (scores,) = learned.uncertainty_scores(outputs, average="logits").values()
    assert scores[0].item() == pytest.approx(scores[1].item())


@pytest.mark.parametrize("task", SHAPES)
def test_images_of_another_kind_are_told_from_test_images(run_of, tmp_path, capsys, task, monkeypatch):
    run = shutil.copytree(run_of(task), tmp_path / "run")
    assert main(["evaluate", str(run), "--ood", "inverted", "digits"]) == 0
    shown = capsys.readouterr().out
    found = RunFolder(run).load_out_of_distribution()
    assert [one.data for one in found] == ["inverted", "digits"]
    assert all(list(one.scores) == SCORES[task] and one.in_distribution == 20 for one in found)
    assert found[0].out_of_distribution == 20 and found[1].out_of_distribution > 20
    assert all(name in shown for name in SCORES[task])
    monkeypatch.setattr("netfission.runs.shift.EVALUATION_BATCH", 3)
    assert main(["evaluate", str(run), "--ood", "inverted"]) == 0
    again = json.loads((run / "ood.json").read_text("utf-8"))[0]["scores"]
    for name, detection in found[0].scores.items():
        assert again[name]["auroc"] == pytest.approx(detection.auroc, abs=0.01)


def test_each_score_is_compared_with_the_same_one():
    test = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([0.0, 1.0])}
    other = {"a": torch.tensor([2.0, 3.0, 4.0]), "b": torch.tensor([-1.0, -2.0, -3.0])}
    found = OutOfDistribution.from_scores("other", test, other, 1.0)
    assert (found.scores["a"].auroc, found.scores["b"].auroc) == (1.0, 0.0)
    assert (found.in_distribution, found.out_of_distribution) == (2, 3)


def test_photographs_of_the_run_are_not_passed_off_as_others(run_of, tables, tmp_path):
    run = shutil.copytree(run_of("segmentation"), tmp_path / "run")
    own = sorted((tables / "masks" / "test" / "images").iterdir())[:2]
    for photograph in own:
        shutil.copy(photograph, tmp_path)
    with pytest.warns(UserWarning, match="2 of 2 images of .* same content as images of the run's own data"):
        evaluate_ood(RunFolder(run), RunFolder(run).load_config(), [str(tmp_path)])
