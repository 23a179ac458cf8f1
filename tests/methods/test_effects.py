"""The table of effects against what settings really change."""

import json
import re
from functools import cache, partial

import pytest
import timm
import torch

from netfission.config import RunConfig, TrainingConfig
from netfission.experiments.contenders import CONTENDERS
from netfission.methods.base import BuildPlan, StepResult, call_with_seed
from netfission.methods.effects import EFFECTS, check_effects, unmet_condition, with_recipe
from netfission.methods.registry import METHODS, find_method
from netfission.models import create_model

# What each setting is changed to, with the settings that give it an effect.
LOSS_CHANGES = {
    "temperature": ({"distillation_weight": 1.0}, 1.5),
    "distillation_weight": ({"distillation_weight": 1.0}, 2.0),
    "teacher": ({"distillation_weight": 1.0}, "others"),
    "reduction": ({"reduction": "sum"}, "mean"),
}
OF_PARENT = {"weights": "parent.safetensors", "parent_weight": 1.0}


def test_every_setting_has_its_line():
    assert list(EFFECTS) == [
        name
        for part in ("data", "model", "fission", "method", "training")
        for name in vars(getattr(RunConfig(), part))
    ]


def settings_of(method, **changes):
    own = CONTENDERS.get(method, {"method": method})
    return {"model": "wrn-10-1", "exits": 2, "epochs": 2} | dict(own) | changes


def _convolutions():
    return create_model("wrn-10-1", 10, in_channels=1)


def _attention():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, depth=1, in_chans=1, num_classes=10
    )


@cache
def step_loss(settings):
    """The loss of a step in the second of two epochs; `settings` are those of a run, as JSON."""
    config = RunConfig.from_dict(json.loads(settings))
    method = find_method(config.method)
    create = partial(call_with_seed, _attention if method.needs_weights else _convolutions)
    plan = BuildPlan(create, config.fission, torch.zeros(2, 1, 8, 8))
    network = method.build(plan).train()
    for hook in method.hooks(config.fission.exits, config.training):
        hook.on_epoch_start(network, 1)  # of two: the second member or generation, if they train in turn
    torch.manual_seed(0)
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    result = method.step(network, images, labels, method.loss(config.training))
    parent = create(1).eval() if config.training.parent_weight else None
    return method.with_parent(result, images, parent, config.training).loss.detach()


def loss_of(config):
    return step_loss(json.dumps(config.to_dict()))


@pytest.mark.parametrize("setting", LOSS_CHANGES)
@pytest.mark.parametrize("method", [*sorted(METHODS), "single", "one by one"])
def test_settings_of_the_loss_have_an_effect_as_the_table_says(method, setting):
    before, value = LOSS_CHANGES[setting]
    if method == "one by one":
        before, method = {**before, "one_by_one": True}, "deep-ensemble"
    if (method, setting) == ("mimo", "reduction"):
        return  # refused, see its own test
    first, second = (
        RunConfig.from_dict(settings_of(method, **{**before, **changes}))
        for changes in ({}, {setting: value})
    )
    changed = not torch.equal(loss_of(first), loss_of(second))
    assert changed == (unmet_condition(setting, second) is None)


@pytest.mark.parametrize("setting", LOSS_CHANGES)
def test_linear_exits_of_one_network_teach_each_other(setting):
    before, value = LOSS_CHANGES[setting]
    settings = {"method": "fission", "exits": 1, "linear_exits": [1, 2], **before}
    first, second = (
        RunConfig.from_dict(settings_of("fission") | settings | changes) for changes in ({}, {setting: value})
    )
    assert not torch.equal(loss_of(first), loss_of(second))
    assert unmet_condition(setting, second) is None


@pytest.mark.parametrize("setting", ["temperature", "parent_weight"])
@pytest.mark.parametrize("method", ["fission", "multi-exit", "deep-ensemble", "single"])
def test_settings_of_the_parent_have_an_effect_as_the_table_says(method, setting):
    values = {"temperature": 1.5, "parent_weight": 2.0}
    configs = [
        RunConfig.from_dict(settings_of(method, **{"distillation_weight": 0.0, **OF_PARENT, **changes}))
        for changes in ({}, {setting: values[setting]})
    ]
    assert not torch.equal(*map(loss_of, configs))
    assert unmet_condition(setting, configs[1]) is None


