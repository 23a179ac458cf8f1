import copy
import re
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch import nn

from netfission.classifier.folder import NetworkSpec
from netfission.config import FissionConfig, MethodConfig
from netfission.inference.deployment import deploy
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.registry import find_method
from netfission.models import create_model
from netfission.network import FissionNetwork, LinearExit
from netfission.profiling.macs import count_macs
from netfission.surgery.backbone import cut
from netfission.surgery.masks import kept_masks

CONFIG = MethodConfig("multi-exit")


def plan(model: str = "wrn-10-1", side: int = 8, **changes) -> BuildPlan:
    create = partial(call_with_seed, partial(create_model, model, 10))
    return BuildPlan(create, replace(FissionConfig(exits=3), **changes), torch.rand(2, 3, side, side))


def build(**changes) -> FissionNetwork:
    network = find_method(CONFIG).build(plan(**changes))
    assert isinstance(network, FissionNetwork)
    return network


def test_exit_0_is_the_network_and_the_others_read_the_means_of_its_features():
    network = build(seed=2, branch_after=["block2", 1]).eval()
    model = plan().create(2).eval()
    images = torch.rand(1, 3, 8, 8)
    own, second, third = network(images).unbind(dim=1)
    assert torch.equal(own, model(images))
    backbone = cut(model, plan().example)
    first_features = backbone.stages[0](backbone.stem(images))
    for logits, exit_, features in (
        (second, network.paths[1].head, backbone.stages[1](first_features)),
        (third, network.paths[2].head, first_features),
    ):
        expected = features.mean(dim=(2, 3)) @ exit_.linear.weight.T + exit_.linear.bias
        assert torch.allclose(logits, expected, atol=1e-5)


def test_by_default_exits_leave_after_stage_1_2():
    network = build()
    assert network.branch_after == (1, 2)
    heads = [path.head for path in network.exit_paths[1:]]
    assert [exit_.linear.in_features for exit_ in heads] == [16, 32]


def test_the_trunk_runs_once():
    network = build().eval()
    ran = []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda *_, name=name: ran.append(name))
    network(torch.rand(2, 3, 8, 8))
    assert len(ran) == len(set(ran)) == 9
    example = torch.rand(1, 3, 8, 8)
    over = count_macs(network, example).dense - count_macs(plan().create(0), example).dense
    assert over == (16 + 32) * 10


@pytest.mark.parametrize(
    ("shape", "positions", "channels"),
    [
        ((2, 5, 4, 4), (2, 3), 5),
        ((2, 4, 4, 5), (1, 2), 5),  # as Swin's
        ((2, 7, 1, 1), (2, 3), 7),
        ((2, 4, 4, 4), (2, 3), 4),
        ((2, 5, 4, 6), (2, 3), 5),
        ((2, 9, 5), (1,), 5),
    ],
)
def test_every_layout_of_features_is_averaged_over_its_positions(shape, positions, channels):
    features = torch.rand(shape)
    exit_ = LinearExit(features, classes=3)
    assert exit_.linear.in_features == channels
    assert torch.equal(exit_(features), exit_.linear(features.mean(dim=positions)))


def test_features_that_are_no_images_tokens_or_vectors_are_refused():
    with pytest.raises(
        ValueError,
        match=r"^model must be one whose stages .* for linear exits, got features of shape \(2, 3, 4, 4, 4\)",
    ):
        LinearExit(torch.rand(2, 3, 4, 4, 4), classes=3)


def test_a_transformer_s_tokens_are_averaged():
    network = find_method(CONFIG).build(
        plan("timm/vit_tiny_patch16_224", 224, exits=2, stages=["blocks.0", "blocks.11"])
    )
    assert isinstance(network, FissionNetwork)
    exit_ = network.exit_paths[1].head
    assert (exit_.positions, exit_.linear.in_features) == ((1,), 192)


def test_equal_blocks_are_divided_into_as_many_groups_as_there_are_exits():
    blocks = [nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1)) for _ in range(8)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    of_blocks = BuildPlan(lambda seed: model, FissionConfig(exits=4), torch.rand(2, 3, 8, 8))
    network = find_method(CONFIG).build(of_blocks)
    assert network(torch.rand(2, 3, 8, 8)).shape == (2, 4, 10)
    assert network.stage_names == ("1", "3", "5", "7")


def test_stages_that_are_given_stay_if_they_are_fewer_than_the_exits():
    assert build(stages=["block1", "bn"], branch_after=[1, 1]).stage_names == ("block1", "bn")


def test_the_same_seed_gives_the_same_network_and_the_global_generator_stays():
    made = plan(seed=3)
    before = torch.get_rng_state()
    first = find_method(CONFIG).build(made)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(first, FissionNetwork)
    images = torch.rand(2, 3, 8, 8)
    again, other = build(seed=3), build(seed=4)
    assert torch.equal(first.eval()(images), again.eval()(images))
    assert not torch.equal(first.paths[1].head.linear.weight, other.paths[1].head.linear.weight)


def test_copies_and_loaded_states_answer_alike_and_stay_pruned():
    network = build(sparsity=0.5, criterion="magnitude").train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.rand(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    removed = [
        (network.get_parameter(name), ~mask) for name, mask in kept_masks(network).items() if not mask.all()
    ]
    assert len(removed) > 5
    assert not any(weight[mask].any() for weight, mask in removed)
    fresh = build(sparsity=0.5, criterion="random", seed=1).eval()
    fresh.load_state_dict(network.state_dict())
    images = torch.rand(3, 3, 8, 8)
    expected = network.eval()(images)
    assert torch.equal(fresh(images), expected)
    assert torch.equal(copy.deepcopy(network)(images), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": 1}, "^exits must be at least 2 with method=multi-exit, got 1$"),
        ({"exits": 4}, "^exits must be at most 3, .*, got 4"),
        ({"branch_after": [1, 3]}, r"^branch_after must be 2 stages, .*, got \[1, 3\]"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_it_is_deployed_as_any_other_network():
    network = build().eval()
    images = torch.rand(2, 3, 8, 8)
    assert torch.allclose(deploy(network, images)(images), network(images), atol=1e-5)


def test_weights_with_the_names_of_former_multi_exit_networks_are_loaded():
    spec = NetworkSpec(
        "wrn-10-1", list("abcdefghij"), [3, 8, 8], [0.5] * 3, [0.2] * 3, {"exits": 3}, "0.1.0", asdict(CONFIG)
    )
    network = build(seed=5).eval()
    former = {
        re.sub(r"^paths\.([12])\.head\.", lambda m: f"early.{int(m[1]) - 1}.", name): tensor
        for name, tensor in network.state_dict().items()
    }
    former = {name if name.startswith("early") else f"single.{name}": former[name] for name in former}
    images = torch.rand(2, 3, 8, 8)
    for state in (former, network.state_dict()):
        assert torch.equal(spec.restore(state)(images), network(images))
