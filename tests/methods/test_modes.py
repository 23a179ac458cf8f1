"""A wrapper is in the mode of what it wraps, and changes no mode."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import netfission as nf
from netfission.data.batches import Normalisation
from netfission.export.cascade import Step
from netfission.export.cascade_answers import ClassAnswers
from netfission.export.predictor import Predictor
from netfission.methods.deep_ensemble import DeepEnsemble
from netfission.methods.layers import BatchedMembers, replace_layers
from netfission.methods.mc_dropout import MemberDropout
from netfission.methods.mimo import Mimo
from netfission.methods.narrow import NarrowBranches
from netfission.methods.packed import Packed
from netfission.methods.snapshot import Snapshots
from netfission.models import create_model

IMAGES = torch.zeros(2, 3, 8, 8)
NORMALISE = Normalisation([0.5] * 3, [0.2] * 3)
WRAPPERS: dict[str, Callable[[nf.FissionNetwork], nn.Module]] = {
    "Ensemble": lambda net: net.ensemble(),
    "Cascade": lambda net: nf.Cascade(net, [0.5], order=[1, 0]),
    "Predictor": lambda net: Predictor(net, NORMALISE, 1.0, average="logits"),
    "Step": lambda net: Step(nf.Cascade(net, [0.5], order=[1, 0]), 0, NORMALISE, ClassAnswers(1.0)),
    "Backbone": lambda net: nf.Backbone(net.stem, net.exit_paths[0].stages, net.exit_paths[0].head, "abc"),
    "DeepEnsemble": lambda net: DeepEnsemble([net]),
    "BatchedMembers": lambda net: BatchedMembers(net, 2, in_training=False),
    "Mimo": lambda net: Mimo(net, 2, 3),
    "NarrowBranches": lambda net: NarrowBranches([net.stem], net.exit_paths),
    "Packed": lambda net: Packed(net, 2),
    "Snapshots": lambda net: Snapshots(net, 2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_takes_the_mode_and_changes_nothing(name: str, training: bool) -> None:
    net = nf.fission(create_model("wrn-10-1", 10), 2, example_input=IMAGES).train(training)
    before = copy.deepcopy([(m.training, [p.requires_grad for p in m.parameters()]) for m in net.modules()])
    assert WRAPPERS[name](net).training == training
    assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in net.modules()] == before


@pytest.mark.parametrize("training", [True, False])
def test_what_replaces_a_layer_takes_its_mode(training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train(training)
    replace_layers(
        model, lambda _, layer: MemberDropout(0.5, 2, 0) if isinstance(layer, nn.Dropout) else None
    )
    assert model[1].training == training
