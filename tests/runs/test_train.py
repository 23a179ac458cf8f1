import copy
import csv
import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

import netfission.cli
from netfission.cli import main
from netfission.config import RECIPES
from netfission.data.splits import CorruptImageError
from netfission.evaluation import cascade
from netfission.models import create_model
from netfission.runs.evaluate import evaluate
from netfission.runs.folder import RunFolder
from netfission.runs.lightning_module import LARGEST_NLL, DivergedError, TrainingModule
from netfission.runs.train import train
from netfission.utils.checksums import archive_damage


def rows_of(path):
    with RunFolder(path).metrics.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def state_of(path):
    return load_file(RunFolder(path).weights)


def assert_equal_states(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_training_learns(finished_run):
    rows = rows_of(finished_run)
    assert rows[-1]["train/ensemble"] > rows[0]["train/ensemble"] > 0.15
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_evaluating_again_repeats_the_figures(finished_run):
    folder = RunFolder(finished_run)
    before = folder.evaluation.read_text("utf-8")
    evaluation = evaluate(folder, folder.load_config())
    assert folder.load_evaluation() == evaluation
    assert folder.evaluation.read_text("utf-8") == before
    assert evaluation.n == 359
    assert len(evaluation.exits) == 2


def test_the_same_settings_give_the_same_network(finished_run, tmp_path, settings_of):
    train(settings_of(), tmp_path / "again", progress=False)
    assert_equal_states(state_of(finished_run), state_of(tmp_path / "again"))
    train(settings_of(seed=4), tmp_path / "other", progress=False)
    name = "stem.conv1.weight"
    assert not torch.equal(state_of(finished_run)[name], state_of(tmp_path / "other")[name])


def test_channels_are_dealt_by_what_the_training_images_say_of_them(tmp_path):
    flags = "--data digits --limit_per_class 5 --model wrn-10-1 --epochs 1 --exits 2"
    flags += " --grouping channels --assignment importance --pruning_batches 1"
    assert main(["train", *flags.split(), "--out", str(tmp_path / "run")]) == 0


FROM_WEIGHTS = "--data digits --limit-per-class 5 --model wrn-10-1 --exits 2 --grouping channels --epochs 1"


def test_a_run_from_a_file_of_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    trained = create_model("wrn-10-1", 7, in_channels=1)
    torch.save({"module." + name: tensor for name, tensor in trained.state_dict().items()}, "net.pt")
    flags = [*FROM_WEIGHTS.split(), "--weights", "net.pt", "--learning-rate", "1e-9", "--weight-decay", "0"]
    assert main(["train", *flags, "--out", "run"]) == 0
    path = tmp_path / "net.pt"
    assert f"\nloaded 44 of 46 tensors from {path} (prefix module.); new weights: fc.weight, fc.bias\n" in (
        capsys.readouterr().out
    )
    folder = RunFolder(tmp_path / "run")
    assert folder.load_config().model.weights == str(path)
    report = folder.load_weights_report()
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (report.loaded, report.new) == (44, ("fc.weight", "fc.bias"))
    stem = load_file(folder.weights)["stem.conv1.weight"]
    assert torch.allclose(stem, trained.get_parameter("conv1.weight"), atol=1e-6)

    path.unlink()  # a finished run does without
    evaluation = folder.evaluation.read_bytes()
    folder.evaluation.unlink()
    assert main(["evaluate", "run"]) == 0
    assert folder.evaluation.read_bytes() == evaluation
    assert main(["train", *flags, "--out", "run", "--resume"]) == 0


def test_resuming_with_other_weights_under_the_name_is_refused(tmp_path, capsys):
    path, out = tmp_path / "net.pt", str(tmp_path / "run")
    torch.save(create_model("wrn-10-1", 10, in_channels=1).state_dict(), path)
    flags = [*FROM_WEIGHTS.split(), "--weights", str(path), "--out", out]
    assert main(["train", *flags]) == 0
    RunFolder(tmp_path / "run").weights.unlink()  # as if it had been stopped
    assert main(["train", *flags, "--resume"]) == 0
    RunFolder(tmp_path / "run").weights.unlink()
    others = {name: tensor + 1 for name, tensor in torch.load(path).items()}
    torch.save(others, path)
    capsys.readouterr()
    assert main(["train", *flags, "--resume"]) == 2
    error = capsys.readouterr().err
    assert "--weights must be the file that the run began with (SHA-256 " in error
    assert f"got {path} with other content" in error
    assert RunFolder(tmp_path / "run").config.is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--weights none.pt", "none.pt must be a file of weights (safetensors, or a state dict saved by"),
        ("--weights none.pt --pretrained true", "--weights must be left out with pretrained, which loads"),
    ],
)
def test_weights_that_cannot_be_read_leave_no_run(flags, message, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *FROM_WEIGHTS.split(), *flags.split(), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_run_from_the_folder_of_a_run(tmp_path):
    flags = "--data digits --limit-per-class 5 --model wrn-10-1 --epochs 1"
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", *flags.split(), "--exits", "1", "--out", str(first)]) == 0
    second_flags = f"--exits 2 --weights {first} --learning-rate 1e-9 --weight-decay 0 --grouping copies"
    assert main(["train", *flags.split(), *second_flags.split(), "--out", str(second)]) == 0
    before, after = state_of(first), state_of(second)
    for name in ("stem.conv1.weight", "paths.0.head.fc.weight"):
        assert torch.allclose(before[name], after[name], atol=1e-6)
    assert RunFolder(second).load_weights_report().new == ()


@pytest.fixture(scope="module")
def parent_run(tmp_path_factory):
    """A single network that has learnt the digits."""
    out = tmp_path_factory.mktemp("parent") / "run"
    flags = "--data digits --model wrn-10-1 --exits 1 --epochs 8 --schedule one_cycle"
    assert main(["train", *flags.split(), "--out", str(out)]) == 0
    return out


# So small steps that the network ends as it begins.
CHILD = (
    "--data digits --limit-per-class 60 --model wrn-10-1 --grouping channels --epochs 1 --learning-rate 1e-9 "
    "--weight-decay 0"
)


def test_reconstruction_keeps_what_the_network_knows(parent_run, tmp_path):
    metrics = {"parent": RunFolder(parent_run).load_evaluation().ensemble}
    for name in ("false", "true"):
        flags = [*CHILD.split(), "--weights", str(parent_run), "--out", str(tmp_path / name)]
        assert main(["train", *flags, "--reconstruct", name]) == 0
        metrics[name] = RunFolder(tmp_path / name).load_evaluation().ensemble
    assert metrics["true"]["top1"] > metrics["parent"]["top1"] - 0.02
    assert metrics["true"]["top1"] > metrics["false"]["top1"]
    assert metrics["true"]["nll"] < 0.4 * metrics["false"]["nll"]


def test_the_network_before_teaches_beside_an_average_and_in_mixed_precision(parent_run, tmp_path):
    flags = [*CHILD.split(), "--weights", str(parent_run), "--limit-per-class", "30", "--batch-size", "50"]
    losses = {}
    for name, more in {
        "alone": "",
        "taught": "--parent-weight 2",
        "averaged": "--parent-weight 2 --ema 0.9",
        "mixed": "--parent-weight 2 --precision bf16-mixed",
    }.items():
        out = tmp_path / name
        assert main(["train", *flags, *more.split(), "--out", str(out)]) == 0
        losses[name] = rows_of(out)[0]["train/loss"]
        state = state_of(out)
        assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}
        assert state.keys() == state_of(tmp_path / "alone").keys()  # without the teacher
    assert losses["averaged"] == losses["taught"] > losses["alone"] + 0.1
    assert losses["mixed"] == pytest.approx(losses["taught"], rel=0.03)
    assert losses["mixed"] != losses["taught"]


