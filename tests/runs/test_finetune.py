import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from netfission.classifier import Classifier
from netfission.cli import main
from netfission.config import RunConfig
from netfission.models import WeightsReport, create_model, read_weights
from netfission.profiling.cost import count
from netfission.report import write_report
from netfission.report.style import render_svg
from netfission.runs.callbacks import Stopwatch
from netfission.runs.evaluate import load_matching_data
from netfission.runs.folder import RunFolder
from netfission.runs.setup import load_run_data, other_classes
from netfission.runs.train import train

FLAGS = [
    *("digits", "--limit-per-class", "5", "--model", "wrn-10-1", "--pretrained", "false"),
    *("--batch-size", "25", "--epochs", "2", "--ensemble-epochs", "2", "--accelerator", "cpu", "--out"),
]


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory) -> Path:
    """The folder of a fine-tuning; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["finetune", *FLAGS, str(out)]) == 0
    return out


@pytest.fixture
def copied(finetuned, tmp_path, monkeypatch) -> Path:
    """A copy of it, whose settings name the copy's single network."""
    out = tmp_path / "run"
    shutil.copytree(finetuned, out)
    config = RunFolder(out).config
    moved = config.read_text("utf-8").replace(str(finetuned), str(out)).replace("# checksum", "# was")
    config.write_text(moved)
    return out


@pytest.fixture
def other_digits(tmp_path) -> Path:
    """40 images of noise with the classes of digits."""
    folder = tmp_path / "others"
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        (folder / str(number % 10)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / str(number % 10) / f"{number}.png")
    return folder


@pytest.fixture
def no_page(monkeypatch):
    """Spares the time to draw it."""
    monkeypatch.setattr("netfission.report.write_report", lambda runs, page, data=None: page)


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a finished step is repeated")

    monkeypatch.setattr("netfission.runs.finetune.train", refuse)


def without(names: str) -> list[str]:
    """The flags of a fine-tuning without some of them."""
    flags = list(FLAGS)
    for name in names.split():
        del flags[(at := flags.index(name)) : at + 2]
    return flags


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(RunFolder(out).weights)


