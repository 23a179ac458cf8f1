"""Fission, the method of this library: one network, divided among several exits."""

from dataclasses import asdict, fields, replace

from torch import nn

from netfission.algorithm import fission
from netfission.config import COPY_NOISE, FissionConfig
from netfission.ensemble import Average
from netfission.methods.base import BuildPlan, Method


class FissionMethod(Method):
    """Fission of one network, see `netfission.algorithm.fission`."""

    settings = frozenset(setting.name for setting in fields(FissionConfig))
    average = "logits"
    average_source = "Lee & Lee 2024, arXiv 2408.02301, section 3"
    distillation = 1.0

    def average_of(self, fission: FissionConfig) -> Average:
        """Return logits, or their weights if linear exits have a weight of their own."""
        return fission.exit_weights or self.average

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build a `FissionNetwork`; see `netfission.algorithm.fission` for errors."""
        settings = replace(plan.fission, branch_after=plan.branch_after)
        if plan.trained and settings.grouping == "copies" and settings.copy_noise is None:
            settings = replace(settings, copy_noise=COPY_NOISE)
        return fission(
            plan.create(settings.seed),
            **asdict(settings),
            batches=plan.batches,
            example_input=plan.example,
        )
