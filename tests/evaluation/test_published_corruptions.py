"""Corrupted images as published: a folder of the layout of CIFAR-10-C."""

import json
import pickle
import re
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from netfission.classifier import Classifier
from netfission.cli import main
from netfission.data import corrupted
from netfission.data.corrupted import CORRUPTIONS, open_corrupted
from netfission.data.images import to_pixels
from netfission.evaluation import evaluate_logits
from netfission.runs.folder import RunFolder

N = 12  # images


@pytest.fixture
def run(finished_run, tmp_path):
    return RunFolder(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def published(tmp_path):
    """Images of noise, of 9×9 pixels, in the layout of CIFAR-10-C, with one of its further corruptions."""
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in (*CORRUPTIONS, "saturate"):
        np.save(folder / f"{name}.npy", generator.integers(0, 256, (5 * N, 9, 9, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.tile(generator.permutation([*range(10), 3, 4]), 5))
    return folder


def test_figures_are_of_the_images_of_each_corruption_and_strength(run, published, capsys):
    assert main(["evaluate", str(run.path), "--corrupted", str(published)]) == 0
    shown = capsys.readouterr().out
    kept = json.loads(run.corruptions.read_text("utf-8"))
    assert (kept["n"], kept["library"], list(kept["corruptions"])) == (N, "CIFAR-10-C", list(CORRUPTIONS))
    assert "12 images, CIFAR-10-C; without corruption: accuracy" in shown
    assert kept["clean"]["ensemble"]["top1"] == pytest.approx(run.load_reliability().scaled.metrics["top1"])
    classifier = Classifier.from_pretrained(run.path)
    labels = torch.from_numpy(np.load(published / "labels.npy")[:N])
    for name, strength in (("gaussian_noise", 1), ("fog", 3), ("jpeg_compression", 5)):
        images = np.load(published / f"{name}.npy")[(strength - 1) * N : strength * N]
        pixels = torch.stack([to_pixels(Image.fromarray(image), "L", (8, 8)) for image in images])
        logits = classifier.logits(pixels).double() / classifier.temperature
        by_hand = evaluate_logits(logits, labels, average=classifier.spec.average)
        metrics = kept["corruptions"][name][strength - 1]["ensemble"]
        assert metrics["nll"] == pytest.approx(by_hand.ensemble["nll"], rel=1e-4)
    assert run.load_corruptions().n == N
    assert kept["weights"] == run.weights_sha256()


def test_fewer_images_are_a_random_choice_of_them(run, published, monkeypatch):
    monkeypatch.setattr("netfission.runs.shift.CORRUPTIONS", ["fog"])
    assert main(["evaluate", str(run.path), "--corrupted", str(published), "--corruption-images", "3"]) == 0
    kept = json.loads(run.corruptions.read_text("utf-8"))
    assert kept["n"] == 3
    seed = run.load_config().fission.seed
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:3].sort().values
    assert rows.tolist() != [0, 1, 2]
    classifier = Classifier.from_pretrained(run.path)
    pixels = open_corrupted(str(published), classifier.spec.classes, (1, 8, 8)).pixels("fog", 2, rows)
    labels = torch.from_numpy(np.load(published / "labels.npy"))[rows]
    logits = classifier.logits(pixels).double() / classifier.temperature
    by_hand = evaluate_logits(logits, labels, average=classifier.spec.average)
    assert kept["corruptions"]["fog"][1]["ensemble"]["nll"] == pytest.approx(
        by_hand.ensemble["nll"], rel=1e-4
    )


def test_images_of_the_networks_size_are_read_as_they_are(published):
    found = open_corrupted(str(published), [*"abcdefghij"], (3, 9, 9))
    rows = torch.tensor([N - 1, 0])
    expected = np.load(published / "snow.npy")[[2 * N - 1, N]].transpose(0, 3, 1, 2)
    assert found.pixels("snow", 2, rows).numpy().tolist() == expected.tolist()


def test_labels_number_the_classes_in_alphabetical_order(published):
    labels = np.load(published / "labels.npy")[:N].tolist()
    classes = [*"cabjihgfed"]
    found = open_corrupted(str(published), classes, (3, 9, 9)).labels.tolist()
    assert [classes[label] for label in found] == [sorted(classes)[label] for label in labels]


def test_classes_with_numbers_as_names_are_in_the_order_of_numbers(published):
    for file in published.glob("*.npy"):
        np.save(file, np.load(file)[: 5 * 11])
    np.save(published / "labels.npy", np.tile(np.arange(11), 5))
    found = open_corrupted(str(published), [str(number) for number in range(11)], (3, 9, 9))
    assert found.labels.tolist() == list(range(11))


def _without(name):
    return lambda folder: (folder / f"{name}.npy").unlink()


def _with(name, array):
    return lambda folder: np.save(folder / f"{name}.npy", array)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "which does not exist"),
        (_without("labels"), "without labels.npy"),
        (_without("frost"), "without frost.npy"),
        (_with("labels", np.arange(5 * N)), "whose labels.npy is int64 (60,)"),
        (_with("labels", np.zeros(5 * N + 1, dtype=int)), "whose labels.npy is int64 (61,)"),
        (_with("labels", np.zeros(5 * N)), "whose labels.npy is float64 (60,)"),
        (_with("labels", np.full(5 * N, 10)), "got 1 labels from 10 to 10"),
        (_with("labels", np.tile(np.arange(N) % 9, 5)), "images of the network's 10 classes, got 9 labels"),
        (_with("labels", np.full(5 * N, -1)), "got 1 labels from -1 to -1"),
        (
            _with("fog", np.zeros((5 * N, 9, 9, 3))),
            "fog.npy must be an array of uint8 (60, height, width, 3)",
        ),
        (_with("fog", np.zeros((4, 9, 9, 3), np.uint8)), "got uint8 (4, 9, 9, 3)"),
        (lambda folder: (folder / "fog.npy").write_bytes(b"fog"), "fog.npy must be an array of NumPy"),
        (lambda folder: (folder / "fog.npy").write_bytes(pickle.dumps(print)), "fog.npy must be an array"),
        (_with("fog", np.array([print])), "fog.npy must be an array of NumPy"),
    ],
)
def test_another_layout_is_refused(published, damage, message):
    damage(published)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_corrupted(str(published), [*"0123456789"], (1, 8, 8))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def table(published, tmp_path, monkeypatch):
    """The same images as rows of a table in another order, as copies on the hub have them."""
    labels = np.load(published / "labels.npy")
    rows = {"image": [], "label": [], "corruption_name": [], "corruption_level": []}
    for name in (*CORRUPTIONS, "saturate"):
        for row, image in enumerate(np.load(published / f"{name}.npy")):
            values = (image, labels[row], name, row // N + 1)
            for column, value in zip(rows, values, strict=True):
                rows[column].append(value)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.Value("int64"),
            "corruption_name": datasets.Value("string"),
            "corruption_level": datasets.Value("int64"),
        }
    )
    made = datasets.Dataset.from_dict(rows, features=features).shuffle(seed=0)
    folder = tmp_path / "shards"
    folder.mkdir()
    made.to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def test_a_table_of_the_hub_has_the_same_images(published, table, monkeypatch):
    by_hub = {"someone/cifar10-c": datasets.load_dataset(str(table))}
    monkeypatch.setattr(corrupted, "load_from_hub", lambda name, config: by_hub[name])
    arrays = open_corrupted(str(published), [*"abcdefghij"], (3, 9, 9))
    for name, title in ((str(table), "shards"), ("hf/someone/cifar10-c", "someone/cifar10-c")):
        rows = open_corrupted(name, [*"abcdefghij"], (3, 9, 9))
        assert rows.title == title
        for corruption, strength in (("snow", 2), ("jpeg_compression", 5)):
            found, expected = (
                sorted(
                    (label, image.flatten().tolist())
                    for label, image in zip(
                        images.labels.tolist(),
                        images.pixels(corruption, strength, torch.arange(N)),
                        strict=True,
                    )
                )
                for images in (rows, arrays)
            )
            assert found == expected


