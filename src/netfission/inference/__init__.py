"""Predictions and uncertainty from the logits of a network's exits, all of them or as few as will do."""

from netfission.ensemble import (
    Average,
    disagreement,
    ensemble_log_probabilities,
    ensemble_probabilities,
    mutual_information,
    predictive_entropy,
)
from netfission.inference.cascade import (
    Cascade,
    CascadeOutput,
    ExitCosts,
    Rule,
    cascade_confidence,
    cascade_logits,
    exit_costs,
)
from netfission.inference.thresholds import CascadeChoice, choose_thresholds

__all__ = [
    "Average",
    "Cascade",
    "CascadeChoice",
    "CascadeOutput",
    "ExitCosts",
    "Rule",
    "cascade_confidence",
    "cascade_logits",
    "choose_thresholds",
    "disagreement",
    "ensemble_log_probabilities",
    "ensemble_probabilities",
    "exit_costs",
    "mutual_information",
    "predictive_entropy",
]
