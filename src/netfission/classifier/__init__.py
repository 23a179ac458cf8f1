"""A trained network with all that is needed to use it, saved and loaded as one."""

from netfission.classifier.classifier import Classifier
from netfission.classifier.predictions import AnswerLimits, Predictions
from netfission.classifier.predictor import Predictor

__all__ = ["AnswerLimits", "Classifier", "Predictions", "Predictor"]