def test_a_table_may_have_the_names_of_classes_and_corruptions(table, tmp_path):
    rows = datasets.load_dataset(str(table))["train"]
    plain = open_corrupted(str(table), [*"jihgfedcba"], (3, 9, 9))
    names = datasets.ClassLabel(names=[*"abcdefghij"])
    named = rows.cast_column("label", names).class_encode_column("corruption_name")
    (tmp_path / "named").mkdir()
    named.to_parquet(tmp_path / "named" / "train.parquet")
    found = open_corrupted(str(tmp_path / "named"), [*"jihgfedcba"], (3, 9, 9))
    assert found.labels.tolist() == plain.labels.tolist()
    all_rows = torch.arange(N)
    assert torch.equal(found.pixels("fog", 3, all_rows), plain.pixels("fog", 3, all_rows))
    with pytest.raises(ValueError, match="label must be of the network's classes, got 'j' and others"):
        open_corrupted(str(tmp_path / "named"), [*"0abcdefghi"], (3, 9, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows.remove_columns("corruption_level"),
            "with a column of images and the columns label, corruption_name, corruption_level, got ",
        ),
        (lambda rows: rows.remove_columns("image"), "with columns label (Value), corruption_name (Value), "),
        (
            lambda rows: rows.filter(lambda row: row["corruption_name"] != "frost"),
            "with 0 of frost at 1, and 12 of the first",
        ),
        (lambda rows: rows.select(range(len(rows) - 5)), "the same images for each of the 15 corruptions"),
        (
            lambda rows: rows.cast_column("label", datasets.Value("float32")),
            "label must be a column of class numbers, got ",
        ),
        (lambda rows: rows.map(lambda row: row | {"label": row["label"] % 9}), "network's 10 classes, got 9"),
    ],
)
def test_a_table_of_another_layout_is_refused(table, tmp_path, change, message):
    (tmp_path / "changed").mkdir()
    change(datasets.load_dataset(str(table))["train"]).to_parquet(tmp_path / "changed" / "train.parquet")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        open_corrupted(str(tmp_path / "changed"), [*"0123456789"], (1, 8, 8))
    assert "\n" not in str(caught.value)


def test_what_is_refused_writes_nothing(run, published, capsys):
    (published / "frost.npy").unlink()
    assert main(["evaluate", str(run.path), "--corrupted", str(published)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not run.corruptions.exists()


def test_an_empty_name_is_no_folder(run, capsys):
    assert main(["evaluate", str(run.path), "--corrupted", ""]) == 2
    assert "--corrupted must be a folder or hf/OWNER/NAME, got ''" in capsys.readouterr().err


def test_published_images_and_a_corruption_of_ones_own_exclude_each_other(run, published, capsys):
    assert main(["evaluate", str(run.path), "--corrupted", str(published), "--corruptions"]) == 2
    assert "--corrupted must be left out with --corruptions" in capsys.readouterr().err
