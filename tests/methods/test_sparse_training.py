"""Dynamic sparse training: sparse from the start, to the end, and moving in between as the settings say."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from netfission.cli import main
from netfission.config import DataConfig, FissionConfig, MethodConfig, ModelConfig, RunConfig, TrainingConfig
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.deep_ensemble import DeepEnsemble
from netfission.methods.registry import find_method
from netfission.methods.snapshot import Snapshots
from netfission.methods.sparse_training import JUMP_SHARE, Regrowth, refinements, refining
from netfission.models import create_model
from netfission.network import FissionNetwork
from netfission.pruning.regrow import exchanged
from netfission.runs.folder import RunFolder
from netfission.runs.train import train
from netfission.surgery.masks import kept_masks, masked_weights

KINDS = {"dst-ensemble": DeepEnsemble, "edst-ensemble": Snapshots, "neurotrails": FissionNetwork}
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def plan(**changes) -> BuildPlan:
    create = partial(call_with_seed, partial(create_model, "wrn-10-1", 10))
    fission = replace(FissionConfig(exits=3, sparsity=0.8, criterion="erk"), **changes)
    return BuildPlan(create, fission, IMAGES[:2])


def build(method: str, **changes):
    return find_method(MethodConfig(method)).build(plan(**changes))


def run_config(method: str = "dst-ensemble", **changes) -> RunConfig:
    """Of a second: 200 digits, 8 steps an epoch, two epochs, a small network."""
    flat = RunConfig(
        DataConfig("digits", limit_per_class=20),
        ModelConfig("wrn-10-1"),
        FissionConfig(exits=2, sparsity=0.8, criterion="erk", seed=3),
        TrainingConfig(epochs=2, batch_size=25, accelerator="cpu"),
        MethodConfig(method, regrow_every=3),
    ).to_dict()
    return RunConfig.from_dict(flat | changes)


def in_training(network):
    return network.current if isinstance(network, Snapshots) else network


class Watch(Callback):
    """Looks at the network after every step: the zeros, the counts, and which steps moved or learned."""

    def __init__(self):
        self.masks, self.weights, self.rates = [], [], []

    def look(self, network):
        for _, weight, removed in masked_weights(network):
            assert not weight[removed].any()
        self.masks.append({name: mask.clone() for name, mask in kept_masks(in_training(network)).items()})
        state = in_training(network).state_dict()
        self.weights.append(
            {name: state[name].clone() for name, _ in in_training(network).named_parameters()}
        )

    def on_train_start(self, trainer, pl_module):
        self.look(pl_module.network)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == len(self.masks):  # not in the midst of batches that are added up
            self.look(pl_module.network)
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def moved(self):
        """The steps, from 0, in whose place connections moved."""
        pairs = enumerate(zip(self.masks, self.masks[1:], strict=False))
        return [step for step, (old, new) in pairs if any(not torch.equal(old[n], new[n]) for n in old)]


# --- the networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("sparsity", [0.5, 0.83])
def test_exactly_the_share_asked_for_is_removed(method, sparsity):
    network = build(method, sparsity=sparsity)
    assert isinstance(network, KINDS[method])
    parts = network.members if method == "dst-ensemble" else [in_training(network)]
    for part in parts:
        masks = [removed for _, _, removed in masked_weights(part)]
        total = sum(mask.numel() for mask in masks)
        assert sum(int(mask.sum()) for mask in masks) == round(sparsity * total)
        heads = [name for name, _, _ in masked_weights(part) if ".head." in name]
        assert not heads


@pytest.mark.parametrize("method", KINDS)
def test_logits_have_an_exit_each(method):
    network = build(method).eval()
    assert network(IMAGES).shape == (4, 3, 10)
    assert network(IMAGES[:1]).shape == (1, 3, 10)
    trains = 1 if method == "edst-ensemble" else 3
    assert network.train()(IMAGES).shape == (4, trains, 10)


@pytest.mark.parametrize("method", KINDS)
def test_the_seed_makes_the_network(method):
    state = torch.random.get_rng_state()
    first, again, other = (build(method, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    masks = [name for name in first if name.endswith("_removed")]
    assert masks
    assert any(not torch.equal(first[name], other[name]) for name in masks)


@pytest.mark.parametrize("method", ["dst-ensemble", "neurotrails"])
def test_exits_start_from_masks_of_their_own(method):
    network = build(method)
    masks = kept_masks(network)
    last = "stages.1.block3.0.conv2.weight"
    names = {
        "dst-ensemble": [f"members.{k}.paths.0.stages.2.block3.0.conv2.weight" for k in range(3)],
        "neurotrails": ["paths.0.stages.2.block3.0.conv2.weight", f"paths.1.{last}", f"paths.2.{last}"],
    }[method]
    first, second, third = (masks[name] for name in names)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_members_keep_the_weights_that_a_deep_ensemble_starts_from():
    sparse = build("dst-ensemble", seed=2)
    dense = find_method(MethodConfig("deep-ensemble")).build(plan(seed=2, sparsity=0.0))
    weights = dict(dense.named_parameters())
    for name, weight, removed in masked_weights(sparse):
        assert torch.equal(weight, weights[name].masked_fill(removed, 0))


def test_trails_part_after_the_first_stage_unless_asked_otherwise():
    assert build("neurotrails").branch_after == (1, 1)
    assert build("neurotrails", branch_after=[2, 1]).branch_after == (2, 1)


@pytest.mark.parametrize("method", KINDS)
def test_any_model_that_can_be_cut_will_do(method):
    create = partial(call_with_seed, partial(create_model, "cifar-resnet18-w16", 10))
    network = find_method(MethodConfig(method)).build(replace(plan(), create=create))
    assert network.eval()(IMAGES).shape == (4, 3, 10)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (
            "dst-ensemble",
            {"sparsity": 0.0},
            r"^sparsity must be a share between 0 and 1 with method=dst-ensemble, got 0\.0; the paper",
        ),
        ("neurotrails", {"sparsity": 1.0}, r"^sparsity must be the share of weights to remove, .*, got 1\.0"),
        ("edst-ensemble", {"exits": 1}, "^exits must be at least 2 with method=edst-ensemble, got 1$"),
        (
            "dst-ensemble",
            {"criterion": "snip"},
            "^criterion must be one that reads no data .*, got 'snip'; the paper has erk",
        ),
        ("dst-ensemble", {"criterion": "erc"}, "^criterion must be one of .*, got 'erc'; did you mean erk"),
    ],
)
def test_invalid_plans_are_refused(method, changes, message):
    with pytest.raises(ValueError, match=message):
        build(method, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regrow": "gradients"}, "^regrow must be one of .*, got 'gradients'; did you mean gradient"),
        ({"regrow_every": 0}, "^regrow_every must be a positive integer, got 0$"),
        ({"regrow_share": 0.0}, r"^regrow_share must be a share of the connections, in \(0, 1\], got 0\.0$"),
        ({"regrow_share": 1.5}, r"^regrow_share must be a share of the connections, in \(0, 1\], got 1\.5$"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        find_method(replace(MethodConfig("neurotrails"), **changes)).build(plan())


def test_averages_of_weights_are_refused():
    with pytest.raises(
        ValueError, match=r"^ema must be left out with method=edst-ensemble, got 0\.9; an average"
    ):
        find_method(MethodConfig("edst-ensemble")).hooks(2, TrainingConfig(ema=0.9))


# --- when connections move --------------------------------------------------------------------------


def regrowth(steps, phases=None, **changes) -> Regrowth:
    config = MethodConfig("dst-ensemble", **changes)
    hook = Regrowth(config) if phases is None else Regrowth(config, phases)
    hook.steps = steps
    return hook


def test_shares_fall_along_half_a_cosine_to_three_quarters():
    hook = regrowth(400, regrow_every=50, regrow_share=0.3)
    shares = {step: hook.share_at(step) for step in range(400) if hook.share_at(step)}
    assert list(shares) == [50, 100, 150, 200, 250]
    expected = [0.3 * c for c in (0.9330127, 0.75, 0.5, 0.25, 0.0669873)]  # (1 + cos(π k / 6)) / 2
    assert list(shares.values()) == pytest.approx(expected)


@settings(deadline=None, max_examples=50)
@given(exits=st.integers(1, 9), steps=st.integers(60, 500))
def test_refinements_share_what_exploring_leaves(exits, steps):
    phases = [refinements(exits, step / steps) for step in range(steps)]
    lengths = [sum(phase == k for phase, _ in phases) for k in range(exits + 1)]
    assert sum(lengths) == steps
    assert max(lengths[1:]) - min(lengths[1:]) <= 1
    assert lengths[0] / steps == pytest.approx(1.5 / (1.5 + exits), abs=1.5 / steps)
    assert all(0 <= done < 1 for _, done in phases)
    assert [phase for phase, _ in phases] == sorted(phase for phase, _ in phases)
    hook = regrowth(steps, partial(refinements, exits), regrow_every=7)
    leaps = [step for step in range(steps) if hook.leaps_at(step)]
    assert leaps == [sum(lengths[:k]) for k in range(2, exits + 1)]
    assert all(hook.share_at(step) == JUMP_SHARE for step in leaps)


def test_edst_refines_at_a_tenth_and_a_hundredth_of_the_rate():
    rates = [refining(3, epoch / 450) for epoch in range(450)]  # the paper's 450 epochs
    assert rates == [1.0] * 150 + ([0.1] * 50 + [0.01] * 50) * 3


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("dst-ensemble", {}),
        ("dst-ensemble", {"regrow": "random", "optimizer": "adamw", "clip": 1.0}),
        ("dst-ensemble", {"accumulate": 2, "regrow_every": 2}),
        ("edst-ensemble", {}),
        ("neurotrails", {"channels_last": True}),
    ],
)
def test_at_every_step_zeros_are_zeros_and_counts_stay(method, changes, tmp_path):
    watch = Watch()
    config = run_config(method, **changes)
    evaluation = train(config, tmp_path / "run", progress=False, callbacks=[watch])
    first = watch.masks[0]
    for masks in watch.masks[1:]:
        assert all(int(mask.sum()) == int(first[name].sum()) for name, mask in masks.items())
    steps = len(watch.masks) - 1
    hook = regrowth(steps, partial(refinements, 2) if method == "edst-ensemble" else None)
    hook.config = config.method
    moved = [step for step in range(steps) if hook.share_at(step)]
    assert watch.moved()[:2] == moved[:2]
    assert set(watch.moved()) <= set(moved)  # a share may come to less than one connection
    for step in range(steps):  # the steps that move connections train as well
        before, after = watch.weights[step], watch.weights[step + 1]
        assert not any(torch.equal(after[name], value) for name, value in before.items())
    if evaluation is not None:
        assert len(evaluation.exits) == 2


def test_the_network_that_is_saved_is_the_one_that_was_trained(tmp_path):
    watch = Watch()
    train(run_config(), tmp_path / "run", progress=False, callbacks=[watch])
    network, spec = RunFolder(tmp_path / "run").load_network()
    assert spec.method["regrow_every"] == 3
    masks = kept_masks(network)
    assert all(torch.equal(mask, masks[name]) for name, mask in watch.masks[-1].items())
    create = partial(call_with_seed, partial(create_model, "wrn-10-1", 10, in_channels=1))
    images = torch.rand(5, 1, 8, 8)
    grey = replace(plan(exits=2, seed=9), create=create, example=images)
    fresh = find_method(MethodConfig("dst-ensemble")).build(grey)
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh.eval()(images), network(images))


def test_training_learns(tmp_path):
    config = run_config("neurotrails", limit_per_class=None, batch_size=64, regrow_every=10)
    evaluation = train(config, tmp_path / "run", progress=False)
    assert evaluation is not None
    assert evaluation.ensemble["top1"] > 0.8


def test_edst_keeps_what_each_refinement_ended_with_and_leaps_from_there(tmp_path):
    watch = Watch()
    train(run_config("edst-ensemble", exits=3), tmp_path / "run", progress=False, callbacks=[watch])
    steps = len(watch.masks) - 1
    hook = regrowth(steps, partial(refinements, 3))
    leaps = [step for step in range(steps) if hook.leaps_at(step)]
    assert len(leaps) == 2
    state = load_file(RunFolder(tmp_path / "run").weights)
    assert int(state["taken"]) == 2
    for number, step in enumerate([*leaps, steps]):
        part = "current" if step == steps else f"slots.{number}"
        for name, weight in watch.weights[step].items():
            assert torch.equal(state[f"{part}.{name}"], weight)
        for name, mask in watch.masks[step].items():
            if ".head." not in name:
                assert torch.equal(~state[f"{part}.{name}_removed"], mask)
    for step in leaps:
        for name, before in watch.masks[step].items():
            gone = int((before & ~watch.masks[step + 1][name]).sum())
            assert gone == min(int(JUMP_SHARE * int(before.sum())), int((~before).sum()))
    assert watch.rates[0] == pytest.approx(0.1)
    assert watch.rates[-1] == pytest.approx(0.001)


class Stop(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("method", "changes"),
    [("dst-ensemble", {"regrow": "random"}), ("edst-ensemble", {"accumulate": 2, "regrow_every": 2})],
)
def test_a_run_cut_off_and_resumed_ends_bit_identical(method, changes, tmp_path):
    config = run_config(method, **changes)
    train(config, tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", progress=False, callbacks=[Stop()])
    train(config, tmp_path / "cut", progress=False, resume=True)
    whole, cut = (load_file(RunFolder(tmp_path / name).weights) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_each_seed_and_step_has_its_own_chance():
    masks = []
    for seed, step in ((1, 10), (1, 10), (1, 20), (2, 10)):
        network = build("dst-ensemble", exits=2)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        hook = regrowth(100, regrow="random", regrow_every=10)
        hook.share_at = lambda step: 0.5
        torch.rand(1)  # the global generator plays no part
        hook.on_before_step(network, optimizer, step, seed)
        hook.on_batch_end(network, step + 1)
        masks.append(torch.cat([mask.flatten() for mask in kept_masks(network).values()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[3])


def test_all_batches_of_a_step_have_a_say_in_what_comes_back():
    network = find_method(MethodConfig("dst-ensemble")).build(plan())
    hook = regrowth(100, regrow_every=10)
    sums: dict[str, torch.Tensor] = {}
    for images in (IMAGES, 1 - IMAGES):
        hook.on_batch_start(network, 10)
        loss = network(images).square().sum()
        for (name, _, _), raw in zip(
            masked_weights(network),
            torch.autograd.grad(loss, [w for _, w, _ in masked_weights(network)], retain_graph=True),
            strict=True,
        ):
            sums[name] = sums.get(name, 0) + raw
        loss.backward()
    for name, weight, removed in masked_weights(network):
        assert sums[name][removed].any() or not removed.any()
        torch.testing.assert_close(weight.grad, sums[name])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    kept = {name: ~removed for name, _, removed in masked_weights(network)}
    expected = {
        name: exchanged(kept[name], weight.abs(), sums[name].abs(), hook.share_at(10), torch.Generator())
        for name, weight, _ in masked_weights(network)
    }
    hook.on_before_step(network, optimizer, 10, seed=0)  # the optimiser's step itself is left out here
    assert all(not weight.grad[removed].any() for _, weight, removed in masked_weights(network))
    hook.on_batch_end(network, 11)
    moved = {name: ~removed for name, _, removed in masked_weights(network)}
    assert all(torch.equal(moved[name], mask) for name, mask in expected.items())
    assert any(not torch.equal(moved[name], mask) for name, mask in kept.items())
    network.zero_grad()
    network(IMAGES).sum().backward()
    assert not any(weight.grad[removed].any() for _, weight, removed in masked_weights(network))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--regrow_every 1000",
            "--regrow-every must be at most 5 in a training of 8 steps, got 1000; no connection would move",
        ),
        (
            "--method edst-ensemble --exits 40",
            "epochs must be enough for an exploration and 40 refinements, got 1 (8",
        ),
        ("--method edst-ensemble --ema 0.9", "ema must be left out with method=edst-ensemble, got 0.9"),
        ("--sparsity 0", "sparsity must be a share between 0 and 1 with method=dst-ensemble, got 0.0"),
        (
            "--method fission --regrow_every 7",
            "--regrow-every must be left out unless method=dst-ensemble or edst-ensemble or neurotrails, "
            "got 7",
        ),
    ],
)
def test_invalid_settings_end_in_one_line(flags, message, tmp_path, capsys):
    request = (
        "train --data digits --limit_per_class 20 --model wrn-10-1 --epochs 1 --batch_size 25 --exits 2 "
        f"--sparsity 0.8 --criterion erk --method dst-ensemble --regrow_every 3 {flags}"
    )
    assert main([*request.split(), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("steps", "every"), [(80_000, 1000), (50_000, 1000), (930, 18), (8, 1)])
def test_connections_move_often_enough_in_short_trainings(steps, every):
    hook = regrowth(steps)
    moved = [step for step in range(steps) if hook.share_at(step) > 0]
    assert moved[0] == every
    assert all(step % every == 0 for step in moved)