def test_the_network_before_teaches(parent_run, tmp_path):
    flags = [*CHILD.split(), "--weights", str(parent_run), "--reconstruct", "true"]
    losses = []
    for weight in ("0", "2"):
        out = tmp_path / weight
        assert main(["train", *flags, "--parent-weight", weight, "--out", str(out)]) == 0
        losses.append(rows_of(out)[0]["train/loss"])
        checkpoint = torch.load(RunFolder(out).checkpoint, weights_only=False)
        assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"network"}
    assert losses[1] > losses[0]
    single = [*CHILD.replace("--grouping channels", "--exits 1").split(), "--weights", str(parent_run)]
    for weight in ("0", "2"):  # a network that starts as its teacher has nothing to learn from it but noise
        out = tmp_path / f"single {weight}"
        assert main(["train", *single, "--parent-weight", weight, "--out", str(out)]) == 0
        losses.append(rows_of(out)[0]["train/loss"])
    assert losses[2] < losses[3] < losses[1]


@pytest.mark.usefixtures("undrawn_figures")
def test_a_run_with_linear_exits_is_trained_loaded_reported_and_exported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cascade, "IMAGES_PER_ROUND", {1: 1})
    monkeypatch.setattr(cascade, "MIN_ROUNDS", 2)
    monkeypatch.setattr(cascade, "MAX_ROUNDS", 2)
    out = tmp_path / "run"
    flags = "--data digits --limit-per-class 10 --model wrn-10-1 --grouping channels --epochs 1 --exits 2"
    flags += " --branch-after [2] --linear-exits [1,block2]"
    assert main(["train", *flags.split(), "--out", str(out)]) == 0
    folder = RunFolder(out)
    network, spec = folder.load_network()
    assert spec.predictions == 4 == len(folder.load_evaluation().exits)
    assert torch.equal(
        network.state_dict()["paths.3.head.linear.weight"], state_of(out)["paths.3.head.linear.weight"]
    )
    again = evaluate(folder, folder.load_config())
    assert again == folder.load_evaluation()
    for command in (
        ["evaluate", str(out), "--cascade"],
        ["report", str(out), "--out", str(tmp_path / "report.html")],
        ["export", str(out), "--format", "pt2", "--out", str(tmp_path / "net.pt2")],
    ):
        assert main(command) == 0, command


