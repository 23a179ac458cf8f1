"""Classifiers by name: this library's CIFAR networks, timm's, torchvision's and Hugging Face's."""

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
