"""All methods are found by name, read known settings, and can be joined by another."""

import re
from dataclasses import fields

import pytest
import torch
from torch import nn

from netfission.config import FissionConfig, MethodConfig, RunConfig, TrainingConfig
from netfission.methods.base import BuildPlan, Method, TrainingHook
from netfission.methods.deep_ensemble import DeepEnsemble
from netfission.methods.registry import METHODS, check_settings, find_method, reads_setting
from netfission.runs.train import train

SETTINGS = {setting.name for part in (MethodConfig, FissionConfig) for setting in fields(part)}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_method_is_a_subclass_that_reads_known_settings(name):
    assert issubclass(METHODS[name], Method)
    assert METHODS[name].__name__.endswith("Method")
    assert METHODS[name].settings <= SETTINGS
    assert all(reads_setting(name, setting) for setting in ("method", "exits", "seed"))


def test_results_of_a_training_that_changed_are_told_from_those_of_today():
    found = {name: method.revision for name, method in METHODS.items() if method.revision}
    assert found == dict.fromkeys(found, 1) and {"packed", "batch-ensemble"} <= found.keys()


def test_each_setting_of_methods_is_read_by_one_of_them():
    for setting in fields(MethodConfig):
        assert any(reads_setting(name, setting.name) for name in METHODS), setting.name


def test_a_setting_that_the_method_does_not_read_is_refused():
    with pytest.raises(ValueError, match=r"^rho must be 0\.0 unless method=mimo, got 0\.5$"):
        find_method(MethodConfig("packed", rho=0.5))
    with pytest.raises(ValueError, match=r"^criterion must be 'snip' unless method=.*, got 'erk'$"):
        find_method(MethodConfig("packed"), FissionConfig(criterion="erk"))
    assert find_method(MethodConfig("packed", alpha=3.0), FissionConfig(exits=4, seed=2)).config.alpha == 3.0


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_default_number_of_exits_suits_each_method(name):
    pruned = {"sparsity": 0.8, "criterion": "erk"} if "sparsity" in METHODS[name].settings else {}
    trained = {"pretrained": bool(METHODS[name].needs_weights)}
    config = RunConfig.from_dict({"method": name, **pruned, **trained})
    assert config.fission.exits == (1 if name == "born-again" else 3)
    check_settings(config)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"fission"}))
def test_an_impossible_number_of_exits_is_found_before_anything_is_built(name):
    exits = 3 if name == "born-again" else 1
    settings = {"method": name, "exits": exits}
    message = rf"^exits must be (1|at least 2) with method={name}, got {exits}"
    with pytest.raises(ValueError, match=message):
        check_settings(RunConfig.from_dict(settings))

    def create(seed):
        raise AssertionError("nothing must be built")

    with pytest.raises(ValueError, match=message):
        METHODS[name](MethodConfig(name)).build(
            BuildPlan(create, FissionConfig(exits), torch.zeros(2, 1, 8, 8))
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "born-again", "generations": 1}, "generations must be at least 2, got 1"),
        ({"method": "born-again", "epochs": 3}, "epochs must be a multiple of generations=2, got 3"),
        (
            {"method": "mc-dropout", "dropout_rate": 1.0},
            "dropout_rate must be a share between 0 and 1, got 1.0",
        ),
        (
            {"method": "masksembles", "scale": 7.0},
            "scale must be a number from 1 (equal members) to 6, got 7.0",
        ),
        ({"method": "mimo", "rho": 2.0}, "rho must be a share from 0 to 1, got 2.0"),
        ({"method": "packed", "alpha": 0.0}, "alpha must be a positive number, got 0.0"),
        ({"method": "fge", "cycling": 0.0}, "cycling must be a share of the epochs, in (0, 1], got 0.0"),
        (
            {"method": "dst-ensemble"},
            "sparsity must be a share between 0 and 1 with method=dst-ensemble, got 0.0",
        ),
        (
            {"method": "narrow", "branch_groups": [1, 2]},
            "branch_groups must be 3 positive integers, one per branch, got [1, 2]",
        ),
        ({"method": "mimo", "reduction": "mean"}, "reduction must be left out with method=mimo, got 'mean'"),
        ({"method": "snapshot", "ema": 0.9}, "ema must be left out with method=snapshot, got 0.9"),
        ({"method": "packed", "rho": 0.5}, "rho must be 0.0 unless method=mimo, got 0.5"),
        ({"grouping": "halves"}, "grouping must be one of "),
        ({"criterion": "snop"}, "criterion must be one of "),
        ({"branch_after": [1]}, "branch_after must be 2 stages, one per exit but the first, got [1]"),
    ],
)
def test_settings_are_checked_without_model_and_data(settings, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check_settings(RunConfig.from_dict(settings))


class CountingHook(TrainingHook):
    def __init__(self):
        self.points = []

    def on_train_start(self, total_steps, epochs):
        self.points.append(("train", total_steps, epochs))

    def on_epoch_start(self, network, epoch):
        self.points.append(("epoch", epoch))

    def on_batch_start(self, network, step):
        self.points.append(("batch", step))

    def on_before_step(self, network, optimizer, step, seed):
        self.points.append(("step", step, seed))

    def on_batch_end(self, network, steps_done):
        self.points.append(("done", steps_done))


class CommitteeMethod(Method):
    hook = CountingHook()

    def build(self, plan: BuildPlan) -> nn.Module:
        return DeepEnsemble([plan.create(seed) for seed in range(plan.fission.exits)])

    def hooks(self, exits: int, training: TrainingConfig) -> list[TrainingHook]:
        return [self.hook]


def test_a_registered_method_is_trained_and_its_hooks_are_called(monkeypatch, settings_of, tmp_path):
    for table in ("_locations", "_loaded"):
        monkeypatch.setattr(METHODS, table, dict(getattr(METHODS, table)))
    METHODS.register("committee", CommitteeMethod)
    config = settings_of(
        method="committee", sparsity=0.0, epochs=2, limit_per_class=5, batch_size=25, exits=2, seed=3
    )
    evaluation = train(config, tmp_path / "run", progress=False)
    assert len(evaluation.exits) == 2
    steps = [[("batch", step), ("step", step, 3), ("done", step + 1)] for step in range(4)]
    assert CommitteeMethod.hook.points == [
        ("train", 4, 2),
        ("epoch", 0), *steps[0], *steps[1],
        ("epoch", 1), *steps[2], *steps[3],
    ]  # fmt: skip
    network = METHODS["committee"](config.method).build(
        BuildPlan(lambda seed: nn.Linear(2, 2), FissionConfig(exits=2), torch.zeros(1, 2))
    )
    assert network(torch.zeros(1, 2)).shape == (1, 2, 2)