def assert_equal(first: Path, second: Path) -> None:
    one, other = weights_of(first), weights_of(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_ensemble_starts_from_the_single_network_which_teaches_it(finetuned):
    folder, single = RunFolder(finetuned), RunFolder(finetuned).single
    config, report = folder.load_config(), folder.load_weights_report()
    assert config.model.weights == report.path == str(single.path)
    assert (report.loaded, report.new) == (46, ())
    assert config.training.parent_weight == 1 and config.fission.reconstruct
    assert config.data == single.load_config().data
    assert single.load_config().training.epochs == config.training.epochs == 2
    network, spec = folder.load_fission()
    assert network.exits == 3 and spec.fission["exits"] == 1
    assert network.branch_after == (2, 2)  # of three stages
    assert single.load_fission()[0].exits == 1


def test_every_figure_is_of_the_mean_by_weights(finetuned):
    folder = RunFolder(finetuned)
    data = load_run_data(folder.load_config().data, 0)
    classifier = Classifier.from_pretrained(finetuned)
    logits = classifier.logits(data.test.images)
    weights = torch.tensor([1, 0.3, 0.3])[:, None]
    mean = (logits * weights).sum(dim=1) / weights.sum()
    nll = F.cross_entropy(mean, data.test.labels).item()
    assert folder.load_evaluation().ensemble["nll"] == pytest.approx(nll, rel=1e-5)
    assert folder.load_evaluation().other_average["nll"] == pytest.approx(
        F.cross_entropy(logits.mean(dim=1), data.test.labels).item(), rel=1e-5
    )
    scaled = mean / folder.load_calibration().temperature
    nll = F.cross_entropy(scaled, data.test.labels).item()
    assert folder.load_reliability().scaled.metrics["nll"] == pytest.approx(nll, rel=1e-5)
    logits, labels = classifier.logits(data.validation.images), data.validation.labels
    nll = F.cross_entropy((logits * weights).sum(dim=1) / weights.sum(), labels).item()
    assert float(folder.metrics.read_text("utf-8").splitlines()[-1].split(",")[-2]) == pytest.approx(
        nll, rel=1e-5
    )
    torch.testing.assert_close(classifier.predict(data.test.images).probabilities, scaled.softmax(dim=1))


def test_the_gain_is_that_of_the_two_runs(finetuned, capsys):
    folder, single = RunFolder(finetuned), RunFolder(finetuned).single
    gain = folder.load_gain()
    assert gain.n == 359
    for figures, run in ((gain.single, single), (gain.ensemble, folder)):
        network, _ = run.load_network()
        size = count(network, torch.zeros(1, 1, 8, 8)).size
        assert figures.metrics == run.load_reliability().scaled.metrics
        assert (figures.parameters, figures.macs) == (size.parameters_stored, size.macs_dense)
        assert figures.seconds == Stopwatch(run.training_time).read() > 0
        assert (figures.weights, figures.calibrated_on) == (run.weights_sha256(), "145 validation images")
        assert figures.temperature == run.load_calibration().temperature
    test = load_run_data(folder.load_config().data, 0).test
    single_loss, loss = (
        -Classifier.from_pretrained(run.path)
        .predict(test.images)
        .probabilities[range(359), test.labels]
        .log()
        for run in (single, folder)
    )
    assert gain.errors["nll"] == pytest.approx((loss - single_loss).std().item() / 359**0.5, rel=1e-3)
    assert gain.errors["ece"] > 0
    assert gain.ensemble.predictions == 3
    assert all(0 < time.lower <= time.median <= time.upper for time in gain.time.values())


def test_the_same_command_repeats_nothing_and_says_the_same(finetuned, no_training, capsys):
    before = {file: file.read_bytes() for file in finetuned.rglob("*") if file.is_file()}
    assert main(["finetune", *FLAGS, str(finetuned)]) == 0
    assert {file: file.read_bytes() for file in finetuned.rglob("*") if file.is_file()} == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"step 1 of 3: the single network is finished, in {finetuned / 'single'}"
    assert lines[1] == f"step 2 of 3: the ensemble is finished, in {finetuned}"
    gain = RunFolder(finetuned).load_gain()
    assert "\n".join(lines[3:-1]) == f"{gain.table()}\n{gain.summary()}"
    assert gain.summary().startswith("better than the single network: NLL ")


def test_the_page_has_both_networks(finetuned, tmp_path):
    page = RunFolder(finetuned).report.read_text("utf-8")
    assert "2 runs on digits" in page
    assert "one exit and 2 linear exits" in page
    assert "is the mean of the exits’ logits weighted 1 : 0.3 : 0.3" in page
    for name in ("exit 0", "exit 1 (linear)", "exit 2 (linear)"):
        for end in (" alone</th>", "</th>", "</text>"):  # metrics, cost by stage, diagram
            assert f">{name}{end}" in page
    assert "Linear exits: 1, 2." in page
    assert "(linear)" not in write_report(
        [RunFolder(finetuned).single.path], tmp_path / "page.html"
    ).read_text("utf-8")


def test_the_report_of_a_fine_tuning_has_both_networks(copied, other_digits, monkeypatch):
    blank = render_svg(lambda: Figure((1, 1)))
    monkeypatch.setattr("netfission.report.plots.render_svg", lambda draw: blank)
    folder = RunFolder(copied)
    by_finetune = folder.report.read_text("utf-8")
    assert main(["report", str(copied)]) == 0
    page = folder.report.read_text("utf-8")
    assert "<title>2 runs on digits" in page and "<title>2 runs on digits" in by_finetune
    assert page.count("<h2") == by_finetune.count("<h2")
    assert main(["calibrate", str(copied), "--data", str(other_digits)]) == 0
    assert main(["report", str(copied)]) == 0
    page = folder.report.read_text("utf-8")
    assert "on validation images after every epoch (n = 145)" in page
    assert "every epoch (n = 40)" not in page
    shutil.rmtree(folder.single.path)
    assert [run.path for run in folder.shown_together()] == [copied]


def test_only_what_is_missing_is_done(copied, finetuned, no_training, monkeypatch):
    def times(networks, images):
        return {name: [0.1 * network(images).shape[1]] * 3 for name, network in networks.items()}

    monkeypatch.setattr("netfission.runs.finetune.inference_times", times)
    folder = RunFolder(copied)
    folder.gain.unlink()
    folder.report.unlink()
    assert main(["finetune", *FLAGS, str(copied)]) == 0
    assert folder.load_gain().ensemble == RunFolder(finetuned).load_gain().ensemble
    assert [time.median for time in folder.load_gain().time.values()] == pytest.approx([3, 3])  # not 1/3
    assert folder.report.is_file()


def test_a_gain_of_another_calibration_is_stale_and_measured_anew(
    copied, other_digits, no_training, no_page, capsys
):
    folder, single = RunFolder(copied), RunFolder(copied).single
    before = folder.load_gain()
    stale = f"with the calibration before: {folder.gain}; `netfission finetune` again renews it"
    assert main(["calibrate", str(copied)]) == 0
    assert stale not in capsys.readouterr().out  # it is the same
    assert main(["calibrate", str(single.path), "--data", str(other_digits)]) == 0
    assert stale in capsys.readouterr().out
    assert main(["calibrate", str(copied), "--data", str(other_digits)]) == 0
    assert stale in capsys.readouterr().out
    assert main(["finetune", *FLAGS, str(copied)]) == 0
    out, gain = capsys.readouterr().out, folder.load_gain()
    assert "on 359 test images, calibrated on 40 images of others (too few for more than a guess); ±" in out
    for figures, run in ((gain.single, single), (gain.ensemble, folder)):
        assert figures.metrics == run.load_reliability().scaled.metrics
    assert gain.ensemble.metrics["nll"] != before.ensemble.metrics["nll"]
    assert folder.current_gain() == gain
    for content in (
        "{}",
        folder.gain.read_text("utf-8").replace(gain.single.weights, "ab").replace("checksum", "x"),
    ):
        folder.gain.write_text(content)
        assert folder.current_gain() is None


def test_networks_that_cannot_be_deployed_are_reported_without_their_time(
    copied, no_training, no_page, monkeypatch, capsys
):
    def fail(*_):
        raise RuntimeError("no\nway")

    folder = RunFolder(copied)
    expected = folder.load_gain()
    folder.gain.unlink()
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("always")
        patch.setattr("netfission.runs.finetune.deploy", fail)
        assert main(["finetune", *FLAGS, str(copied)]) == 0
    captured, gain = capsys.readouterr(), folder.load_gain()
    effect = "the time of inference is not measured, as deployment failed: no; the same command tries again"
    assert captured.err == f"netfission: warning: {effect}\n"
    assert (gain.single, gain.ensemble, gain.time) == (expected.single, expected.ensemble, {})
    assert f"{gain.table()}\n{gain.summary()}" in captured.out
    assert main(["finetune", *FLAGS, str(copied)]) == 0
    assert folder.load_gain().time.keys() == expected.time.keys()


@pytest.mark.parametrize("step", ["single", "ensemble"])
def test_a_stopped_command_goes_on_with_the_same_result_where_its_folder_is_now(
    step, finetuned, tmp_path, no_page, capsys
):
    out = tmp_path / "run"

    start_epoch = Stopwatch.on_train_epoch_start

    def stop(watch, trainer, pl_module):
        is_single = watch.path.parent.name == "single"
        if trainer.current_epoch == 1 and is_single == (step == "single"):
            raise KeyboardInterrupt
        start_epoch(watch, trainer, pl_module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stopwatch, "on_train_epoch_start", stop)
        assert main(["finetune", *FLAGS, str(out)]) == 130
    assert capsys.readouterr().err.endswith("netfission: stopped; the same command goes on\n")
    assert RunFolder(out).single.weights.is_file() == (step == "ensemble")
    assert not RunFolder(out).weights.is_file()
    out = out.rename(tmp_path / "moved")
    assert main(["finetune", *FLAGS, str(out)]) == 0
    first_epochs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 1/2")]
    assert ["exit2" in line for line in first_epochs] == ([True] if step == "single" else [])
    assert all(re.search(r"  ensemble \d+\.\d %  loss \d", line) for line in first_epochs)
    assert_equal(RunFolder(out).single.path, RunFolder(finetuned).single.path)
    assert_equal(out, finetuned)


def test_a_network_that_was_half_taken_over_when_it_was_killed_is_taken_over(
    finetuned, tmp_path, no_page, capsys
):
    out = tmp_path / "run"
    command = [
        *("finetune", *without("--model --pretrained --epochs"), str(out)),
        *("--finetuned", str(RunFolder(finetuned).single.path)),
    ]
    assert main(command) == 0
    single = RunFolder(out).single
    for file in single.path.iterdir():
        file.unlink()
    assert main(command) == 0
    assert single.weights.is_file()
    single.reliability.unlink()
    assert main(command) == 0
    assert single.reliability.is_file()


def test_what_is_stopped_before_its_first_step_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    monkeypatch.setattr("netfission.runs.train.load_run_data", stop)
    assert main(["finetune", *FLAGS, str(out)]) == 130
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 3", "--epochs must be 2, as in {out}/single/config.yaml, got 3"),
        ("--ensemble-epochs 3", "--ensemble-epochs must be 2, as in {out}/config.yaml, got 3"),
        ("--seed 1", "--seed must be 0, as in {out}/single/config.yaml, got 1"),
        ("--exits 2", "--exits must be 1, as in {out}/config.yaml, got 2"),
        ("--parent-weight 0.5", "--parent-weight must be 1.0, as in {out}/config.yaml, got 0.5"),
    ],
)
def test_going_on_with_other_settings_is_refused(flags, message, finetuned, no_training, capsys):
    assert main(["finetune", *FLAGS, str(finetuned), *flags.split()]) == 2
    expected = f"{message.format(out=finetuned)}; a run resumes with the settings it began with"
    assert capsys.readouterr().err == f"netfission: {expected}\n"


