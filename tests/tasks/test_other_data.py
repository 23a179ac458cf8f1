"""Networks of labels, numbers and pixels on other data than their own: figures, and what is refused."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from netfission.cli import main
from netfission.data.mask_folders import VOID
from netfission.data.matched import load_matched_targets
from netfission.data.matched_masks import load_matched_masks
from netfission.data.targets import LABELS, NUMBERS
from netfission.runs.folder import RunFolder

NAMES = ["ground", "red", "blue"]


def write_masks(folder, photographs, change, names):
    """Write photographs and their masks, whose numbers are changed, into `images` and `masks`."""
    table = np.array([change.get(number, number) for number in range(256)], np.uint8)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for photograph in photographs:
        shutil.copy(photograph, folder / "images")
        mask = np.asarray(Image.open(photograph.parents[1] / "masks" / photograph.name))
        Image.fromarray(table[mask]).save(folder / "masks" / photograph.name)
    if names:
        (folder / "classes.txt").write_text("\n".join(names))
    return folder


def write_table(path, tables, change):
    """Write a table of the rows of another, each as `change` gives them, with full paths."""
    with (tables / path.name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    changed = [change(row) for row in rows if row["split"] == "test"]
    paths = [str(tables / row["path"]) for row in rows if row["split"] == "test"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", *changed[0]])
        writer.writeheader()
        writer.writerows({"path": name, **cells} for name, cells in zip(paths, changed, strict=True))
    return path


@pytest.fixture
def test_images_of(tables, tmp_path):
    """Task → its test images as another data set, in another order of classes, with more than they are."""

    def other(task):
        if task == "segmentation":
            images = sorted((tables / "masks" / "test" / "images").iterdir())
            names = ["void", "blue", "boat", "ground", "red"]
            return write_masks(tmp_path / "seas", images, {0: 3, 1: 4, 2: 1, 255: 0}, names)
        if task == "multilabel":
            return write_table(
                tmp_path / "labels.csv",
                tables,
                lambda row: {"new": 0, "green": row["green"], "red": row["red"]},
            )
        return write_table(tmp_path / "numbers.csv", tables, lambda row: {"new": 1, "blue": row["blue"]})

    return other


@pytest.mark.parametrize("task", ["multilabel", "regression", "segmentation"])
def test_test_images_in_another_place_and_order_have_the_figures_of_the_run(
    task, run_of, test_images_of, tmp_path, capsys
):
    run, other = RunFolder(Path(shutil.copytree(run_of(task), tmp_path / task))), test_images_of(task)
    before = {file.name: file.read_bytes() for file in run.path.glob("*.json")}
    assert main(["evaluate", str(run.path), "--data", str(other)]) == 0
    told = capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in run.path.glob("*.json")} == before
    figures, own = run.load_target_evaluation_of(str(other)), json.loads(before["evaluation.json"])
    known = run.load_spec(any_task=True)
    assert (figures.data, figures.split, figures.n) == (str(other), "all", 20)
    assert (figures.classes, figures.left_out) == (known.classes, 0)
    for name in ("ensemble", "calibrated", "uncertainty"):
        assert getattr(figures.evaluation, name) == pytest.approx(own[name], rel=1e-5), name
    for name, measures in own["by_target"].items():
        assert figures.evaluation.by_target[name] == pytest.approx(measures, rel=1e-5)
    noun, count = known.find_task().targets.noun, len(known.classes)
    assert f": all 20 images, {count} of the network's {count} {noun}" in told
    assert figures.unknown == ([] if task == "segmentation" else ["new"])
    assert ("left out, as it does not know them: new" in told) == bool(figures.unknown)
    assert figures.evaluation.table() in told and "the run's own figures stay as they are" in told
    assert main(["evaluate", str(run.path), "--data", str(other), "--cascade"]) == 2
    assert "--cascade must be left out if --data is another data set" in capsys.readouterr().err


def test_masks_may_have_fewer_classes_and_another_size_and_void_is_the_folders_own(tables, tmp_path):
    photograph = tables / "masks" / "test" / "images" / "61.png"
    mask = torch.from_numpy(np.array(Image.open(photograph.parents[1] / "masks" / "61.png"))).long()
    expected = torch.tensor([2, 0, VOID] + [VOID] * 253)[
        mask
    ]  # ground is sky, red is ground, blue has no class
    for names, void in (("sky ground void", None), ("sky ground boat", 2), (None, 2)):
        folder = write_masks(tmp_path / f"{names}{void}", [photograph], {255: 2}, names and names.split())
        known = ["ground", "red", "sky"] if names else ["1", "red", "0"]
        images = load_matched_masks(str(folder), known, (3, 4, 4), void=void)
        assert images.classes == [known[number] for number in expected[expected != VOID].unique()]
        pixels, found = images.splits[0][0]
        assert torch.equal(found, expected[1::2, 1::2]) and pixels.shape == (3, 4, 4)
        assert images.splits[0].photograph_sizes == [(8, 8)]
    folder = write_masks(tmp_path / "named", [photograph], {}, ["sky", "ground", "red"])
    found = load_matched_masks(str(folder), ["ground", "red", "sky"], (3, 8, 8), void=2).splits[0][0][1]
    assert torch.equal(found == 1, mask == 2)  # the folder says that 2 is a class


def test_a_number_without_a_class_can_be_named_void(tables, tmp_path):
    photograph = tables / "masks" / "test" / "images" / "61.png"
    folder = write_masks(tmp_path / "masks", [photograph], {}, ["ground", "red"])
    with pytest.raises(ValueError, match=r"got 2 \(\d+ pixels\); name it void in classes\.txt$"):
        load_matched_masks(str(folder), ["ground", "red"], (3, 4, 4))


def test_a_list_of_labels_may_lack_one_that_no_image_has(tables, tmp_path):
    names = {"0": "", "1": "red"}
    table = write_table(tmp_path / "labels.csv", tables, lambda row: {"labels": names[row["red"]]})
    images = load_matched_targets(str(table), ["green", "red"], (3, 8, 8), LABELS)
    assert images.splits[0].labels[:, 0].sum() == 0 and images.splits[0].labels[:, 1].sum() == 10
    assert images.classes == ["red"]


@pytest.mark.parametrize("targets", [LABELS, NUMBERS], ids=["labels", "numbers"])
def test_columns_of_others_may_hold_text(tables, tmp_path, targets):
    others = {"comment": "sunny", "label": "a|b"}
    table = write_table(tmp_path / "labels.csv", tables, lambda row: {"red": row["red"], **others})
    images = load_matched_targets(str(table), ["red"], (3, 8, 8), targets)
    assert images.unknown == ["comment", "label"] and images.splits[0].labels.sum() == 10


def test_damaged_images_are_left_out_if_the_run_leaves_them_out(tables, tmp_path):
    table = write_table(tmp_path / "labels.csv", tables, lambda row: {"green": 0, "red": row["red"]})
    (tmp_path / "bad.png").write_bytes(b"no image")
    with table.open("a") as file:
        file.write("bad.png,1,1\n")
    images = load_matched_targets(str(table), ["green", "red"], (3, 8, 8), LABELS, corrupt="skip")
    assert (len(images), images.left_out) == (20, 1)


def test_what_cannot_be_matched_is_refused_in_one_line(run_of, tables, tmp_path, capsys):
    photographs = sorted((tables / "masks" / "test" / "images").iterdir())[:2]
    folders = {
        name: write_masks(tmp_path / name, photographs, change, names)
        for name, change, names in (
            ("unknown", {}, ["ground", "rad", "blue"]),
            ("beyond", {2: 9}, NAMES),
            ("empty", dict.fromkeys(range(3), 255), NAMES),
        )
    }
    lists = write_table(tmp_path / "labels.csv", tables, lambda row: {"labels": "reds|green"})
    columns = tmp_path / "columns"
    columns.mkdir()
    columns = write_table(columns / "labels.csv", tables, lambda row: {"red": 0, "Green": 1})
    for task, data, message in (
        ("segmentation", folders["unknown"], "(ground, red, blue), got {} with rad; did you mean red?"),
        ("segmentation", folders["beyond"], "or 255 for void pixels, got 9 ("),
        ("segmentation", folders["empty"], "the masks of {} must be labelled, got void pixels alone"),
        ("segmentation", tmp_path / "nowhere", "data folder {} does not exist"),
        ("multilabel", lists, "a data set of labels that the network knows (red, green), got {} with reds;"),
        ("multilabel", columns, "got {} without green; did you mean Green?"),
    ):
        assert main(["evaluate", str(run_of(task)), "--data", str(data)]) == 2
        error = capsys.readouterr().err
        assert message.format(data) in error and error.count("\n") == 1
    assert not RunFolder(run_of("segmentation")).evaluations.exists()


@pytest.mark.filterwarnings("always::UserWarning")
def test_photographs_that_the_network_was_trained_on_are_named(run_of, tables, tmp_path, capsys):
    run = shutil.copytree(run_of("segmentation"), tmp_path / "run")
    photographs = [
        tables / "masks" / part / "images" / name for part, name in (("train", "3.png"), ("val", "45.png"))
    ]
    folder = write_masks(tmp_path / "seen", photographs, {}, NAMES)
    assert main(["evaluate", str(run), "--data", str(folder)]) == 0
    warned = capsys.readouterr().err
    assert "1 of 2 images of seen (such as images/3.png) has the same content as images that the" in warned
    assert main(["calibrate", str(run), "--data", str(folder)]) == 0
    told, warned = capsys.readouterr()
    assert "images that the network was trained on" in warned and "2 images of seen" in told
    assert RunFolder(run).load_calibration_of(RunFolder(run).load_spec(any_task=True)).dependence
