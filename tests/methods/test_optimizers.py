from functools import partial

import pytest
import timm.optim
import torch
from torch import nn

import netfission as nf
from netfission.config import RunConfig, TrainingConfig
from netfission.experiments.contenders import CONTENDERS
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.optimizers import layer_scales, make_optimizer, timm_optimizers
from netfission.methods.registry import METHODS, find_method
from netfission.models import create_model


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))


def train_steps(network, optimizer, steps=20):
    torch.manual_seed(1)
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_sgd_and_adamw_are_those_of_torch_bit_for_bit():
    for name in ("sgd", "adamw"):
        ours, theirs = small_network(), small_network()
        matrices = [p for p in theirs.parameters() if p.ndim > 1]
        vectors = [p for p in theirs.parameters() if p.ndim <= 1]
        if name == "sgd":
            reference = torch.optim.SGD(theirs.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
        else:
            groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
            reference = torch.optim.AdamW(groups, 1e-3, weight_decay=0.05)
        optimizer = make_optimizer(ours, TrainingConfig(optimizer=name))
        assert train_steps(ours, optimizer) == train_steps(theirs, reference)


# Each is another class of timm's; kron compiles, which takes long.
@pytest.mark.parametrize("name", ["lamb", "lion", "nadamw", "muon", "rmsproptf", "adafactor", "madgrad"])
def test_timm_s_optimisers_learn_with_the_settings(name):
    network = small_network()
    config = TrainingConfig(optimizer=name, learning_rate=3e-3, weight_decay=0.02, momentum=0.7)
    optimizer = make_optimizer(network, config)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.02, 0.0}
    decaying = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decaying == {id(p) for p in network.parameters() if p.ndim > 1}
    if "momentum" in optimizer.param_groups[0]:
        assert optimizer.param_groups[0]["momentum"] == 0.7
    losses = train_steps(network, optimizer)
    assert losses[-1] < losses[0]


def test_an_unknown_optimiser_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"^optimizer must be one of sgd, .*, got 'adamv'; did you mean "):
        make_optimizer(small_network(), TrainingConfig(optimizer="adamv"))
    assert not {"adahessian", "bnbadam", "fusedsgd"} & set(timm_optimizers())


def test_the_rate_falls_from_the_last_layer_back_as_in_timm():
    model = timm.create_model("resnet10t", num_classes=10)
    network = nf.fission(model, exits=3, grouping="channels", example_input=torch.zeros(1, 3, 64, 64))
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert len(set(expected.values())) == 6
    scales = layer_scales(network, model, 0.5)
    assert scales.keys() == {name for name, _ in network.named_parameters()}
    for name, scale in scales.items():
        original = max((other for other in expected if name.endswith(f".{other}")), key=len)
        assert scale == expected[original], name
    optimizer = make_optimizer(network, TrainingConfig(learning_rate=0.2), scales)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.2 * scales[name])


@pytest.mark.parametrize(
    "method", sorted(METHODS.keys() - {"lora-ensemble", "singular-value-ensemble"})
)  # need attention or linear layers
def test_layers_are_found_in_the_networks_of_all_methods(method):
    config = RunConfig.from_dict({"exits": 2, **CONTENDERS.get(method, {"method": method})})
    create = partial(call_with_seed, lambda: create_model("wrn-10-1", 10, in_channels=1))
    plan = BuildPlan(create, config.fission, torch.zeros(2, 1, 8, 8))
    network = find_method(config.method).build(plan)
    scales = layer_scales(network, create(0), 0.5)
    # Stem, three blocks, the last batch norm, the classifier.
    expected = {"conv1": 0.5**5, "block1": 0.5**4, "block2": 0.5**3, "block3": 0.25, "bn": 0.5, "fc": 1.0}
    found = {part: set() for part in expected}
    for name, scale in scales.items():
        parts = [part for part in name.split(".") if part in expected]
        if "early" in name:
            assert scale == 1.0
        elif parts:
            found[parts[0]].add(scale)
    assert found == {part: {scale} for part, scale in expected.items()}


def test_a_torchvision_model_has_layers_by_its_names():
    model = create_model("torchvision/resnet18", 10)
    scales = layer_scales(model, model, 0.5)
    assert [scales[name] for name in ("fc.weight", "layer4.1.bn2.bias", "layer1.0.conv1.weight")] == [
        1.0,
        0.5,
        0.5**4,
    ]
    assert scales["conv1.weight"] < scales["layer1.0.conv1.weight"]
