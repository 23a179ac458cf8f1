"""Classifiers by name: CIFAR networks of this library, timm's and torchvision's."""

from netfission.models.cifar_resnet import CifarResNet
from netfission.models.create import create_model
from netfission.models.wide_resnet import WideResNet

__all__ = ["CifarResNet", "WideResNet", "create_model"]
