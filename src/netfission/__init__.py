"""Turn one PyTorch image classifier into a multi-exit self-ensemble at the cost of the one network."""

from typing import TYPE_CHECKING, Any

from netfission.config import FissionConfig
from netfission.ensemble import (
    disagreement,
    ensemble_log_probabilities,
    ensemble_probabilities,
    mutual_information,
    predictive_entropy,
)
from netfission.fission import fission
from netfission.inference.cascade import Cascade, exit_costs
from netfission.inference.thresholds import choose_thresholds
from netfission.losses import EnsembleDistillationLoss, ensemble_distillation_loss
from netfission.network import Ensemble, FissionNetwork
from netfission.profiling.cost import Cost, cost
from netfission.pruning.prune import prune
from netfission.surgery.backbone import Backbone

if TYPE_CHECKING:
    from netfission.classifier import Classifier

__all__ = [
    "Backbone",
    "Cascade",
    "Classifier",
    "Cost",
    "Ensemble",
    "EnsembleDistillationLoss",
    "FissionConfig",
    "FissionNetwork",
    "choose_thresholds",
    "cost",
    "disagreement",
    "ensemble_distillation_loss",
    "ensemble_log_probabilities",
    "ensemble_probabilities",
    "exit_costs",
    "fission",
    "mutual_information",
    "predictive_entropy",
    "prune",
]


def __getattr__(name: str) -> Any:
    """Import the one public name that needs more than torch when it is asked for."""
    if name == "Classifier":
        from netfission.classifier import Classifier

        return Classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
