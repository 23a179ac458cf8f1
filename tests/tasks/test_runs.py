"""Labels, numbers and classes of pixels, from data to a prediction: the whole path, and what is refused."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from PIL import Image

from netfission.classifier import Classifier, Predictor
from netfission.classifier.folder import ModelFolder
from netfission.cli import main
from netfission.config import RunConfig
from netfission.runs.evaluate import evaluate
from netfission.runs.folder import RunFolder
from netfission.runs.setup import check_run
from netfission.runs.train import train
from netfission.tasks.registry import TASKS, find_task

OTHERS = [name for name in TASKS if not find_task(name, ["a"]).targets.exclusive]
WITH_TABLE = [name for name in OTHERS if not find_task(name, ["a"]).targets.masks]


@pytest.mark.parametrize("task", OTHERS)
def test_a_run_is_evaluated_and_calibrated(run_of, task):
    folder = RunFolder(run_of(task))
    spec = folder.load_spec(any_task=True)
    evaluation = spec.find_task().evaluation_kind.from_json(folder.evaluation.read_text("utf-8"))
    assert (evaluation.n, len(evaluation.exits), spec.task, spec.format) == (20, 2, task, 2)
    assert evaluation.calibrated is not None
    assert folder.load_calibration_of(spec).n == 20
    assert not folder.reliability.exists()
    names = set(folder.load_metrics()[-1])
    assert {"train/exit0", "train/exit1", "train/ensemble", "train/nll", "val/nll"} <= names


@pytest.mark.parametrize("name", TASKS)
def test_progress_has_the_unit_of_its_axis(name):
    task = find_task(name, ["a"])
    unit = " %" if task.progress_title.endswith(", %") else ""
    assert task.shown(0.5) == f"{task.progress_factor / 2:.{1 if unit else 3}f}{unit}"


def test_what_can_be_learned_is_learned(run_of):
    labels = json.loads((run_of("multilabel") / "evaluation.json").read_text("utf-8"))
    assert labels["ensemble"]["map"] > 0.9
    numbers = json.loads((run_of("regression") / "evaluation.json").read_text("utf-8"))
    assert numbers["ensemble"]["mae"] < 0.2  # 0.27 for the mean of all images
    pixels = json.loads((run_of("segmentation") / "evaluation.json").read_text("utf-8"))
    assert pixels["ensemble"]["mean_iou"] > 0.4  # 0.18 for one class everywhere


@pytest.mark.filterwarnings("always::UserWarning")
@pytest.mark.parametrize("task", WITH_TABLE)
def test_a_table_that_has_moved_is_known_again(run_of, tables, settings_for, tmp_path, capsys, task):
    moved = tmp_path / "moved"
    shutil.copytree(tables, moved)
    table = moved / Path(settings_for(task).data.data).name
    assert main(["evaluate", str(run_of(task)), "--data", str(table)]) == 0
    capsys.readouterr()
    first, *others = table.read_text("utf-8").splitlines()
    table.write_text("\n".join([first, *reversed(others[:2]), *others[2:]]).replace("0.png,0,", "0.png,1,"))
    out = tmp_path / "figures.json"  # now it is other data, as for classes
    command = ["evaluate", str(run_of(task)), "--data", str(table), "--out", str(out)]
    assert main(command) == 0 and out.is_file()
    trained_on = "have the same content as images that the network was trained on"
    assert trained_on not in capsys.readouterr().err
    assert main([*command, "--split", "train"]) == 0
    assert trained_on in capsys.readouterr().err


def test_a_table_whose_targets_have_changed_is_refused(settings_for, tables, tmp_path):
    shutil.copytree(tables, tmp_path / "tables")
    table = tmp_path / "tables" / "numbers.csv"
    table.write_text(re.sub(r"(?m),\w+$", "", table.read_text("utf-8")))  # no splits: they are cut
    config = settings_for("regression", data=str(table), epochs=1)
    train(config, tmp_path / "run", progress=False)
    table.write_text(re.sub(r"(?m)^0\.png,[\d.]+", "0.png,0.33", table.read_text("utf-8")))
    with pytest.raises(ValueError, match=r"with \d+ train images, got .* with as many with other targets"):
        evaluate(RunFolder(tmp_path / "run"), config)


@pytest.mark.parametrize("task", OTHERS)
def test_another_evaluation_gives_the_same_file(run_of, task):
    folder = RunFolder(run_of(task))
    before = folder.evaluation.read_bytes(), folder.calibration.read_bytes()
    evaluate(folder, folder.load_config())
    assert (folder.evaluation.read_bytes(), folder.calibration.read_bytes()) == before


def test_labels_are_predicted(run_of, tables, capsys):
    images = [str(tables / "61.png"), str(tables / "none.png")]
    assert main(["predict", str(run_of("multilabel")), *images, "--format", "jsonl"]) == 1
    record, failure = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(record) == [
        "image",
        "labels",
        "probabilities",
        "disagreement",
        "entropy",
        "mutual_information",
    ]
    thresholds = json.loads((run_of("multilabel") / "calibration.json").read_text("utf-8"))["thresholds"]
    shares = record["probabilities"]
    assert record["labels"] == [
        name for name, least in zip(("red", "green"), thresholds, strict=True) if shares[name] >= least
    ]
    assert failure["error"] == "no such file or directory"


def test_numbers_are_predicted_with_intervals(run_of, tables, tmp_path):
    out = tmp_path / "numbers.csv"
    command = ["predict", str(run_of("regression")), str(tables / "61.png"), "--coverage", "0.8"]
    assert main([*command, "--out", str(out)]) == 0
    (row,) = csv.DictReader(out.read_text("utf-8").splitlines())
    assert list(row) == [
        "image",
        "mean_blue",
        "std_blue",
        "disagreement_blue",
        "low_blue",
        "high_blue",
        "coverage",
        "error",
    ]
    assert float(row["low_blue"]) < float(row["mean_blue"]) < float(row["high_blue"])
    assert row["coverage"] == "0.8"


@pytest.mark.parametrize("task", OTHERS)
def test_a_table_shows_predictions_to_people(run_of, tables, capsys, task):
    assert main(["predict", str(run_of(task)), str(tables / "1.png")]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.startswith("image") and "disagreement" in header and len(line) > 40


@pytest.mark.parametrize("task", OTHERS)
def test_a_predictor_gives_what_the_network_gave(run_of, tables, tmp_path, task):
    network, spec = ModelFolder(run_of(task)).load_network(any_task=True)
    predictor = Predictor.from_pretrained(run_of(task))
    with Image.open(tables / "5.png") as image:
        pixels = predictor.pixels(image)[None]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    with torch.no_grad():
        expected = network((pixels / 255 - mean) / std)
    torch.testing.assert_close(predictor.logits(pixels), expected)
    assert len(predictor.predict(pixels).records()) == 1
    predictor.save_pretrained(tmp_path / "copy")
    again = Predictor.from_pretrained(tmp_path / "copy")
    assert again.predict(pixels).records() == predictor.predict(pixels).records()
    assert again.calibration == predictor.calibration
    with torch.no_grad():
        next(again.network.parameters()).mul_(1.01)  # as further training would
    with pytest.raises(ValueError, match=r"^calibration must be of the network's weights, got one of others"):
        again.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="save_directory must be another folder than a run's"):
        predictor.save_pretrained(run_of(task))


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("multilabel", "multi-exit"),
        ("regression", "deep-ensemble"),
        ("regression", "treenet"),
        ("segmentation", "deep-ensemble"),
        ("segmentation", "treenet"),
        ("segmentation", "multi-exit"),
    ],
)
def test_baselines_are_trained(settings_for, tmp_path, method, task):
    config = settings_for(task, method=method, epochs=1, grouping="weights")
    evaluation = train(config, tmp_path / "run", progress=False)
    assert len(evaluation.exits) == 2
    assert Predictor.from_pretrained(tmp_path / "run").spec.method_name == method


@pytest.mark.parametrize("task", ["regression", "segmentation"])
def test_an_interrupted_run_goes_on_to_the_same_weights(settings_for, run_of, tmp_path, task):
    def interrupt(trainer, module):
        if trainer.current_epoch == 1:
            raise InterruptedError

    stop = LambdaCallback(on_train_epoch_start=interrupt)
    with pytest.raises(InterruptedError):
        train(settings_for(task), tmp_path / "run", progress=False, callbacks=[stop])
    train(settings_for(task), tmp_path / "run", progress=False, resume=True)
    files = [path / "model.safetensors" for path in (tmp_path / "run", run_of(task))]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_is_not_resumed_with_another_task(settings_for, run_of):
    other = RunConfig.from_dict(settings_for("multilabel").to_dict() | {"task": "regression"})
    with pytest.raises(ValueError, match="task must be 'multilabel', as in"):
        train(other, run_of("multilabel"), progress=False, resume=True)


def test_weights_of_a_run_of_another_task_are_refused(settings_for, tmp_path):
    single = tmp_path / "single"
    train(settings_for("multilabel", exits=1, epochs=1), single, progress=False)
    config = settings_for("regression", exits=1, epochs=1, weights=str(single))
    with pytest.raises(ValueError, match="weights must be those of a run of task=regression"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": "cutmix"}, "mix must be 'none' with task=regression"),
        ({"label_smoothing": 0.1}, "label_smoothing must be 0.0 with task=regression"),
        ({"limit_per_class": 5}, "limit_per_class must be left out with task=regression"),
        ({"temperature": 2.0}, "temperature must be 3.0 with task=regression"),
        ({"method": "mimo"}, "method must be deep-ensemble or fission or multi-exit or treenet"),
        ({"sparsity": 0.5}, "criterion must be .* with task=regression, got 'snip'"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings_for, changes, message):
    with pytest.raises(ValueError, match=message):
        check_run(settings_for("regression", **changes))


def test_weights_can_be_pruned_by_criteria_that_read_no_labels(settings_for):
    check_run(settings_for("regression", sparsity=0.5, criterion="magnitude"))


def test_an_unknown_task_is_refused(capsys):
    assert main(["train", "--task", "multilable"]) == 2
    assert "--task must be one of classification, multilabel, regression, segmentation, got 'multilable'" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("task", OTHERS)
@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "--ood", "inverted", "--feature-detectors", "knn"],
        ["predict", "a.png", "--risk", "0"],
        ["predict", "a.png", "--delta", "0"],
    ],
    ids=" ".join,
)
def test_what_is_only_for_classes_is_refused_in_one_line(run_of, capsys, command, task):
    name, *arguments = command
    assert main([name, str(run_of(task)), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"task={task}" in error


@pytest.mark.parametrize("task", OTHERS)
def test_a_network_is_not_evaluated_on_a_data_set_by_name(run_of, capsys, task):
    assert main(["evaluate", str(run_of(task)), "--data", "digits"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "digits" in error


def test_the_other_kind_of_reader_is_named(run_of, finished_run):
    with pytest.raises(ValueError, match="task=multilabel"):
        Classifier.from_pretrained(run_of("multilabel"))
    with pytest.raises(ValueError, match=r"netfission\.Classifier reads it"):
        Predictor.from_pretrained(finished_run)


def test_the_description_of_a_classifier_is_as_before(finished_run):
    content = json.loads((finished_run / "config.json").read_text("utf-8"))
    assert content["format"] == 1 and not {"task", "scale"} & content.keys()
    assert not {"targets", "exclusive"} & json.loads((finished_run / "data.json").read_text("utf-8")).keys()


def test_a_data_set_by_name_has_no_such_targets(settings_for, tmp_path):
    with pytest.raises(ValueError, match=r"data must be a table of paths and numbers .* got 'digits'"):
        train(settings_for("regression", data="digits"), tmp_path / "run", progress=False)


@pytest.mark.parametrize("name", ["multilabel", "regression"])
def test_a_network_of_maps_is_refused_for_whole_images(name):
    maps = torch.nn.Conv2d(3, 2, 1)
    with pytest.raises(
        ValueError, match=f"a network of whole images with task={name}, got net, whose output"
    ):
        find_task(name, ["a"]).check_model("net", maps, (3, 8, 8))
