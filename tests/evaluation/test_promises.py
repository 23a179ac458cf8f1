import torch

from netfission.evaluation.guarantees import CalibrationScores
from netfission.evaluation.promises import Promises


def test_a_score_that_is_no_number_counts_as_a_false_alarm_as_the_detector_marks_it():
    log_probabilities = torch.tensor([[0.9, 0.1]] * 99).log()
    labels = torch.zeros(99).long()
    uncertainty = {"energy": torch.linspace(0, 1, 99).double()}
    scores = CalibrationScores.from_log_probabilities(log_probabilities, labels, uncertainty)
    unknown = {"energy": torch.full((99,), float("nan")).double()}
    promises = Promises.from_log_probabilities(
        log_probabilities, labels, ["cat", "dog"], scores, risks=[], uncertainty=unknown
    )
    assert [found.marked for found in promises.false_alarms] == [1.0]
