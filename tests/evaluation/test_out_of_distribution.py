import math
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from netfission.cli import main
from netfission.config import RunConfig
from netfission.evaluation.out_of_distribution import Detection, OutOfDistribution, uncertainty_scores
from netfission.runs import shift
from netfission.runs.folder import RunFolder
from netfission.runs.setup import load_run_data
from netfission.runs.shift import TRANSFORMS, evaluate_ood
from netfission.utils.checksums import parse_json

# Few values, so that many are equal.
scores = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=30)


def detection(test, other):
    return Detection.from_scores(
        torch.tensor(test, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("test", "other", "auroc", "aupr", "fpr95"),
    [
        ([0.1, 0.2, 0.3], [0.4, 0.5], 1.0, 1.0, 0.0),
        ([0.4, 0.5], [0.1, 0.2, 0.3], 0.0, (1 / 3 + 2 / 4 + 3 / 5) / 3, 1.0),
        ([1.0, 1.0, 1.0], [1.0], 0.5, 0.25, 1.0),
        ([1.0, 3.0], [2.0, 4.0], 0.75, (1 / 1 + 2 / 3) / 2, 0.5),
    ],
)
def test_known_answers(test, other, auroc, aupr, fpr95):
    found = detection(test, other)
    assert (found.auroc, found.aupr, found.fpr95) == pytest.approx((auroc, aupr, fpr95))


@given(scores, scores)
@settings(max_examples=50, deadline=None)  # scikit-learn is slow at first
def test_figures_are_those_of_scikit_learn_and_of_the_definition(test, other):
    found = detection(test, other)
    positive = [0] * len(test) + [1] * len(other)
    assert found.auroc == pytest.approx(roc_auc_score(positive, test + other))
    assert found.aupr == pytest.approx(average_precision_score(positive, test + other))
    passing = [t for t in test + other if np.mean(np.array(test) <= t) >= 0.95]
    assert found.fpr95 == pytest.approx(min(np.mean(np.array(other) <= t) for t in passing))


@given(scores, scores, st.sampled_from([1e-9, 1e-3, 50.0, 1e6]), st.sampled_from([0.0, -40.0, 0.5]))
@settings(max_examples=50, deadline=None)
def test_nothing_but_the_order_of_the_scores_counts(test, other, scale, offset):
    moved = [[score * scale + offset for score in side] for side in (test, other)]
    assert detection(*moved) == detection(test, other)


def test_no_scores_are_refused():
    with pytest.raises(ValueError, match=r"^in_distribution must be at least one score, got none$"):
        detection([], [1.0])
    with pytest.raises(ValueError, match=r"^out_of_distribution must be at least one score, got none$"):
        detection([1.0], [])


def test_uncertainty_of_known_logits():
    even = torch.zeros(1, 2, 4)
    scores = uncertainty_scores(even, temperature=3.0, average="logits")
    assert {name: score.item() for name, score in scores.items()} == pytest.approx(
        {
            "maximum probability": math.log(4),
            "entropy": math.log(4),
            "mutual information": 0.0,
            "energy": -math.log(4),
        }
    )
    apart = torch.tensor([[[50.0, 0.0, -1e4, -1e4], [0.0, 50.0, -1e4, -1e4]]])
    scores = uncertainty_scores(apart, temperature=1.0, average="logits")
    assert scores["mutual information"].item() == pytest.approx(math.log(2))
    assert scores["energy"].item() == pytest.approx(-25 - math.log(2))
    assert scores["maximum probability"].item() == pytest.approx(math.log(2))


def test_uncertainty_is_at_the_temperature_but_for_the_energy():
    logits = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    cool, warm = (
        uncertainty_scores(2 * logits, temperature=2.0, average="logits"),
        uncertainty_scores(logits, temperature=1.0, average="logits"),
    )
    for name in ("maximum probability", "entropy", "mutual information"):
        torch.testing.assert_close(cool[name], warm[name])
    torch.testing.assert_close(cool["energy"], -(2 * logits.double().mean(1)).logsumexp(1))


def test_uncertainty_still_differs_where_probabilities_are_1_in_float32():
    sure = torch.tensor([[[20.0, 0.0]], [[30.0, 0.0]]])
    assert (sure.softmax(2).amax(2) == 1).all()
    for score in uncertainty_scores(sure, temperature=1.0, average="logits").values():
        assert score[0] > score[1]


def test_one_exit_has_no_mutual_information():
    assert set(uncertainty_scores(torch.zeros(2, 1, 3), 1.0, average="logits")) == {
        "maximum probability",
        "entropy",
        "energy",
    }


def test_the_table_names_its_positives():
    stars = OutOfDistribution("stars", 30, 10, 1.0, {"energy": Detection(0.5, 0.25, 0.95)})
    assert stars.table().splitlines() == [
        "stars   AUROC %  AUPR %  FPR95 %",
        "energy    50.00   25.00    95.00",
        "10 out-of-distribution images, the positives of AUPR (25.0 % by chance), and 30 test images",
    ]


@pytest.fixture
def run(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return RunFolder(shutil.copytree(finished_run, tmp_path / "run"))


def test_its_own_images_inverted_and_rotated(run, capsys):
    assert main(["evaluate", str(run.path), "--ood", "inverted", "rotated"]) == 0
    shown = capsys.readouterr().out
    kept = parse_json((run.path / "ood.json").read_text("utf-8"))
    assert [entry["data"] for entry in kept] == ["inverted", "rotated"]
    assert all(entry["in_distribution"] == entry["out_of_distribution"] == 359 for entry in kept)
    assert kept[0]["temperature"] == 1 != run.load_calibration().temperature  # as detectors have it
    for entry in kept:
        assert f"{100 * entry['scores']['entropy']['fpr95']:.2f}" in shown
        assert set(entry["scores"]) == {"maximum probability", "entropy", "mutual information", "energy"}
    # Figures once more by the logits themselves.
    from netfission.classifier import Classifier

    classifier = Classifier.from_pretrained(run.path)
    images = load_run_data(run.load_config().data, 3).test.images
    shown, other = (
        classifier.limits(detector="entropy").detector.scores(
            classifier.logits(pixels), average=classifier.spec.average
        )
        for pixels in (images, 255 - images)
    )
    expected = Detection.from_scores(shown, other)
    assert kept[0]["scores"]["entropy"]["auroc"] == pytest.approx(expected.auroc, abs=1e-4)


def test_turned_pixels():
    pixels = torch.tensor([[[[0, 1], [2, 3]]]], dtype=torch.uint8)
    assert TRANSFORMS["inverted"](pixels).tolist() == [[[[255, 254], [253, 252]]]]
    assert TRANSFORMS["rotated"](pixels).tolist() == [[[[1, 3], [0, 2]]]]


def test_a_folder_of_any_images_and_of_parquet_with_a_test_split_alone(run, tmp_path):
    rng = np.random.default_rng(0)
    colours = [Image.fromarray(rng.integers(0, 256, (30, 20, 3), dtype=np.uint8)) for _ in range(7)]
    folder = tmp_path / "any" / "deep"
    folder.mkdir(parents=True)
    for index, image in enumerate(colours):
        image.save(folder / f"{index}.png")
    (folder / ".hidden.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    shards = tmp_path / "shards"
    shards.mkdir()
    Dataset.from_dict({"picture": colours[:5]}).cast_column("picture", ImageFeature()).to_parquet(
        shards / "test-00000-of-00001.parquet"
    )
    config = run.load_config()
    by_files, by_rows = evaluate_ood(run, config, [str(tmp_path / "any"), str(shards)])
    assert (by_files.out_of_distribution, by_rows.out_of_distribution) == (7, 5)
    evaluate_ood(run, config, ["inverted"])
    again = evaluate_ood(run, config, [str(shards)])
    kept = parse_json((run.path / "ood.json").read_text("utf-8"))
    assert [entry["data"] for entry in kept] == [str(tmp_path / "any"), str(shards), "inverted"]
    assert kept[1]["scores"]["energy"]["auroc"] == again[0].scores["energy"].auroc


def test_any_images_on_the_hub(run, monkeypatch):
    asked = []

    def load(*name):
        asked.append(name)
        pictures = [Image.new("RGB", (9, 7), (10 * shade, 0, 90)) for shade in range(6)]
        rows = Dataset.from_dict({"picture": pictures}).cast_column("picture", ImageFeature())
        return {"train": rows, "test": rows.select(range(4))}  # no labels

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    names = ["hf/ylecun/mnist", "hf/ufldl-stanford/svhn/cropped_digits"]
    found = evaluate_ood(run, run.load_config(), [*names, names[0]])  # one of them twice
    assert asked == [("ylecun/mnist",), ("ufldl-stanford/svhn", "cropped_digits")]
    assert [(result.data, result.out_of_distribution) for result in found] == [(name, 4) for name in names]


@pytest.mark.parametrize("name", ["hf/uoft-cs/cifar10", "hf/UofT-CS/CIFAR10"])
def test_the_hub_has_the_runs_own_images_by_another_name(run, name):
    flat = run.load_config().to_dict() | {"data": "cifar10"}
    with pytest.raises(ValueError, match=r"^ood must be images that the run was not"):
        shift._other_images(name, RunConfig.from_dict(flat), None)


def test_a_data_set_of_several_configurations_says_which(run, monkeypatch, capsys):
    def load(*name):
        raise ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']\nExample of usage: …")

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert main(["evaluate", str(run.path), "--ood", "hf/some/images"]) == 2
    error = capsys.readouterr().err
    assert (
        "some/images must be a data set that the hub has, got config=None; Config name is missing. " in error
    )
    assert error.endswith("Please pick one among: ['a', 'b']\n") and error.count("\n") == 1


def test_without_a_network_a_data_set_of_the_hub_is_one_line(run, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert main(["evaluate", str(run.path), "--ood", "hf/ylecun/mnist"]) == 2
    error = capsys.readouterr().err
    assert "cannot fetch the data set 'ylecun/mnist' from the hub, and it is not cached here" in error
    assert error.count("\n") == 1
    assert not (run.path / "ood.json").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf/mnist", "data folder hf/mnist does not exist"),
        ("digits", "--ood must be images that the run was not trained on, got 'digits'"),
        (
            "invert",
            "--ood must be one of digits, cifar10, cifar100, tiny-imagenet, inverted, rotated, "
            "hf/OWNER/NAME, or a folder, got 'invert'; did you mean inverted?",
        ),
        ("{tmp}/empty", "empty must be a folder with images, got no image file"),
        ("{tmp}/nowhere", "nowhere does not exist"),
    ],
)
def test_a_bad_request_is_one_line_and_leaves_nothing(run, name, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", str(run.path), "--ood", "inverted", name.format(tmp=tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (run.path / "ood.json").exists()


def test_images_that_are_not_square_are_not_rotated(run, monkeypatch):
    class Flat:
        shape = (1, 8, 6)

    monkeypatch.setattr(shift, "_network", lambda folder, config: (None, Flat))
    with pytest.raises(ValueError, match="ood must be other than 'rotated' on images of 8×6, got 'rotated'"):
        evaluate_ood(run, run.load_config(), ["rotated"])
