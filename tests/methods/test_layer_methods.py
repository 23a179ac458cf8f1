"""What the methods that replace layers have in common."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from netfission.config import FissionConfig, MethodConfig, RunConfig
from netfission.losses import EnsembleDistillationLoss
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.registry import find_method
from netfission.models import create_model
from netfission.runs.evaluate import evaluate
from netfission.runs.folder import RunFolder
from netfission.runs.train import train

WRN = partial(create_model, "wrn-10-1", 10)
METHODS = ["batch-ensemble", "masksembles", "mc-dropout", "mimo", "packed"]
every_method = pytest.mark.parametrize("method", METHODS)


def plan(create=WRN, side=8, **changes) -> BuildPlan:
    config = replace(FissionConfig(exits=3), **changes)
    return BuildPlan(partial(call_with_seed, create), config, torch.zeros(2, 3, side, side))


def build(method: str, **changes) -> nn.Module:
    return find_method(MethodConfig(method)).build(plan(**changes))


def trained(network: nn.Module, method: str) -> nn.Module:
    """A step on noise, through the method."""
    network.train()
    images, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 10
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    step = find_method(MethodConfig(method)).step
    network.exits = 3
    outcome = step(network, images, labels, EnsembleDistillationLoss(weight=0))
    assert len(outcome.logits) == len(outcome.labels)
    assert outcome.logits.shape[2] == 10
    outcome.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    optimizer.step()
    return network


@every_method
def test_each_image_gets_the_members_predictions_whatever_else_is_in_the_batch(method):
    network = trained(build(method), method).eval()
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        logits = network(images)
        assert logits.shape == (5, 3, 10)
        torch.testing.assert_close(network(images[3:4]), logits[3:4])
        torch.testing.assert_close(network(images.flip(0)), logits.flip(0))
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-4
    assert (logits[:, 0] - logits[:, 2]).abs().max() > 1e-4


@every_method
def test_weights_in_a_file_and_the_settings_give_the_network_again(method):
    network = trained(build(method, seed=4), method).eval()
    images = torch.randn(2, 3, 8, 8)
    logits = network(images)
    again = build(method, seed=4).eval()
    assert not torch.equal(again(images), logits)
    again.load_state_dict(load(save(network.state_dict())))
    assert torch.equal(again(images), logits)
    assert torch.equal(copy.deepcopy(network)(images), logits)


@every_method
def test_random_numbers_come_from_the_seed(method):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    first, again, other = (build(method, seed=seed).eval()(images) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@every_method
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": 1}, "^exits must be at least 2 with method={method}, got 1$"),
        ({"sparsity": 0.5}, "^sparsity must be 0.0 with method={method}, got 0.5; it does not prune$"),
        (
            {"create": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 10))},
            "^model with method={method} must be a network of at least two .*, got 1 of them$",
        ),
        (
            {
                "create": lambda: nn.Sequential(
                    nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 8)),
                    nn.Flatten(),
                    nn.Linear(16, 10),
                )
            },
            "^model with method={method} must be .* plain weights, got layer '0', which computes",
        ),
    ],
)
def test_what_each_of_them_refuses(method, changes, message):
    with pytest.raises(ValueError, match=message.format(method=method)) as caught:
        build(method, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "masksembles", "scale": 0.5},
            r"^scale must be a number from 1 \(equal members\) to 6, got 0\.5$",
        ),
        (
            {"method": "masksembles", "scale": 7.0},
            r"^scale must be a number from 1 \(equal members\) to 6, got 7\.0$",
        ),
        (
            {"method": "mc-dropout", "dropout_rate": 0.0},
            "^dropout_rate must be a share between 0 and 1, got 0.0$",
        ),
        (
            {"method": "mc-dropout", "dropout_rate": 1.0},
            "^dropout_rate must be a share between 0 and 1, got 1.0$",
        ),
        ({"method": "mimo", "repetitions": 0}, "^repetitions must be a positive integer, got 0$"),
        ({"method": "mimo", "rho": 1.5}, "^rho must be a share from 0 to 1, got 1.5$"),
        ({"method": "packed", "alpha": 0.0}, "^alpha must be a positive number, got 0.0$"),
        ({"method": "packed", "gamma": 0}, "^gamma must be a positive integer, got 0$"),
        ({"method": "packed", "scale": 3.0}, "^scale must be 2.0 unless method=masksembles, got 3.0$"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        find_method(MethodConfig(**settings)).build(plan())


class Weightless(nn.Module):
    """A layer whose weight is read past it, as some of timm's do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 8)
        self.second = nn.Linear(16, 16)
        self.last = nn.Linear(16, 10)

    def forward(self, images):
        features = self.second(self.first(images).flatten(1))
        return self.last(features @ self.second.weight)


@pytest.mark.parametrize("method", ["batch-ensemble", "masksembles", "mc-dropout"])
def test_a_model_that_reads_past_its_layers_is_refused(method):
    with pytest.raises(
        ValueError,
        match=f"^model with method={method} must be able to run with its layers replaced, got an error",
    ):
        build(method, create=Weightless)


@every_method
def test_a_run_is_trained_saved_and_loaded(method, tmp_path):
    config = RunConfig.from_dict(
        {
            "method": method,
            "model": "wrn-10-1",
            "limit_per_class": 5,
            "epochs": 1,
            "batch_size": 15,
            "exits": 2,
        }
        | {"accelerator": "cpu", "repetitions": 2 if method == "mimo" else 4}
    )
    evaluation = train(config, tmp_path / "run", progress=False)
    network, spec = RunFolder(tmp_path / "run").load_network()
    assert network(torch.rand(1, *spec.shape)).shape == (1, 2, 10)
    assert evaluate(RunFolder(tmp_path / "run"), config).to_json() == evaluation.to_json()
