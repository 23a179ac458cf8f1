"""The method of this project: one network, divided among several exits."""

from dataclasses import asdict, fields

from torch import nn

from netfission.algorithm import fission
from netfission.config import FissionConfig
from netfission.methods.base import BuildPlan, Method


class FissionMethod(Method):
    """The method of this project, see `netfission.algorithm.fission`."""

    settings = frozenset(setting.name for setting in fields(FissionConfig))
    distillation = 1.0

    def build(self, plan: BuildPlan) -> nn.Module:
        """A `FissionNetwork`."""
        return fission(
            plan.create(plan.fission.seed),
            **asdict(plan.fission),
            batches=plan.batches,
            example_input=plan.example,
        )
