"""Born-Again Networks: generations one after another, each taught by the one before."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from netfission.config import FissionConfig, MethodConfig, RunConfig
from netfission.experiments.costs import TimedContender, measure_costs
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.born_again import BornAgain, BornAgainLoss
from netfission.methods.registry import find_method
from netfission.models import create_model
from netfission.runs.folder import RunFolder
from netfission.runs.train import train
from netfission.tasks import find_task

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CREATE = partial(call_with_seed, partial(create_model, "wrn-10-1", 10))
SETTINGS = {
    "data": "digits", "limit_per_class": 10, "model": "wrn-10-1", "validation": 0.0, "epochs": 4,
    "batch_size": 25, "accelerator": "cpu", "method": "born-again", "exits": 1, "seed": 3,
}  # fmt: skip


def build(generations: int = 2) -> BornAgain:
    config = MethodConfig("born-again", generations=generations)
    network = find_method(config).build(BuildPlan(CREATE, FissionConfig(exits=1, seed=3), IMAGES))
    assert isinstance(network, BornAgain)
    return network


def test_generations_start_from_different_seeds():
    network = build().eval()
    for number, generation in enumerate(network.generations):
        expected = CREATE(6 + number).eval()(IMAGES)
        assert torch.equal(generation(IMAGES)[:, 0], expected)


def test_the_teacher_is_in_eval_mode_and_gets_no_gradient():
    network = build()
    network.start(1)
    expected = network.generations[0].eval()(IMAGES)
    network.train()
    buffers = {name: value.clone() for name, value in network.generations[0].named_buffers()}
    logits = network(IMAGES)
    torch.testing.assert_close(logits[:, 1:], expected)
    logits.sum().backward()
    assert all(weight.grad is None for weight in network.generations[0].parameters())
    assert all(weight.grad is not None for weight in network.generations[1].parameters())
    assert all(torch.equal(value, buffers[name]) for name, value in network.generations[0].named_buffers())
    assert network.generations[0].training


def test_the_loss_is_that_of_the_labels_and_of_the_teacher():
    logits = torch.randn(5, 2, 10, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(5)
    student, teacher = logits.unbind(dim=1)
    divergence = F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean")
    expected = F.cross_entropy(student, labels) + 0.5 * 16 * divergence
    torch.testing.assert_close(BornAgainLoss(4.0, 0.5)(logits, labels), expected)


class Watch(Callback):
    def __init__(self):
        self.weights: list[list[torch.Tensor]] = []

    def on_train_epoch_end(self, trainer, pl_module):
        generations = pl_module.network.generations
        self.weights.append([next(iter(one.parameters())).detach().clone() for one in generations])


class Stop(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 3:
            raise KeyboardInterrupt


def test_each_generation_has_its_epochs_and_a_resumed_run_ends_bit_identical(tmp_path):
    config, watch = RunConfig.from_dict(SETTINGS), Watch()
    evaluation = train(config, tmp_path / "whole", progress=False, callbacks=[watch])
    assert evaluation is not None and len(evaluation.exits) == 1
    moved = [
        [not torch.equal(before, after) for before, after in zip(*pair, strict=True)]
        for pair in zip(watch.weights, watch.weights[1:], strict=False)
    ]
    assert moved == [[True, False], [False, True], [False, True]]
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", progress=False, callbacks=[Stop()])
    train(config, tmp_path / "cut", progress=False, resume=True)
    whole, cut = (load_file(RunFolder(tmp_path / name).weights) for name in ("whole", "cut"))
    assert int(whole["active"]) == 1
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    network, _ = RunFolder(tmp_path / "whole").load_network()
    other, _ = RunFolder(tmp_path / "cut").load_network()
    assert isinstance(network, BornAgain) and network.number == 1
    grey = IMAGES.mean(dim=1, keepdim=True)
    assert torch.equal(network(grey), network.generations[1](grey))
    assert torch.equal(network(grey), other(grey))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, r"^epochs must be a multiple of generations=2, got 3$"),
        ({"exits": 3}, r"^exits must be 1 with method=born-again, got 3; it has one prediction$"),
        ({"generations": 1}, r"^generations must be at least 2, got 1$"),
        ({"devices": 2}, r"^devices must be 1 with method=born-again, got 2; other generations get no"),
        ({"generations": 0}, r"^generations must be a positive integer, got 0$"),
        (
            {"ema": 0.9},
            r"^ema must be left out with method=born-again, got 0.9; it would average",
        ),
    ],
)
def test_invalid_settings_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(RunConfig.from_dict(SETTINGS | changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_its_cost_is_that_of_the_network_it_ends_with():
    """Half of its steps run the teacher as well: a third more than a single network's step."""
    config = RunConfig.from_dict(SETTINGS | {"data": "digits"})
    network = build()
    network.start(1)
    images = torch.rand(128, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    timed = {"born-again": TimedContender(network, config)}
    costs = measure_costs(timed, CREATE(0), images, find_task("classification", []), rounds=1)
    cost, single = costs.contenders["born-again"], costs.single
    assert cost.size == single.size
    teacher = cost.training_macs - single.training_macs
    assert teacher == pytest.approx(single.size.macs_dense / 2)
    assert set(cost.deployed) == {1, 128}
