import copy
import signal
from dataclasses import replace
from functools import partial
from math import ceil, cos, pi

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from netfission.config import DataConfig, FissionConfig, MethodConfig, ModelConfig, RunConfig, TrainingConfig
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.registry import find_method
from netfission.methods.schedules import cosine, paper
from netfission.methods.snapshot import Snapshots
from netfission.models import create_model
from netfission.runs.folder import RunFolder
from netfission.runs.train import train

SNAPSHOT = MethodConfig("snapshot")
FGE = MethodConfig("fge")


def plan(**changes) -> BuildPlan:
    create = partial(call_with_seed, partial(create_model, "wrn-10-1", 10))
    return BuildPlan(create, replace(FissionConfig(exits=3), **changes), torch.rand(2, 3, 8, 8))


def settings(method: MethodConfig, exits: int, **changes) -> RunConfig:
    """3 epochs of 4 steps."""
    return RunConfig(
        DataConfig("digits", limit_per_class=20),
        ModelConfig("wrn-10-1"),
        FissionConfig(exits=exits, sparsity=0.5, criterion="magnitude", seed=3),
        replace(TrainingConfig(epochs=3, batch_size=50, accelerator="cpu"), **changes),
        method,
    )


class Recorder(Callback):
    """Keeps what the network in training was after each batch, and how many steps had been done."""

    def __init__(self):
        self.states = {}
        self.number_taken = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        network = pl_module.network
        self.states[trainer.global_step] = copy.deepcopy(network.current.state_dict())
        self.number_taken.append((trainer.global_step, network.number_taken))


