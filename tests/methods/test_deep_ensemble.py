from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from netfission.config import FissionConfig, MethodConfig, TrainingConfig
from netfission.losses import ensemble_distillation_loss
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.deep_ensemble import DeepEnsemble
from netfission.methods.registry import find_method
from netfission.models import create_model
from netfission.runs.folder import RunFolder
from netfission.runs.train import train
from netfission.surgery.masks import kept_masks

CONFIG = MethodConfig("deep-ensemble")


def plan(**changes) -> BuildPlan:
    create = partial(call_with_seed, partial(create_model, "wrn-10-1", 10))
    return BuildPlan(create, replace(FissionConfig(exits=3), **changes), torch.rand(2, 3, 8, 8))


def test_members_are_the_networks_that_their_seeds_give_alone():
    ensemble = find_method(CONFIG).build(plan(seed=2)).eval()
    images = torch.rand(4, 3, 8, 8)
    alone = [plan().create(seed).eval()(images) for seed in (6, 7, 8)]
    assert torch.equal(ensemble(images), torch.stack(alone, dim=1))


def test_training_together_gives_each_member_the_weights_that_it_gets_alone():
    ensemble = find_method(CONFIG).build(plan(exits=2))
    alone = find_method(MethodConfig()).build(plan(exits=1, seed=1))
    images, labels = torch.rand(16, 3, 8, 8), torch.arange(16) % 10
    for network in (ensemble, alone):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        for _ in range(3):
            optimizer.zero_grad()
            ensemble_distillation_loss(network(images), labels, weight=0).backward()
            optimizer.step()
    assert isinstance(ensemble, DeepEnsemble)
    trained = ensemble.members[1].state_dict()
    assert all(torch.equal(trained[name], value) for name, value in alone.state_dict().items())


def test_members_are_pruned_each_for_itself():
    ensemble = find_method(CONFIG).build(plan(sparsity=0.5, criterion="magnitude"))
    assert isinstance(ensemble, DeepEnsemble)
    first, second, _ = (kept_masks(member) for member in ensemble.members)
    name = "paths.0.stages.0.block1.0.conv1.weight"
    assert 0.2 < first[name].float().mean() < 0.8
    assert not torch.equal(first[name], second[name])


def test_members_have_no_branches_whatever_is_asked_of_others():
    ensemble = find_method(CONFIG).build(plan(branch_after=[1, 2], ratio=[2.0, 1.0, 1.0])).eval()
    assert torch.equal(ensemble.state_dict()["members.0.stem.conv1.weight"], plan().create(0).conv1.weight)


def test_networks_of_several_exits_stand_side_by_side():
    halves = nn.Unflatten(1, (2, 2))
    ensemble = DeepEnsemble([nn.Linear(4, 2), halves])
    features = torch.rand(3, 4)
    logits = ensemble(features)
    assert logits.shape == (3, 3, 2)
    assert torch.equal(logits[:, 1:], halves(features))


@pytest.mark.parametrize(
    ("config", "exits", "message"),
    [
        (CONFIG, 1, "^exits must be at least 2 with method=deep-ensemble, got 1$"),
        (
            MethodConfig("deep-ensembles"),
            3,
            "^method must be one of .*, got 'deep-ensembles'; did you mean deep-ensemble",
        ),
    ],
)
def test_what_is_refused(config, exits, message):
    with pytest.raises(ValueError, match=message):
        find_method(config).build(plan(exits=exits))


def test_one_by_one_each_member_has_all_epochs_and_the_whole_schedule(settings_of, tmp_path):
    config = settings_of(method="deep-ensemble", exits=2, sparsity=0.0, one_by_one=True, epochs=2)
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            weights = [next(member.parameters()).detach().clone() for member in pl_module.network.members]
            seen.append((trainer.current_epoch, trainer.optimizers[0].param_groups[0]["lr"], weights))

    train(config, tmp_path / "run", progress=False, callbacks=[Watch()])
    half = len(seen) // 2
    assert [epoch for epoch, *_ in seen[:: half // 2]] == [0, 1, 2, 3]
    first, second = seen[:half], seen[half:]
    # The rate is read after the schedule's step: the first member's last is the second's first.
    assert [rate for _, rate, _ in first[:-1]] == pytest.approx([rate for _, rate, _ in second[:-1]])
    assert len({tuple(weights[1].flatten().tolist()) for *_, weights in first}) == 1
    assert len({tuple(weights[0].flatten().tolist()) for *_, weights in second}) == 1
    assert len({tuple(weights[1].flatten().tolist()) for *_, weights in second}) == half
    network, spec = RunFolder(tmp_path / "run").load_network()
    assert network(torch.zeros(1, *spec.shape)).shape == (1, 2, 10)
    rows = (tmp_path / "run" / "metrics.csv").read_text("utf-8").splitlines()
    assert len(rows) == 1 + 4


def test_one_by_one_needs_one_device():
    method = find_method(MethodConfig("deep-ensemble", one_by_one=True))
    with pytest.raises(ValueError, match=r"^one_by_one must be False on more than one device, got True"):
        method.hooks(2, TrainingConfig(devices=2))
