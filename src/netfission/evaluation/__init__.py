"""Measure accuracy, likelihood, calibration and diversity of a network's exits and their ensemble."""

from netfission.evaluation.evaluate import Evaluation, collect_logits, evaluate_logits, run_batches
from netfission.evaluation.metrics import classification_metrics

__all__ = ["Evaluation", "classification_metrics", "collect_logits", "evaluate_logits", "run_batches"]