def assert_equal_states(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# --- learning rates ---------------------------------------------------------------------------------


@given(cycles=st.integers(2, 60), length=st.integers(1, 500), done=st.integers(0, 30_000))
@example(cycles=49, length=7, done=7)  # 1 / 49 * 49 is below 1 in floats, yet a new cycle starts
def test_snapshot_follows_equation_2(cycles, length, done):
    steps = cycles * length
    step = done % steps + 1  # t of the paper
    rounded_up = ceil(steps / cycles)
    expected = 0.5 * (cos(pi * ((step - 1) % rounded_up) / rounded_up) + 1)
    schedule = find_method(SNAPSHOT).schedule(TrainingConfig(schedule="paper"), cycles)
    assert schedule((step - 1) / steps) == pytest.approx(expected, abs=1e-6)


def test_cycles_of_no_whole_number_of_steps_restart_at_the_first_step_of_the_next():
    schedule = find_method(SNAPSHOT).schedule(TrainingConfig(schedule="paper"), 3)
    rates = [schedule(step / 10) for step in range(10)]
    restarts = [step for step in range(1, 10) if rates[step] > rates[step - 1]]
    assert restarts == [4, 7]  # 10 / 3 and 20 / 3
    assert max(rates[3], rates[6], rates[9]) < 0.3


def test_fge_follows_what_is_asked_for_and_then_the_paper_s_triangles():
    schedule = find_method(FGE).schedule(TrainingConfig(schedule="cosine"), 3)
    assert [schedule(p) for p in (0.0, 0.3, 0.79)] == [cosine(p) for p in (0.0, 0.3, 0.79)]
    assert find_method(FGE).schedule(TrainingConfig(schedule="paper"), 3)(0.6) == paper(0.6)
    high, low = 0.5, 0.1
    for number in range(2):  # cycles of 0.08
        for t in (0.01, 0.2, 0.5, 0.7, 0.99):
            expected = (1 - 2 * t) * high + 2 * t * low
            if t > 0.5:
                expected = (2 - 2 * t) * low + (2 * t - 1) * high
            assert schedule(0.8 + (number + t) * 0.08) == pytest.approx(expected)
    assert schedule(1 - 1e-9) == pytest.approx(low)


@pytest.mark.parametrize(("config", "exits"), [(SNAPSHOT, 4), (FGE, 4), (replace(FGE, cycling=1.0), 2)])
def test_snapshots_are_due_where_the_rate_is_low(config, exits):
    method = find_method(config)
    schedule = method.schedule(TrainingConfig(schedule="paper"), exits)
    ends = method.ends(exits)
    assert len(ends) == exits - 1
    low = schedule(1 - 1e-6)
    assert low <= 0.1 + 1e-4
    for end in ends:
        assert schedule(end - 1e-6) == pytest.approx(low, abs=1e-3)
        assert schedule(end - 0.02) > low + 0.01


# --- the network ------------------------------------------------------------------------------------


def test_only_the_network_in_training_answers_in_train_mode_and_what_is_to_come_is_stood_in_for():
    network = find_method(SNAPSHOT).build(plan(seed=2))
    assert isinstance(network, Snapshots)
    images = torch.rand(1, 3, 8, 8)
    alone = plan().create(2).eval()(images)
    network.eval()
    assert torch.equal(network(images), alone.unsqueeze(1).expand(1, 3, 10))
    network.take()
    with torch.no_grad():
        network.current.get_parameter("paths.0.head.fc.bias").add_(1)
    first, second, third = network(images)[0]
    assert torch.equal(first, alone[0])
    assert torch.equal(second, third)
    assert torch.allclose(second, first + 1)
    assert network.train()(torch.rand(4, 3, 8, 8)).shape == (4, 1, 10)


def test_copies_and_loaded_states_know_how_many_are_taken():
    network = find_method(SNAPSHOT).build(plan(sparsity=0.5, criterion="magnitude")).eval()
    network.take()
    with torch.no_grad():
        network.current.get_parameter("paths.0.head.fc.weight").mul_(2)
    fresh = find_method(SNAPSHOT).build(plan(sparsity=0.5, criterion="random", seed=9)).eval()
    fresh.load_state_dict(network.state_dict())
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(fresh(images), network(images))
    assert torch.equal(copy.deepcopy(network)(images), network(images))
    assert not torch.equal(network(images)[:, 0], network(images)[:, 1])


# --- runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of 12 steps and 5 snapshots: cycles end at steps 2.4, 4.8, 7.2, 9.6 and 12."""
    path = tmp_path_factory.mktemp("runs") / "run"
    recorder = Recorder()
    evaluation = train(settings(SNAPSHOT, 5), path, progress=False, callbacks=[recorder])
    assert evaluation is not None and len(evaluation.exits) == 5
    return RunFolder(path), recorder


def test_slots_hold_the_network_as_it_was_at_the_end_of_each_cycle(recorded):
    folder, recorder = recorded
    network, _ = folder.load_network()
    assert isinstance(network, Snapshots)
    assert int(network.taken) == network.number_taken == 4
    held = [slot.state_dict() for slot in network.slots] + [network.current.state_dict()]
    for state, step in zip(held, (3, 5, 8, 10, 12), strict=True):
        assert_equal_states(state, recorder.states[step])
    name = "stem.conv1.weight"
    assert len({state[name].sum().item() for state in held}) == 5
    assert [taken for _, taken in recorder.number_taken] == [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4]


def test_removed_weights_are_zero_in_every_snapshot(recorded):
    folder, _ = recorded
    state = load_file(folder.weights)
    removed = {name: mask for name, mask in state.items() if name.endswith("_removed")}
    assert {name.partition(".paths")[0] for name in removed if ".paths" in name} == {
        "current", *(f"slots.{number}" for number in range(4))
    }  # fmt: skip
    for name, mask in removed.items():
        assert not state[name.removesuffix("_removed")][mask].any()
    assert sum(int(mask.sum()) for mask in removed.values()) > 1000


class Stop(Callback):
    """Presses Ctrl-C in the third epoch, after the snapshot of its second step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 11:
            raise KeyboardInterrupt


def test_killed_and_resumed_ends_bit_identical(recorded, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(settings(SNAPSHOT, 5), tmp_path / "run", progress=False, callbacks=[Stop()])
    finally:
        signal.signal(signal.SIGINT, handler)
    recorder = Recorder()
    train(settings(SNAPSHOT, 5), tmp_path / "run", progress=False, resume=True, callbacks=[recorder])
    assert recorder.number_taken == [(9, 3), (10, 4), (11, 4), (12, 4)]
    folder, _ = recorded
    assert_equal_states(load_file(RunFolder(tmp_path / "run").weights), load_file(folder.weights))
    assert RunFolder(tmp_path / "run").metrics.read_text("utf-8") == folder.metrics.read_text("utf-8")


def test_fge_with_accumulated_batches_takes_each_snapshot_once_at_its_step(tmp_path):
    config = settings(replace(FGE, cycling=0.5), 3, accumulate=2)
    recorder = Recorder()
    train(config, tmp_path / "run", progress=False, callbacks=[recorder])
    network, _ = RunFolder(tmp_path / "run").load_network()
    assert isinstance(network, Snapshots)
    # 6 steps of 2 batches; lows at 1/2 + 1/10, + 3/10 and + 5/10: steps 3.6, 4.8 and 6.
    assert dict(recorder.number_taken) == {0: 0, 1: 0, 2: 0, 3: 0, 4: 1, 5: 2, 6: 2}
    for slot, step in zip(network.slots, (4, 5), strict=True):
        # Batch-norm statistics move with every batch, so that only those of the step's own batch are meant.
        weights = {name: tensor for name, tensor in slot.state_dict().items() if "running" not in name}
        for name in (name for name in weights if name.endswith("weight")):
            assert torch.equal(weights[name], recorder.states[step][name]), name


@pytest.mark.parametrize("name", ["snapshot", "fge"])
def test_what_is_refused(name, tmp_path):
    config = MethodConfig(name)
    with pytest.raises(ValueError, match=f"^exits must be at least 2 with method={name}, got 1$"):
        find_method(config).build(plan(exits=1))
    with pytest.raises(ValueError, match=f"^ema must be left out with method={name}, got 0.9; it would"):
        train(settings(config, 2, ema=0.9), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("config", "too_few"), [(SNAPSHOT, 2), (FGE, 12)])
def test_trainings_too_short_for_different_snapshots_are_refused(config, too_few):
    (hook,) = find_method(config).hooks(3, TrainingConfig())
    hook.on_train_start(too_few + 1, epochs=1)
    assert len({*hook.steps, too_few + 1}) == 3
    message = rf"^epochs must be enough for 3 different snapshots, got 1 \({too_few} steps\)$"
    with pytest.raises(ValueError, match=message):
        hook.on_train_start(too_few, epochs=1)


def test_cycling_outside_its_range_is_refused():
    for cycling in (0.0, 1.5):
        with pytest.raises(
            ValueError, match=rf"^cycling must be a share of the epochs, in \(0, 1\], got {cycling}$"
        ):
            find_method(replace(FGE, cycling=cycling))
    with pytest.raises(ValueError, match=r"^cycling must be 0\.2 unless method=fge, got 0\.5$"):
        find_method(replace(SNAPSHOT, cycling=0.5))
