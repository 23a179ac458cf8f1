from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netfission.config import FissionConfig, MethodConfig
from netfission.export.predictor import make_exportable
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.mc_dropout import MemberDropout
from netfission.methods.registry import find_method
from netfission.models import create_model
from netfission.profiling.macs import count_macs

WRN = partial(create_model, "wrn-10-1", 10)
CONFIG = MethodConfig("mc-dropout")


def plan(create=WRN, **changes) -> BuildPlan:
    return BuildPlan(
        partial(call_with_seed, create), replace(FissionConfig(exits=3), **changes), torch.zeros(2, 3, 8, 8)
    )


def test_in_training_dropout_is_that_of_torch():
    features = torch.randn(4, 3, 5, 5)
    for layer, own in (
        (MemberDropout(0.3, 2, 0), F.dropout),
        (MemberDropout(0.3, 2, 0, channels=True), F.dropout2d),
    ):
        torch.manual_seed(1)
        outputs = layer(features)
        torch.manual_seed(1)
        assert torch.equal(outputs, own(features, 0.3))


def test_in_evaluation_each_member_drops_the_same_of_every_image():
    layer = MemberDropout(0.3, 2, seed=3).eval()
    kept = layer(torch.ones(6, 50, 8, 8)).unflatten(0, (2, 3))
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs((kept[0, 0] == 0).float().mean() - 0.3) < 0.03
    both = (kept[:, 0] == 0).all(dim=0).float().mean()
    assert abs(both - 0.09) < 0.02  # members drop independently of one another
    assert not torch.equal(MemberDropout(0.3, 2, seed=4).eval()(torch.ones(2, 50, 8, 8)), kept[:, 0])


def test_whole_channels_are_dropped_where_the_model_does():
    kept = MemberDropout(0.5, 2, seed=3, channels=True).eval()(torch.ones(2, 50, 8, 8))
    assert torch.equal(kept, kept[:, :, :1, :1].expand_as(kept))
    assert 0.2 < (kept == 0).float().mean() < 0.8
    features = MemberDropout(0.5, 2, seed=3, channels=True).eval()(torch.ones(2, 50))
    assert features.shape == (2, 50)


def test_with_next_to_no_dropout_every_member_is_the_network_itself():
    network = find_method(replace(CONFIG, dropout_rate=1e-12)).build(plan(seed=2)).eval()
    images = torch.randn(4, 3, 8, 8)
    alone = plan().create(2).eval()(images)
    torch.testing.assert_close(network(images), alone.unsqueeze(1).expand(-1, 3, -1))


def test_every_layer_but_the_first_has_dropout_before_it():
    network = find_method(CONFIG).build(plan()).network
    assert isinstance(network.conv1, nn.Conv2d)
    layers = [network.block1[0].conv1, network.block1[0].conv2, network.block2[0].shortcut, network.fc]
    assert all(isinstance(layer[0], MemberDropout) and layer[0].p == 0.1 for layer in layers)
    dropouts = [module for module in network.modules() if isinstance(module, MemberDropout)]
    assert len(dropouts) == 9
    assert len({dropout.seed for dropout in dropouts}) == 9


def test_dropout_of_the_model_itself_stays_on_and_gets_no_second():
    def create():
        return nn.Sequential(
            nn.Conv2d(3, 8, 8),
            nn.Dropout2d(0.25),
            nn.Flatten(),
            nn.Linear(8, 16),
            nn.ReLU(),
            nn.Dropout(0.0),
            nn.Linear(16, 16),
            nn.Dropout(0.5),
            nn.Linear(16, 10),
        )

    network = find_method(CONFIG).build(plan(create)).network
    kinds = ["Conv2d", "MemberDropout", "Flatten", "Linear", "ReLU", "Dropout", "Sequential", "MemberDropout"]
    assert [type(layer).__name__ for layer in network] == [*kinds, "Linear"]
    assert (network[1].p, network[1].channels) == (0.25, True)
    assert (network[7].p, network[7].channels) == (0.5, False)
    assert network[6][0].p == 0.1


def test_in_training_there_is_one_prediction_under_fresh_noise():
    network = find_method(CONFIG).build(plan())
    images = torch.randn(4, 3, 8, 8)
    first = network(images)
    assert first.shape == (4, 1, 10)
    assert not torch.equal(network(images), first)


@pytest.mark.parametrize("side", [8, 12])
def test_images_of_another_size_will_do(side):
    network = find_method(CONFIG).build(plan()).eval()
    assert network(torch.randn(2, 3, side, side)).shape == (2, 3, 10)


def test_before_the_classifier_alone_the_rest_runs_once():
    config = replace(CONFIG, dropout_layers="last", dropout_rate=0.5)
    network = find_method(config).build(plan(seed=2))
    images = torch.randn(4, 3, 8, 8)
    assert network.train()(images).shape == (4, 1, 10)
    network.eval()
    logits = network(images)
    assert logits.shape == (4, 3, 10)
    assert not torch.equal(logits[:, 0], logits[:, 1]) and torch.equal(logits, network(images))
    stored = make_exportable(network, images)  # for a file, which draws nothing
    torch.testing.assert_close(stored(images), logits)
    few = network(images[:1])
    torch.testing.assert_close(few, logits[:1], rtol=1e-4, atol=1e-5)  # whatever else is in the batch
    macs, once = (count_macs(net, images[:1]).dense for net in (network, plan().create(2)))
    assert once < macs <= once + 2 * 10 * 64  # the classifier thrice
    nearly = find_method(replace(config, dropout_rate=1e-12)).build(plan(seed=2)).eval()
    torch.testing.assert_close(nearly(images), plan().create(2).eval()(images)[:, None].expand(-1, 3, -1))