def test_the_network_before_is_not_copied_with_what_it_teaches(settings_of):
    parent = create_model("wrn-10-1", 10)
    module = TrainingModule(create_model("wrn-10-1", 10), settings_of().training, parent=parent)
    assert copy.deepcopy(module)._parent.module is parent is module._parent.module
    assert not any("parent" in name for name in module.state_dict())
    assert not any(parameter.requires_grad for parameter in parent.parameters())


def test_a_network_before_that_no_file_holds_cannot_teach(tmp_path, settings_of):
    with pytest.raises(ValueError, match=r"^parent_weight must be 0 unless weights is given, got 1.0$"):
        train(settings_of(parent_weight=1.0), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_file_without_a_classifier_of_the_classes_cannot_teach(tmp_path, capsys):
    path = tmp_path / "net.pt"
    torch.save(create_model("wrn-10-1", 7, in_channels=1).state_dict(), path)
    flags = [*CHILD.split(), "--weights", str(path), "--parent-weight", "1", "--out", str(tmp_path / "run")]
    assert main(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert "--weights must be of a network trained on the 10 classes of the data, with parent_weight" in error
    assert "net.pt, with a classifier of 7 classes; train it first" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "schedule": "cosine", "clip": 1.0},
        {"precision": "bf16-mixed", "channels_last": True, "schedule": "one_cycle"},
        {"accumulate": 2, "mix": "cutmix", "validation": 0.0},
        {"ema": 0.9, "mix": "mixup", "distillation_weight": 0.0},
        {"compile": True, "grouping": "copies", "sparsity": 0.0, "exits": 3},
        {"optimizer": "lamb", "layer_decay": 0.75, "warmup": 0.2},
        {"label_smoothing": 0.1, "balance": "weights", "mix": "cutmix", "patience": 1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_options_work_together_and_keep_removed_weights_at_zero(tmp_path, settings_of, monkeypatch, changes):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled(f, backend="eager"))
    evaluation = train(settings_of(**changes), tmp_path / "run", progress=False)
    assert evaluation.n == 359
    state = state_of(tmp_path / "run")
    removed = {name: mask for name, mask in state.items() if name.endswith("_removed")}
    assert bool(removed) == (changes.get("sparsity") != 0.0)
    for name, mask in removed.items():
        assert not state[name.removesuffix("_removed")][mask].any()
    assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())


def test_an_average_of_weights_is_what_is_saved(tmp_path, settings_of, finished_run):
    train(settings_of(ema=0.99), tmp_path / "run", progress=False)
    name = "paths.0.head.fc.weight"
    assert not torch.equal(state_of(finished_run)[name], state_of(tmp_path / "run")[name])