def test_the_settings_file_of_a_single_network_repeats_it(copied, no_training, capsys):
    config = RunFolder(copied).single.config
    flags = [
        "--config",
        str(config),
        *without("--limit-per-class --model --pretrained --batch-size --epochs"),
    ]
    assert main(["finetune", *flags, str(copied)]) == 0  # else the settings are refused as others
    assert "step 1 of 3: the single network is finished" in capsys.readouterr().out
    assert main(["finetune", *flags, str(copied), "--learning-rate", "0.01"]) == 2
    assert "learning_rate must be 0.0005" in capsys.readouterr().err.replace(
        "--learning-rate", "learning_rate"
    )


def test_a_damaged_single_network_is_named(copied, no_training, capsys):
    weights = RunFolder(copied).single.weights
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["finetune", *FLAGS, str(copied)]) == 2
    assert f"netfission: {weights} must be as it was written, got other content" in capsys.readouterr().err


def test_the_settings_file_of_an_ensemble_is_refused(finetuned, tmp_path, capsys):
    config = RunFolder(finetuned).config
    assert main(["finetune", "digits", "--config", str(config), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        f"netfission: {config} must be settings of a single network, got those of an ensemble; of a "
        "fine-tuning give single/config.yaml, and the ensemble's settings as flags\n"
    )


def test_the_folder_of_another_run_is_refused(finished_run, capsys):
    before = sorted(finished_run.rglob("*"))
    assert main(["finetune", *FLAGS, str(finished_run)]) == 2
    expected = f"a new or empty folder, or that of a fine-tuning, got {finished_run}, which holds another run"
    assert capsys.readouterr().err == f"netfission: --out must be {expected}\n"
    assert sorted(finished_run.rglob("*")) == before


def test_a_run_of_one_exit_is_taken_as_it_is(finetuned, finished_run, tmp_path, no_page, capsys):
    out, single = tmp_path / "run", RunFolder(finetuned).single.path
    flags = without("--model --pretrained --epochs")
    assert main(["finetune", *flags, str(out), "--finetuned", str(single)]) == 0
    assert_equal(RunFolder(out).single.path, single)
    gain, trained = RunFolder(out).load_gain(), RunFolder(finetuned).load_gain()
    assert gain.single.metrics == trained.single.metrics  # of the same test and validation images
    assert gain.single.seconds is None and "training" not in gain.summary()
    assert_equal(out, finetuned)
    assert not RunFolder(out).single.config.exists()  # it was not trained there
    assert "warning" not in capsys.readouterr().err
    again = ["finetune", *flags, str(out)]
    assert main([*again, "--finetuned", str(single)]) == 0
    assert "step 1 of 3: the single network is finished" in capsys.readouterr().out
    moved = shutil.copytree(single, tmp_path / "elsewhere" / "single")
    assert main([*again, "--finetuned", str(moved)]) == 0
    assert "step 1 of 3: the single network is finished" in capsys.readouterr().out
    assert main([*again, "--finetuned", str(finished_run), "--model", "wrn-10-1"]) == 2
    assert "; what a run begins with may move if its name and content stay" in capsys.readouterr().err
    assert main([*again, "--model", "wrn-10-1", "--pretrained", "false"]) == 2
    error = capsys.readouterr().err
    assert (
        f"--finetuned must be {str(single)!r}, as in {RunFolder(out).single.weights_report}, got None; "
        in error
    )


def test_a_file_of_a_trained_network_is_taken_as_it_is(tmp_path, no_page, capsys):
    file, out = tmp_path / "net.pt", tmp_path / "run"
    torch.save(create_model("wrn-10-1", 10, in_channels=1).state_dict(), file)
    flags = without("--pretrained --epochs")
    flags += [str(out), "--finetuned", str(file), "--mean", "[0.3]", "--std", "[0.25]"]
    assert main(["finetune", *flags]) == 0
    normalised = "its images are normalised by the mean 0.3 and the standard deviation 0.25\n"
    assert normalised in capsys.readouterr().out
    taken = weights_of(RunFolder(out).single.path)
    assert torch.equal(taken["stem.conv1.weight"], torch.load(file)["conv1.weight"])


def test_a_run_that_was_trained_on_held_out_images_is_taken_with_a_warning(
    finetuned, tmp_path, no_page, capsys
):
    single, out = RunFolder(finetuned).single.path, tmp_path / "run"
    flags = [*without("--model --pretrained --epochs"), str(out), "--seed", "1"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["finetune", *flags, "--finetuned", str(single)]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "same content" in line]
    assert warned == [  # once, not again of the ensemble
        "netfission: warning: 12 of 145 validation images of digits (such as row 79) have the same content "
        f"as training images of {single}, from which the network starts, so its calibration is too "
        "confident; seed=0 and validation=0.1, as in that run, keep them apart"
    ]
    for run in (RunFolder(out), RunFolder(out).single):
        assert "another validation split" in run.load_calibration().dependence


def test_a_training_from_a_run_warns_of_held_out_images_that_it_was_trained_on(finetuned, tmp_path):
    single = RunFolder(finetuned).single
    values = single.load_config().to_dict() | {"weights": str(single.path), "seed": 1, "epochs": 1}
    with pytest.warns(UserWarning, match="12 of 145 validation images of digits .* have the same content as"):
        train(RunConfig.from_dict(values), tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 3", "--epochs must be left out with finetuned, got 3; the single network is not trained"),
        ("--weights net.pt", "--weights must be left out with finetuned, got "),
        (
            "--exits 3",
            "--finetuned must be a network with a classifier of the 10 classes, got {file}, with a "
            "classifier of 7 classes; give it as weights instead, and the single network is trained on ",
        ),
    ],
)
def test_a_trained_network_that_does_not_suit_is_refused(flags, message, tmp_path, capsys):
    file, out = tmp_path / "net.pt", tmp_path / "run"
    torch.save(create_model("wrn-10-1", 7, in_channels=1).state_dict(), file)
    given = [*without("--pretrained --epochs"), str(out), "--finetuned", str(file), *flags.split()]
    assert main(["finetune", *given]) == 2
    assert message.format(file=file) in capsys.readouterr().err
    assert not out.exists()


