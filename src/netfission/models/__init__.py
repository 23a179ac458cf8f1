"""Classifiers by name: CIFAR networks of this library, timm's and torchvision's."""

from netfission.models.cifar_resnet import CifarResNet
from netfission.models.create import create_model
from netfission.models.weights import TrainedWeights, WeightsReport, load_weights, read_weights
from netfission.models.wide_resnet import WideResNet

__all__ = [
    "CifarResNet",
    "TrainedWeights",
    "WeightsReport",
    "WideResNet",
    "create_model",
    "load_weights",
    "read_weights",
]
