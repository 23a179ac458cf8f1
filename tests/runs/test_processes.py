"""A training in processes that torchrun or SLURM has started."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

import netfission.runs.train
from netfission.cli import main
from netfission.config import RunConfig, TrainingConfig
from netfission.runs.callbacks import SameCheckpoint
from netfission.runs.setup import with_processes


def launched(monkeypatch, launcher, devices, machines):
    """As if a launcher had started this process among others."""
    processes = str(devices * machines)
    environment = {
        "torchrun": {
            "TORCHELASTIC_RUN_ID": "1",
            "LOCAL_WORLD_SIZE": str(devices),
            "WORLD_SIZE": processes,
        },
        "srun": {"SLURM_STEP_NUM_TASKS": processes, "SLURM_STEP_NUM_NODES": str(machines)},
    }[launcher]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_devices_and_machines_are_those_of_the_processes(launcher, monkeypatch):
    launched(monkeypatch, launcher, devices=4, machines=2)
    training = with_processes(RunConfig()).training
    assert (training.devices, training.machines) == (4, 2)
    assert with_processes(RunConfig(training=training), {"devices", "machines"}).training == training
    one = RunConfig(training=TrainingConfig(devices=2))
    with pytest.raises(
        ValueError, match=f"devices must be 4, as {launcher} has started, got 2; leave it out"
    ):
        with_processes(one)
    with pytest.raises(ValueError, match=f"machines must be 2, as {launcher} has started, got 1; leave it"):
        with_processes(RunConfig(), {"machines"})


def test_one_process_of_a_launcher_is_no_contradiction(monkeypatch):
    launched(monkeypatch, "srun", devices=1, machines=1)
    assert with_processes(RunConfig(training=TrainingConfig(devices=2))).training.devices == 2


@pytest.mark.parametrize("command", ["evaluate", "reproduce", "finetune"])
def test_other_commands_are_refused_in_several_processes(command, monkeypatch, capsys):
    launched(monkeypatch, "torchrun", devices=2, machines=1)
    assert main([command, "x"]) == 2
    expected = (
        f"netfission: netfission {command} must be started as one process, got 2 processes of torchrun\n"
    )
    assert expected in capsys.readouterr().err


def test_contradicting_flags_are_refused_before_anything_is_written(monkeypatch, tmp_path, capsys):
    launched(monkeypatch, "torchrun", devices=2, machines=1)
    out = tmp_path / "run"
    assert main(["train", "--devices", "1", "--out", str(out)]) == 2
    assert "--devices must be 2, as torchrun has started, got 1; leave it out" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("contents", [(b"epoch 2", None), (None, b"epoch 2"), (b"epoch 2", b"epoch 1")])
def test_a_checkpoint_that_a_process_lacks_is_refused_by_all(contents, tmp_path):
    callbacks = []
    for rank, content in enumerate(contents):
        path = tmp_path / f"{rank}.ckpt"
        if content is not None:
            path.write_bytes(content)
        callbacks.append(SameCheckpoint(None if content is None else path))
    sent, equal = [], []
    strategy = SimpleNamespace(
        broadcast=lambda digest: sent.append(digest) or sent[0],  # that of the first process
        reduce_boolean_decision=lambda same: equal.append(same) or False,
    )
    expected = "^out must be a folder that all machines share, to resume its run, got "
    for callback, found in zip(callbacks, ("one that another process lacks", "another"), strict=True):
        with pytest.raises(ValueError, match=expected + found):
            callback.setup(SimpleNamespace(world_size=2, strategy=strategy), None, "fit")
    assert equal == [True, False]


def test_one_process_needs_no_other_to_resume(tmp_path):
    SameCheckpoint(tmp_path / "last.ckpt").setup(SimpleNamespace(world_size=1), None, "fit")


def test_several_machines_are_refused_where_nothing_was_started_on_the_others(monkeypatch):
    config = RunConfig(training=TrainingConfig(machines=5))
    with pytest.raises(
        ValueError, match="machines must be 1 for a command that is started by itself, got 5; let"
    ):
        with_processes(config)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")  # by hand, as Lightning reads it
    assert with_processes(config) is config


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_training_that_is_stuck_ends_the_processes_that_it_started(world_size, monkeypatch):
    called, killed = [], []

    def recorded(clean_up, message):
        called.append(message)
        clean_up()
        return nullcontext()

    monkeypatch.setattr(netfission.runs.train, "ended_if_stuck", recorded)
    launcher = SimpleNamespace(procs=[SimpleNamespace(kill=lambda: killed.append(True))])
    strategy = SimpleNamespace(launcher=launcher)
    with netfission.runs.train._never_stuck(SimpleNamespace(world_size=world_size, strategy=strategy)):
        pass
    several = world_size > 1
    assert called == ["stopped; the same command with --resume goes on"] * several
    assert killed == [True] * several