class Poison(Callback):
    """Makes a weight NaN at one step."""

    def __init__(self, step=6):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.network.stem.conv1.weight.fill_(float("nan"))


def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_last_checkpoint(tmp_path, settings_of):
    with pytest.raises(DivergedError, match=r"at step 6 \(epoch 2\)"):
        train(settings_of(epochs=3), tmp_path / "run", progress=False, callbacks=[Poison()])
    folder = RunFolder(tmp_path / "run")
    checkpoint = torch.load(folder.checkpoint)
    assert checkpoint["global_step"] == 4
    assert all(t.isfinite().all() for t in checkpoint["state_dict"].values() if t.is_floating_point())
    assert len(rows_of(tmp_path / "run")) == 1
    # What is kept is enough to go on from.
    train(settings_of(epochs=3), tmp_path / "run", progress=False, resume=True)
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == [1, 2, 3]


class Stop(Callback):
    """Presses Ctrl-C at one step, or has another error there."""

    def __init__(self, error=KeyboardInterrupt, step=6):
        self.error = error
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise self.error


@pytest.mark.parametrize(
    ("error", "step", "stays"),
    [
        (CorruptImageError("gone"), 1, True),
        (ValueError("spoilt"), 6, True),
        (ValueError("refused"), 0, False),
    ],
)
def test_a_run_stays_if_its_images_vanish_or_an_epoch_has_ended(tmp_path, settings_of, error, step, stays):
    with pytest.raises(type(error), match=str(error)):
        train(settings_of(), tmp_path / "run", progress=False, callbacks=[Stop(error, step)])
    assert (tmp_path / "run").exists() == stays


thorough = partial(pytest.param, marks=pytest.mark.thorough)
# Settings under which a run that was stopped goes on to the same bits.
RESUMED = [
    {},
    thorough({"optimizer": "lamb", "layer_decay": 0.75, "warmup": 0.5}),
    {"label_smoothing": 0.1, "balance": "sampler", "patience": 1, "ema": 0.9},
    thorough({"crop_scale": 0.5, "rand_augment": 5, "color_jitter": 0.3, "erase": 0.3, "flip": True}),
    thorough(
        {"drop_path": 0.5, "model": "test_resnet", "image_size": 32, "sparsity": 0.0, "balance": "weights"}
    ),
    {**RECIPES["finetune"], "epochs": 2, "batch_size": 50},
]


@pytest.mark.parametrize("changes", RESUMED, ids=lambda changes: "-".join(list(changes)[:4]))
def test_stopped_by_hand_it_can_go_on(tmp_path, settings_of, changes):
    config = settings_of(**{**changes, "limit_per_class": 10, "batch_size": 25})  # 4 steps each epoch
    train(config, tmp_path / "whole", progress=False)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", progress=False, callbacks=[Stop()])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(rows_of(tmp_path / "run")) == 1
    train(config, tmp_path / "run", progress=False, resume=True)
    assert_equal_states(state_of(tmp_path / "whole"), state_of(tmp_path / "run"))
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "run")


STAGES = {
    "data": "netfission.runs.train.load_run_data",
    "building": "netfission.runs.train.build_network",
    "step": "netfission.runs.lightning_module.TrainingModule.training_step",
    "checkpoint": "netfission.runs.callbacks.WholeCheckpoints.save_checkpoint",
    "saving": "netfission.runs.folder.RunFolder.save_network",
    "evaluation": "netfission.runs.train.evaluate",
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_any_stage_is_one_line_and_its_status(
    tmp_path, monkeypatch, capsys, stage, signum, status
):
    """`run_process` sets this answer to SIGTERM."""
    monkeypatch.setattr("netfission.cli._signal", 0)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, netfission.cli._stop_when_told)
    flags = training(tmp_path / "run", "--limit_per_class", "5", "--batch_size", "30", "--epochs", "1")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(STAGES[stage], lambda *_, **__: os.kill(os.getpid(), signum))
            assert main(flags) == status
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    begun = stage not in ("data", "building")
    effect = "with --resume goes on" if begun else "starts over"
    assert capsys.readouterr().err == f"netfission: stopped; the same command {effect}\n"
    assert main([*flags, *(["--resume"] if begun else [])]) == 0


