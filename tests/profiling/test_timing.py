import os
import sys
from typing import ClassVar

import pytest
import torch
from torch import nn

import netfission as nf
from netfission.models import create_model
from netfission.profiling.timing import (
    inference_peak,
    inference_times,
    peak_bytes,
    times_in_turn,
    training_peak,
    training_times,
)
from netfission.surgery.masks import kept_masks

CPU = torch.device("cpu")
MB = 10**6


class Note(nn.Module):
    """Notes each call in a list that copies share."""

    calls: ClassVar[list] = []

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.layer = nn.Linear(3, 4)

    def forward(self, images):
        Note.calls.append((self.name, self.training, torch.is_grad_enabled()))
        return self.layer(images)


@pytest.fixture(autouse=True)
def no_calls():
    Note.calls = []


def test_everything_runs_once_in_every_round():
    calls = []
    times = times_in_turn({n: lambda n=n: calls.append(n) for n in "abc"}, CPU, rounds=2, warm_up=3)
    assert calls == list("abc") * 5
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2, "c": 2}
    assert all(value > 0 for values in times.values() for value in values)


def test_inference_runs_in_eval_mode_without_gradients():
    networks = {"a": Note("a").train(), "b": Note("b").eval()}
    times = inference_times(networks, torch.zeros(2, 3), rounds=2, warm_up=1)
    assert Note.calls == [("a", False, False), ("b", False, False)] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    assert (networks["a"].training, networks["b"].training) == (True, False)


def test_what_a_network_caches_in_inference_still_serves_in_training():
    class Caches(nn.Linear):
        cache = None

        def forward(self, images):
            if self.cache is None:
                self.cache = super().forward(images)
            return self.cache * self.weight.sum()

    network = Caches(3, 4)
    inference_times({"it": network}, torch.zeros(2, 3), rounds=1)
    network(torch.zeros(2, 3)).sum().backward()


def test_training_runs_on_copies_in_train_mode():
    networks = {"a": Note("a").eval(), "b": Note("b")}
    before = {name: module.layer.weight.clone() for name, module in networks.items()}
    times = training_times(networks, torch.ones(2, 3), rounds=2, warm_up=1)
    assert Note.calls == [("a", True, True), ("b", True, True)] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    for name, module in networks.items():
        assert torch.equal(module.layer.weight, before[name])
        assert module.layer.weight.grad is None
        assert module.training is (name == "b")


def test_every_training_step_meets_the_same_weights():
    outputs = []

    class Remember(nn.Linear):
        def forward(self, images):
            outputs.append(super().forward(images))
            return outputs[-1]

    training_times({"it": Remember(3, 4)}, torch.ones(2, 3), rounds=2)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_fissioned_network_trains_with_its_own_loss_and_masks():
    model = create_model("wrn-10-1", 4)
    network = nf.fission(model, 2, example_input=torch.randn(2, 3, 16, 16))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    times = training_times({"network": network}, torch.randn(4, 3, 16, 16), rounds=1)
    assert len(times["network"]) == 1
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert any((~mask).any() for mask in kept_masks(network).values())


def test_peak_of_a_known_operation():
    x = torch.zeros(MB)
    assert peak_bytes(lambda: x + 1, CPU) == pytest.approx(4 * MB, abs=100)


def test_peak_is_of_what_lives_at_once():
    x = torch.zeros(MB)

    def chain():
        y = x
        for _ in range(5):
            y = y + 1  # while it is made, the one before it lives
        return y

    def tree():
        return [x + 1 for _ in range(5)]

    assert peak_bytes(chain, CPU) == pytest.approx(8 * MB, abs=100)
    assert peak_bytes(tree, CPU) == pytest.approx(20 * MB, abs=100)


def test_peak_holds_what_an_operation_takes_for_itself():
    x = torch.randn(1000, 1000).T
    assert peak_bytes(lambda: x.logsumexp(0).sum(), CPU) > 4 * MB  # of which the results are 4 kB


def test_inference_keeps_no_activations_and_training_does():
    layers = [layer for _ in range(10) for layer in (nn.Linear(100, 100, bias=False), nn.Tanh())]
    network = nn.Sequential(*layers)
    images = torch.randn(1000, 100)
    activation = 4 * images.numel()
    weights = 4 * 10 * 100 * 100
    assert inference_peak(network, images) == pytest.approx(2 * activation, rel=0.01)
    # The outputs of ten Tanh are kept; gradients, momentum and Nesterov's step are as large as weights.
    peak = training_peak(network, images)
    assert 10 * activation + weights < peak < 20 * activation + 4 * weights
    assert network[0].weight.grad is None


def test_gradients_and_momentum_are_part_of_trainings_peak():
    network = nn.Linear(1000, 1000, bias=False)
    assert training_peak(network, torch.randn(2, 1000)) >= 2 * 4 * MB
    assert training_peak(network, torch.randn(2, 1000)) < 6 * 4 * MB


def test_the_profilers_notes_are_not_heard_but_the_runs_are(capfd):
    def run():
        os.write(2, b"from the run\n")
        print("and from Python", file=sys.stderr, flush=True)

    peak_bytes(run, CPU)
    print("later", file=sys.stderr)
    assert capfd.readouterr().err == "from the run\nand from Python\nlater\n"


def test_standard_error_and_the_profiler_are_free_after_a_failure(capfd):
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0, CPU)
    assert peak_bytes(lambda: torch.zeros(MB), CPU) == pytest.approx(4 * MB, abs=100)
    print("heard", file=sys.stderr)
    assert capfd.readouterr().err == "heard\n"
