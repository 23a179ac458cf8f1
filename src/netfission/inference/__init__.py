"""Predictions and uncertainty from the logits of a network's exits."""

from netfission.inference.ensemble import (
    Average,
    disagreement,
    ensemble_log_probabilities,
    ensemble_probabilities,
    mutual_information,
    predictive_entropy,
)

__all__ = [
    "Average",
    "disagreement",
    "ensemble_log_probabilities",
    "ensemble_probabilities",
    "mutual_information",
    "predictive_entropy",
]
