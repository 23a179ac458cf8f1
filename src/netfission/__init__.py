"""Turn one PyTorch image classifier into a multi-exit self-ensemble at the cost of the one network."""

TYPE_CHECKING = False  # not from typing, so that the command's start imports next to nothing

if TYPE_CHECKING:
    from netfission.algorithm import fission
    from netfission.classifier import Classifier, Predictor
    from netfission.config import FissionConfig
    from netfission.ensemble import (
        disagreement,
        ensemble_log_probabilities,
        ensemble_probabilities,
        mutual_information,
        predictive_entropy,
    )
    from netfission.inference.cascade import Cascade, exit_costs
    from netfission.inference.deployment import deploy
    from netfission.inference.thresholds import choose_thresholds
    from netfission.losses import EnsembleDistillationLoss, ensemble_distillation_loss
    from netfission.network import Ensemble, FissionNetwork
    from netfission.profiling.cost import Cost, cost
    from netfission.pruning.prune import prune
    from netfission.surgery.backbone import Backbone

__all__ = [
    "Backbone",
    "Cascade",
    "Classifier",
    "Cost",
    "Ensemble",
    "EnsembleDistillationLoss",
    "FissionConfig",
    "FissionNetwork",
    "Predictor",
    "choose_thresholds",
    "cost",
    "deploy",
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

# Where each public name is. It is imported when it is first used: the command's help and its argument errors
# need no torch, and inference needs no trainer.
_MODULES = {
    "Backbone": "surgery.backbone",
    "Cascade": "inference.cascade",
    "Classifier": "classifier",
    "Cost": "profiling.cost",
    "Ensemble": "network",
    "EnsembleDistillationLoss": "losses",
    "FissionConfig": "config",
    "FissionNetwork": "network",
    "Predictor": "classifier",
    "choose_thresholds": "inference.thresholds",
    "cost": "profiling.cost",
    "deploy": "inference.deployment",
    "disagreement": "ensemble",
    "ensemble_distillation_loss": "losses",
    "ensemble_log_probabilities": "ensemble",
    "ensemble_probabilities": "ensemble",
    "exit_costs": "inference.cascade",
    "fission": "algorithm",
    "mutual_information": "ensemble",
    "predictive_entropy": "ensemble",
    "prune": "pruning.prune",
}


if not TYPE_CHECKING:  # a type checker reads the imports above, and finds names that do not exist

    def __getattr__(name):
        """Import a public name when it is first used (PEP 562)."""
        from importlib import import_module

        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"netfission.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