def test_classes_that_differ_are_named(finetuned, other_digits, tmp_path, capsys):
    (other_digits / "7").rename(other_digits / "seven")
    single = RunFolder(finetuned).single.path
    flags = ["--accelerator", "cpu", "--out", str(tmp_path / "run"), "--finetuned"]
    config = RunFolder(finetuned).single.load_config().to_dict() | {
        "data": str(other_digits),
        "validation": 0.5,
    }
    data = load_run_data(RunConfig.from_dict(config).data, 0)
    weights = replace(read_weights(single), path="net")
    for classes, expected in (
        (tuple(data.classes), "net, trained on classes in another order"),
        (weights.classes, "net, trained on classes without seven and with 7"),
        (None, "net, with a classifier of 10 classes"),
    ):
        report = WeightsReport("net", "", 44, new=("fc.weight", "fc.bias"))
        assert other_classes(report, replace(weights, classes=classes), data) == expected
    bare = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith("fc.")}
    assert (
        other_classes(report, replace(weights, classes=None, tensors=bare), data)
        == "net, without a classifier"
    )
    assert main(["finetune", str(other_digits), *flags, str(single)]) == 2
    expected = (
        f"--finetuned must be a network for images of 3 channels, as these have, got {single}, for 1 channel"
    )
    assert capsys.readouterr().err == f"netfission: {expected}\n"


def test_a_run_is_not_evaluated_on_other_classes_which_are_named(finetuned):
    folder = RunFolder(finetuned)
    config, (_, spec) = folder.load_config(), folder.load_fission()
    data = load_run_data(config.data, 0)
    with pytest.raises(
        ValueError, match=r"^data must be .* 10 classes in .*, got 'digits' without 9 and with nine$"
    ):
        load_matching_data(folder, config, spec, replace(data, classes=[*data.classes[:-1], "nine"]))