class Validated(Callback):
    """Notes the weights that are validated, and sets the NLL of each epoch."""

    def __init__(self, nlls):
        self.nlls = nlls
        self.states = {}

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = pl_module.network.state_dict()
        self.states[trainer.current_epoch] = {name: tensor.clone() for name, tensor in state.items()}
        sums = pl_module.running["val"].sums
        sums[1] = sums[0] * self.nlls[trainer.current_epoch]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_patience_keeps_the_weights_of_the_lowest_validation_nll(tmp_path, settings_of, capsys, ema):
    config = settings_of(epochs=6, patience=2, ema=ema, limit_per_class=10)
    validated = Validated([3.0, 2.0, 2.5, 2.0, 1.0, 1.0])
    train(config, tmp_path / "run", callbacks=[validated])
    assert [row["val/nll"] for row in rows_of(tmp_path / "run")] == [3.0, 2.0, 2.5, 2.0]
    assert_equal_states(state_of(tmp_path / "run"), validated.states[1])
    assert "kept epoch 2 of 4, with the lowest validation NLL (2.000)" in capsys.readouterr().out
    assert any(
        not torch.equal(validated.states[1][name], tensor) for name, tensor in validated.states[3].items()
    )


def test_a_run_that_stopped_early_and_lost_its_result_stops_again(tmp_path, settings_of):
    config = settings_of(epochs=6, patience=1, limit_per_class=10)
    train(config, tmp_path / "run", progress=False, callbacks=[Validated([1.0, 2.0])])
    before = state_of(tmp_path / "run")
    RunFolder(tmp_path / "run").weights.unlink()
    train(config, tmp_path / "run", progress=False, resume=True)
    assert len(rows_of(tmp_path / "run")) == 2
    assert_equal_states(state_of(tmp_path / "run"), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 0.0}, "patience must be left out unless validation is above 0, got 2"),
        (
            {"method": "snapshot", "sparsity": 0.0},
            "patience must be left out with method=snapshot, whose training must reach its end, got 2",
        ),
        (
            {"method": "deep-ensemble", "one_by_one": True},
            "patience must be left out with one_by_one, got 2",
        ),
    ],
)
def test_patience_is_refused_where_no_epoch_can_be_chosen(tmp_path, settings_of, changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(settings_of(patience=2, **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_paths_are_dropped_in_training_alone(tmp_path, settings_of):
    settings = {"model": "test_resnet", "grouping": "channels", "sparsity": 0.0, "epochs": 1}
    settings |= {"image_size": 32, "batch_size": 25, "limit_per_class": 10}
    losses = []
    for drop_path in (0.0, 0.5):
        folder = RunFolder(tmp_path / str(drop_path))
        first = train(settings_of(**settings, drop_path=drop_path), folder.path, progress=False)
        losses.append(rows_of(folder.path)[0]["train/loss"])
        assert evaluate(folder, folder.load_config()) == first  # the network that is loaded drops none
    assert losses[0] != losses[1]


def test_layers_get_rates_of_their_own(tmp_path, settings_of):
    rates = {}

    class Rates(Callback):
        def on_train_start(self, trainer, pl_module):
            names = {id(parameter): name for name, parameter in pl_module.network.named_parameters()}
            for group in trainer.optimizers[0].param_groups:
                rates.update({names[id(parameter)]: group["initial_lr"] for parameter in group["params"]})

    config = settings_of(epochs=1, layer_decay=0.5)
    train(config, tmp_path / "run", progress=False, callbacks=[Rates()])
    assert rates["paths.1.head.fc.weight"] == 0.1
    assert rates["stem.conv1.weight"] == pytest.approx(0.1 * 0.5**5)
    assert rows_of(tmp_path / "run")[0]["learning_rate"] < 0.1


def test_resuming_what_has_ended_changes_nothing(tmp_path, settings_of):
    first = train(settings_of(ema=0.9), tmp_path / "run", progress=False)
    before = RunFolder(tmp_path / "run").weights.read_bytes()
    assert train(settings_of(ema=0.9), tmp_path / "run", progress=False, resume=True) == first
    assert RunFolder(tmp_path / "run").weights.read_bytes() == before


def test_a_run_starts_again_from_its_own_settings_file(finished_run, tmp_path):
    more = ["--config", str(RunFolder(finished_run).config), "--out", str(tmp_path / "run")]
    assert main(["train", *more]) == 0
    assert_equal_states(state_of(finished_run), state_of(tmp_path / "run"))


class FillsTheDisk(Callback):
    """From epoch 2 on no file can be put in its place."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:

            def full(self, target):
                raise OSError(errno.ENOSPC, "No space left on device")

            self.monkeypatch.setattr(Path, "replace", full)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, settings_of, monkeypatch):
    with pytest.raises(OSError, match="No space left"):
        train(settings_of(), tmp_path / "run", progress=False, callbacks=[FillsTheDisk(monkeypatch)])
    monkeypatch.undo()
    folder = RunFolder(tmp_path / "run")
    assert torch.load(folder.checkpoint)["global_step"] == 4
    assert not list(folder.path.rglob("*.tmp"))
    train(settings_of(), folder.path, progress=False, resume=True)
    assert len(rows_of(folder.path)) == 2


@pytest.fixture
def interrupted(tmp_path, settings_of) -> RunFolder:
    """A run of which one epoch is done."""
    with pytest.raises(DivergedError):
        train(settings_of(), tmp_path / "run", progress=False, callbacks=[Poison()])
    return RunFolder(tmp_path / "run")


def damage(path: Path, how: str) -> None:
    """Damage a file as a disk or a crash may: cut it, zero a page, or flip a bit of what is in its middle."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if how == "cut":
        del content[middle:]
    elif how == "page":
        content[middle : middle + 4096] = bytes(4096)
    else:
        content[middle] ^= 4
    path.write_bytes(content)


def test_a_checkpoint_of_a_run_with_other_settings_is_refused(interrupted, settings_of):
    """One of an earlier version does not say of which it is."""
    checkpoint = torch.load(interrupted.checkpoint)
    assert checkpoint["settings"] == interrupted.settings_sha256()
    torch.save(checkpoint | {"settings": "0" * 64}, interrupted.checkpoint)
    message = r"last\.ckpt must be a checkpoint of the run in .*, got one of a run with other settings;"
    with pytest.raises(ValueError, match=message):
        train(settings_of(), interrupted.path, progress=False, resume=True)
    del checkpoint["settings"]
    torch.save(checkpoint, interrupted.checkpoint)
    train(settings_of(), interrupted.path, progress=False, resume=True)


@pytest.mark.parametrize("how", ["cut", "page", "bit"])
def test_a_damaged_checkpoint_is_named(interrupted, settings_of, how):
    damage(interrupted.checkpoint, how)
    if how == "page":  # the one before, too
        shutil.copy(interrupted.checkpoint, interrupted.previous_checkpoint)
    with pytest.raises(ValueError, match=r"last\.ckpt must be a checkpoint, got a damaged file \("):
        train(settings_of(), interrupted.path, progress=False, resume=True)


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_ends_in_the_same_bits(tmp_path, settings_of):
    config = settings_of(epochs=3)
    train(config, tmp_path / "whole", progress=False)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(DivergedError):
        train(config, folder.path, progress=False, callbacks=[Poison(step=9)])
    kept = [torch.load(path)["global_step"] for path in (folder.checkpoint, folder.previous_checkpoint)]
    assert kept == [8, 4]
    damage(folder.checkpoint, "bit")
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged .* goes on from previous\.ckpt, one epoch"):
        train(config, folder.path, progress=False, resume=True)
    assert_equal_states(state_of(tmp_path / "whole"), state_of(folder.path))
    assert rows_of(tmp_path / "whole") == rows_of(folder.path)
    assert not folder.previous_checkpoint.exists()


def test_a_kill_between_two_checkpoints_leaves_the_one_before(interrupted, settings_of, monkeypatch):
    """The last one has become the one before, and the new one has not taken its place."""
    interrupted.checkpoint.replace(interrupted.previous_checkpoint)
    assert interrupted.resumable() == interrupted.previous_checkpoint


@pytest.mark.parametrize("at", [1, 2, None])
@pytest.mark.filterwarnings("ignore:.* is damaged")
def test_processes_of_one_training_may_all_put_the_sound_checkpoint_in_its_place(
    interrupted, monkeypatch, at
):
    """Another one does it while this one looks at the first, or at the second; or none does."""
    shutil.copy(interrupted.checkpoint, interrupted.previous_checkpoint)
    sound = interrupted.checkpoint.read_bytes()
    interrupted.checkpoint.write_bytes(sound[:-100])
    looked_at = []

    def look(path):
        damage = archive_damage(path)
        looked_at.append(path)
        if len(looked_at) == at:
            interrupted.previous_checkpoint.replace(interrupted.checkpoint)
        return damage

    monkeypatch.setattr("netfission.runs.folder.archive_damage", look)
    assert interrupted.resumable() == interrupted.checkpoint
    assert interrupted.checkpoint.read_bytes() == sound


def test_resuming_with_other_threads_is_warned_of(interrupted, settings_of):
    text = interrupted.config.read_text("utf-8").replace("# checksum", "# was")
    interrupted.config.write_text(re.sub("# threads: .*", "# threads: 64", text))
    message = r"^the run began with 64 CPU threads and goes on with \d+, so that .*; OMP_NUM_THREADS=64 keeps"
    with pytest.warns(UserWarning, match=message):
        train(settings_of(), interrupted.path, progress=False, resume=True)


def test_two_processes_do_not_train_in_one_folder(interrupted, settings_of):
    """Nor does the second one take a checkpoint that is just being moved for damaged, which would warn."""
    interrupted.checkpoint.rename(interrupted.previous_checkpoint)
    interrupted.checkpoint.write_bytes(b"a part")
    with (
        interrupted.locked(),
        pytest.raises(ValueError, match="out must be a folder in which no other process trains"),
    ):
        train(settings_of(), interrupted.path, progress=False, resume=True)


def test_evaluating_a_run_that_has_not_ended_says_so(interrupted):
    with pytest.raises(ValueError, match="must be a finished run, got one without config"):
        evaluate(interrupted, interrupted.load_config())


def test_weights_that_diverge_in_the_last_step_are_not_saved(tmp_path, settings_of):
    with pytest.raises(DivergedError, match="try a lower learning_rate"):
        train(settings_of(epochs=1, learning_rate=1e6), tmp_path / "run", progress=False)
    assert not RunFolder(tmp_path / "run").weights.exists()


@pytest.mark.parametrize("validation", [0.0, 0.1])
def test_a_last_step_that_ruins_finite_weights_ends_like_any_divergence(tmp_path, capsys, validation):
    flags = ["--learning-rate", "100", "--epochs", "1", "--sparsity", "0", "--batch-size", "200"]
    assert main(training(tmp_path / "run", *flags, "--validation", str(validation))) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"netfission: the trained network's NLL is \d\.\d\de\+\d\d after the last step; try a lower "
        r"learning_rate or clip=1\n",
        error,
    )
    assert not RunFolder(tmp_path / "run").weights.exists()


class Grows(Callback):
    """Makes the weights of the heads larger at the start of each epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        with torch.no_grad():
            for name, weight in pl_module.network.named_parameters():
                if name.endswith("head.weight") or "head.fc.weight" in name or ".fc." in name:
                    weight.mul_(1e5)


def test_a_loss_that_grows_without_nan_stops(tmp_path, settings_of):
    config = settings_of(epochs=4, learning_rate=1e-9)
    with pytest.raises(DivergedError, match=r"the NLL of the training images grows, from .* in epoch 2; try"):
        train(config, tmp_path / "run", progress=False, callbacks=[Grows()])
    assert len(rows_of(tmp_path / "run")) == 1
    module = TrainingModule(torch.nn.Identity(), config.training)
    for nll, before in ((1e6, {}), (1e6, {"train/nll": 1e7}), (900, {"train/nll": 1.0})):  # it may recover
        module.stop_if_growing({"train/nll": nll}, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_precision_that_does_not_run_here_is_refused(tmp_path, settings_of):
    with pytest.raises(ValueError, match="precision must be 32-true or bf16-mixed without a GPU, got"):
        train(settings_of(precision="16-mixed"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_network_that_only_lacks_running_statistics_is_kept(tmp_path, settings_of):
    # After two steps those of 22 layers are far from the statistics of a batch, by which the NLL is 5.
    settings = {"model": "wrn-22-1", "exits": 1, "sparsity": 0.0, "epochs": 1, "learning_rate": 4.0}
    evaluation = train(settings_of(**settings, limit_per_class=10), tmp_path / "run", progress=False)
    assert evaluation is not None and evaluation.ensemble["nll"] > LARGEST_NLL
    running = {name: tensor for name, tensor in state_of(tmp_path / "run").items() if "running_var" in name}
    assert running and all((variance != 1).any() for variance in running.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_in_one_line(tmp_path, settings_of):
    with pytest.raises(ValueError, match=r"what this machine has, got accelerator='gpu', devices=1 \("):
        train(settings_of(accelerator="gpu"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_failure_before_training_leaves_no_folder_behind(tmp_path, settings_of):
    with pytest.raises(ValueError, match="exits must be at most 3, one per stage"):
        train(settings_of(exits=9), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def training(out, *more):
    flags = "--data digits --limit_per_class 40 --model wrn-10-1 --exits 2 --sparsity 0.5 --epochs 3"
    return ["train", *flags.split(), "--batch_size", "16", "--accelerator", "cpu", "--out", str(out), *more]


def test_killed_in_epoch_2_and_resumed_ends_bit_identical(tmp_path):
    few = ["--limit_per_class", "10", "--batch_size", "30"]
    assert main(training(tmp_path / "whole", *few)) == 0
    whole = rows_of(tmp_path / "whole")
    code = """
import os, signal, sys
from netfission.cli import main
from netfission.runs.lightning_module import TrainingModule

step = TrainingModule.training_step

def training_step(self, *arguments):
    if self.trainer.global_step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)

TrainingModule.training_step = training_step
main(sys.argv[2:])
"""
    folder = RunFolder(tmp_path / "killed")
    at_step = str(int(whole[0]["step"] + whole[1]["step"]) // 2)  # in the middle of epoch 2
    killed = subprocess.run(
        [sys.executable, "-c", code, at_step, *training(folder.path, *few)], capture_output=True
    )
    (folder.path / f".model.safetensors.{2**22 + 1}-0123abcd.tmp").touch()  # as if killed amid a write
    (folder.checkpoint.parent / f".last.ckpt.{2**22 + 1}-0123abcd.tmp").touch()
    (folder.path / f".of another version.{2**22 + 1}-0123abcd.tmp").touch()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not folder.weights.exists()
    assert len(rows_of(folder.path)) == 1
    assert main(training(folder.path, *few, "--resume")) == 0
    assert not list(folder.path.rglob("*.tmp"))
    assert_equal_states(state_of(tmp_path / "whole"), state_of(folder.path))
    assert folder.metrics.read_text("utf-8") == RunFolder(tmp_path / "whole").metrics.read_text("utf-8")
    assert folder.evaluation.read_text("utf-8") == RunFolder(tmp_path / "whole").evaluation.read_text("utf-8")


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29523"]


@pytest.mark.parametrize(
    "launcher",
    [pytest.param([], id="lightning", marks=pytest.mark.thorough), pytest.param(TORCHRUN, id="torchrun")],
)
def test_two_processes_train_one_network(tmp_path, launcher):
    out = tmp_path / "run"
    devices = [] if launcher else ["--devices", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "netfission", *training(out, *devices, "--epochs", "2")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("writing to") == done.stdout.count("epoch 1/2") == 1
    assert RunFolder(out).load_config().training.devices == 2
    steps = [row["step"] for row in rows_of(out)]
    assert steps == [12, 24]  # 360 images over two processes in batches of 16
    state = state_of(out)
    for name, mask in state.items():
        if name.endswith("_removed"):
            assert not state[name.removesuffix("_removed")][mask].any()
    assert rows_of(out)[-1]["train/ensemble"] > 0.5


def test_a_training_of_few_steps_is_remarked_on(tmp_path, capsys):
    command = "train --data digits --model wrn-10-1 --exits 2 --limit-per-class 2 --batch-size 8"
    assert main([*command.split(), "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    assert "note: the training has only 3 steps; a smaller batch_size or more" in capsys.readouterr().out


def test_batches_of_one_image_are_refused_before_the_training_if_a_batch_norm_cannot_use_them(
    tmp_path, capsys
):
    out = tmp_path / "run"
    command = f"train --data digits --model wrn-10-1 --image-size 4 --batch-size 1 --out {out}"
    assert main(command.split()) == 2
    assert "--batch-size must be at least 2 for this network, got 1; Exp" in capsys.readouterr().err
    assert not out.exists()
