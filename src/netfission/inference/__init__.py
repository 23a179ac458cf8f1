"""Run a fissioned network: predictions and uncertainty, early exit, and deployment."""

from netfission.ensemble import (
    Average,
    disagreement,
    ensemble_log_probabilities,
    ensemble_probabilities,
    mutual_information,
    predictive_entropy,
)
from netfission.inference.bounded_loss import bounded_thresholds
from netfission.inference.cascade import (
    Cascade,
    CascadeOutput,
    ExitCosts,
    Rule,
    StoppingRule,
    cascade_confidence,
    cascade_logits,
    exit_costs,
)
from netfission.inference.deployment import Deployed, deploy, deploy_exits
from netfission.inference.thresholds import CascadeChoice, choose_thresholds
from netfission.inference.tiles import TileCascade

__all__ = [
    "Average",
    "Cascade",
    "CascadeChoice",
    "CascadeOutput",
    "Deployed",
    "ExitCosts",
    "Rule",
    "StoppingRule",
    "TileCascade",
    "bounded_thresholds",
    "cascade_confidence",
    "cascade_logits",
    "choose_thresholds",
    "deploy",
    "deploy_exits",
    "disagreement",
    "ensemble_log_probabilities",
    "ensemble_probabilities",
    "exit_costs",
    "mutual_information",
    "predictive_entropy",
]
