import pytest
import torch

from netfission.classifier.predictions import Predictions
from netfission.serve.responses import json_answers

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


def test_an_answer_holds_what_the_predictions_are():
    predictions = Predictions(
        3 * torch.randn(6, 3, 7, generator=torch.Generator().manual_seed(0)), 0.6, average="logits"
    )
    answers = json_answers(predictions, NAMES, top=4)
    assert len({answer["abstain"] for answer in answers}) == 2
    for row, answer in enumerate(answers):
        order = predictions.probabilities[row].argsort(descending=True)[:4]
        assert answer["class"] == NAMES[predictions.classes[row]]
        assert answer["probability"] == predictions.confidence[row].item()
        assert [one["class"] for one in answer["probabilities"]] == [NAMES[index] for index in order]
        shares = [one["probability"] for one in answer["probabilities"]]
        assert shares == predictions.probabilities[row, order].tolist()
        for number, exit_ in enumerate(answer["exits"]):
            assert exit_["class"] == NAMES[predictions.votes[row, number]]
            assert exit_["probability"] == predictions.exit_probabilities[row, number].max().item()
            assert exit_["probabilities"] == predictions.exit_probabilities[row, number, order].tolist()
        for name in ("disagreement", "entropy", "mutual_information"):
            assert answer[name] == pytest.approx(getattr(predictions, name)[row].item())
        assert answer["abstain"] is bool(predictions.abstains[row])


def test_without_a_threshold_an_answer_does_not_mention_abstaining():
    (answer,) = json_answers(Predictions(torch.zeros(1, 2, 3), average="logits"), NAMES[:3])
    assert "abstain" not in answer
    assert len(answer["probabilities"]) == 3