def test_a_mean_over_exits_divides_what_they_learn_from_the_parent():
    result = StepResult(torch.zeros(()), torch.rand(5, 3, 4), torch.arange(5) % 4)
    parent = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 4))
    method, images = find_method(RunConfig().method), torch.rand(5, 1, 2, 3)
    mean, total = (
        method.with_parent(
            result, images, parent, TrainingConfig(parent_weight=1.0, reduction=reduction)
        ).loss
        for reduction in ("mean", "sum")
    )
    torch.testing.assert_close(3 * mean, total)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_schedules_have_an_effect_as_the_table_says(method):
    config = RunConfig.from_dict(settings_of(method))
    trainings = [TrainingConfig(schedule=name) for name in ("paper", "cosine")]
    schedules = [find_method(config.method).schedule(training, 2) for training in trainings]
    changed = any(schedules[0](step / 10) != schedules[1](step / 10) for step in range(10))
    assert changed == (unmet_condition("schedule", config) is None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_scale": 0.5, "crop_padding": 4}, "crop_padding must be left out with crop_scale, got 4"),
        ({"mix_alpha": 1.0}, "mix_alpha must be left out unless mix=cutmix or mix=mixup, got 1.0"),
        ({"corrupt": "skip"}, "corrupt must be left out with data=digits, got 'skip'"),
        ({"workers": 1}, "workers must be left out with data=digits, got 1"),
        ({"exits": 1, "branch_after": []}, "branch_after must be left out unless exits is 2 or more, got []"),
        (
            {"exits": 1, "grouping": "channels"},
            "grouping must be left out unless exits is 2 or more, or sparsity is above 0, got 'channels'",
        ),
        ({"exits": 1, "ratio": [1.0]}, "ratio must be left out unless exits is 2 or more, got [1.0]"),
        (
            {"grouping": "copies", "ratio": [1.0, 2.0, 1.0]},
            "ratio must be left out with grouping=copies, got [1.0, 2.0, 1.0]",
        ),
        (
            {"exits": 1, "keep_shortcuts": True},
            "keep_shortcuts must be left out unless exits is 2 or more, got True",
        ),
        ({"exact_partition": False}, "exact_partition must be left out unless grouping=channels, got False"),
        ({"assignment": "random"}, "assignment must be left out unless grouping=channels, got 'random'"),
        (
            {"criterion": "snip"},
            "criterion must be left out unless sparsity is above 0 or assignment=importance, got 'snip'",
        ),
        ({"pruning_steps": 2}, "pruning_steps must be left out unless sparsity is above 0, got 2"),
        (
            {"pruning_batches": 4},
            "pruning_batches must be left out unless sparsity is above 0 or assignment=importance, or "
            "reconstruct is true, got 4",
        ),
        (
            {"pruning_batches": 4, "sparsity": 0.5, "criterion": "erk"},
            "pruning_batches must be left out unless criterion=snip or criterion=grasp, or reconstruct is "
            "true, got 4",
        ),
        (
            {"optimizer": "adamw", "momentum": 0.9},
            "momentum must be left out unless optimizer=sgd or another with momentum, got 0.9",
        ),
        (
            {"optimizer": "lion", "momentum": 0.9},
            "momentum must be left out unless optimizer=sgd or another with momentum, got 0.9",
        ),
        (
            {"schedule": "one_cycle", "warmup": 0.1},
            "warmup must be left out with schedule=one_cycle, got 0.1",
        ),
        (
            {"method": "snapshot", "warmup": 0.1},
            "warmup must be left out with method=snapshot, which has its own, got 0.1",
        ),
        (
            {"method": "mimo", "temperature": 3.0},
            "temperature must be left out with method=mimo, which trains with one prediction per image, "
            "got 3.0",
        ),
        (
            {"distillation_weight": 0.0, "teacher": "logits"},
            "teacher must be left out unless distillation_weight is above 0, got 'logits'",
        ),
        (
            {"method": "deep-ensemble", "one_by_one": True, "reduction": "sum"},
            "reduction must be left out with one_by_one, got 'sum'",
        ),
        (
            {"method": "snapshot", "schedule": "cosine"},
            "schedule must be left out with method=snapshot, which has its own, got 'cosine'",
        ),
        ({"parent_weight": 1.0}, "parent_weight must be left out unless weights is given, got 1.0"),
        (
            {"method": "born-again", **OF_PARENT},
            "parent_weight must be left out with method=born-again, which has its own teacher, got 1.0",
        ),
        ({"method": "mimo", "alpha": 2.0}, "alpha must be left out with method=mimo, got 2.0"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_effects(RunConfig.from_dict(settings), settings)


def test_batches_are_read_by_reconstruction_as_well():
    settings = {"grouping": "channels", "reconstruct": True, "pruning_batches": 8, "exits": 2}
    check_effects(RunConfig.from_dict(settings), list(settings))


def test_another_optimizer_than_that_of_a_recipe_keeps_its_own_rate_and_decay():
    settings = with_recipe("finetune", {"optimizer": "sgd"})
    assert not {"learning_rate", "weight_decay"} & settings.keys()
    assert RunConfig.from_dict(settings).training.peak_rate == 0.1
    assert with_recipe("finetune", {"optimizer": "sgd", "learning_rate": 0.01})["learning_rate"] == 0.01
    assert with_recipe("finetune", {"optimizer": "adamw"})["weight_decay"] == 0.05


def test_what_asks_for_nothing_is_accepted():
    check_effects(RunConfig.from_dict({"workers": 1, "rand_augment": 5}), ["workers"])
    check_effects(RunConfig.from_dict({"method": "mimo", "sparsity": 0.0}), ["method", "sparsity"])
    config = RunConfig.from_dict({"exits": 1, "distillation_weight": 0.0, "ratio": None})
    check_effects(config, ["exits", "distillation_weight", "ratio"])
