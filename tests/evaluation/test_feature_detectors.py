import shutil
import sys
from importlib.metadata import version

import pytest
import torch
from pytorch_ood.detector import KNN, EnergyBased, Mahalanobis, ReAct, ViM
from pytorch_ood.metrics.functional import auroc, fpr_at_tpr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from netfission.classifier import Classifier
from netfission.cli import main
from netfission.config import FissionConfig
from netfission.data.unlabelled import load_unlabelled
from netfission.ensemble import mean_logits
from netfission.evaluation.feature_detectors import (
    Head,
    check_detectors,
    exit_features,
    fit_detector,
)
from netfission.evaluation.out_of_distribution import (
    Detection,
    OutOfDistribution,
    uncertainty_score,
)
from netfission.network import FissionNetwork
from netfission.runs import shift
from netfission.runs.folder import RunFolder
from netfission.runs.setup import load_run_data
from netfission.runs.shift import evaluate_ood
from netfission.utils.checksums import parse_json
from netfission.utils.extras import MissingExtraError

ALL = ["mahalanobis", "knn", "vim", "react"]


@pytest.fixture
def run(finished_run, tmp_path):
    return RunFolder(shutil.copytree(finished_run, tmp_path / "run"))


class Encoder(nn.Module):
    """Pixels → what enters the last linear layer of each head, side by side."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        assert isinstance(classifier.network, FissionNetwork)
        self.classifier = [classifier]  # no module of this one
        heads = [path.head for path in classifier.network.exit_paths]
        self.layers = [[m for m in head.modules() if isinstance(m, nn.Linear)][-1] for head in heads]
        self.inputs: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(
                lambda _, inputs, number=number: self.inputs.update({number: inputs[0]})
            )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.classifier[0].logits(pixels)
        return torch.cat([self.inputs[number] for number in range(len(self.layers))], dim=1)


def test_figures_are_those_of_the_library_called_by_hand(run, capsys):
    arguments = ["evaluate", str(run.path), "--ood", "inverted", "rotated", "--feature-detectors", *ALL]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    kept = parse_json((run.path / "ood.json").read_text("utf-8"))
    data = load_run_data(run.load_config().data, run.load_config().fission.seed)
    encoder = Encoder(Classifier.from_pretrained(run.path))
    weights = [layer.weight.detach() / 2 for layer in encoder.layers]
    weight, bias = torch.cat(weights, dim=1), sum(layer.bias.detach() for layer in encoder.layers) / 2
    by_hand = {
        "mahalanobis": Mahalanobis(encoder),
        "knn": KNN(encoder, k=50),
        "vim": ViM(encoder, d=64, w=weight, b=bias),
        "react": ReAct(encoder, head=lambda features: features @ weight.T + bias, percentile=0.9),
    }
    train = DataLoader(TensorDataset(data.train.images, data.train.labels), batch_size=64)
    tested = data.test.images
    sides = {"inverted": 255 - tested, "rotated": tested.rot90(dims=(2, 3))}
    for name, detector in by_hand.items():
        detector.to("cpu").fit(train)
        usual = detector.predict(tested)
        for entry in kept:
            other = detector.predict(sides[entry["data"]])
            scores = torch.cat([usual, other])
            labels = torch.cat([torch.zeros(len(usual)), -torch.ones(len(other))]).long()
            found = entry["scores"][name]
            assert found["auroc"] == pytest.approx(auroc(scores, labels).item(), abs=2e-4)
            accepted = fpr_at_tpr(-scores, -1 - labels, 0.95).item()  # test images are the positives
            assert found["fpr95"] == pytest.approx(accepted, abs=1 / len(other))
            assert f"{100 * found['fpr95']:.2f}" in shown
    library = f"pytorch-ood {version('pytorch-ood')}"
    for entry in kept:
        assert list(entry["scores"])[-5:] == ["energy", *ALL]
        assert (entry["training_images"], entry["library"]) == (len(data.train), library)
    assert shown.count(f"; {library} fitted to {len(data.train)} training images\n") == 2
    # What was measured without detectors stays as it was.
    (without, _) = evaluate_ood(run, run.load_config(), ["inverted", "rotated"])
    assert (without.training_images, without.library) == (None, None)
    assert list(without.scores) == list(kept[0]["scores"])[:4]
    for name, detection in without.scores.items():
        assert detection == Detection(**kept[0]["scores"][name])
    assert run.load_out_of_distribution()[0] == without


def test_the_energy_of_the_library_is_todays():
    logits = torch.randn(9, 3, 5, generator=torch.Generator().manual_seed(0))
    theirs = EnergyBased(None).predict_logits(mean_logits(logits.double()))
    torch.testing.assert_close(uncertainty_score(logits, "energy", 1.0, average="logits"), theirs)


@pytest.mark.parametrize("weights", [None, (1.0, 0.3)])
def test_the_mean_of_logits_is_one_layer_on_all_features(finished_run, weights):
    classifier = Classifier.from_pretrained(finished_run)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (7, *classifier.spec.shape), dtype=torch.uint8, generator=generator)
    outputs = exit_features(classifier.network, classifier.logits, pixels)
    assert torch.equal(outputs.logits, classifier.logits(pixels))
    found = outputs.mean_head(weights)(outputs.side_by_side)
    torch.testing.assert_close(found, mean_logits(outputs.logits, weights))


def test_no_hook_stays_and_layers_without_bias_count_as_0():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    outputs = exit_features(network, lambda images: network(images)[:, None], torch.rand(5, 3))
    assert outputs.layers == [network[2]]
    assert outputs.mean_head().bias.tolist() == [0, 0]
    assert not any(module._forward_hooks for module in network)


def test_exits_that_end_in_another_layer_are_refused():
    network = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    message = (
        "^feature_detectors must be left out unless every exit ends in a linear layer, "
        "got exit 0, whose logits are no linear layer's output$"
    )
    with pytest.raises(ValueError, match=message):
        exit_features(network, lambda images: network(images)[:, None], torch.rand(5, 3))


def test_unusual_features_score_higher_although_a_class_is_missing():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 2 * 2  # none of class 1
    features = torch.randn(120, 6, generator=generator).abs() + 6 * nn.functional.one_hot(labels, 6)
    head = Head(torch.eye(3, 6), torch.zeros(3))
    for name in ("mahalanobis", "knn", "vim"):
        score = fit_detector(name, features, labels, head)
        usual, unusual = score(features), score(features.roll(3, dims=1))
        assert Detection.from_scores(usual, unusual).auroc > 0.9, name
        assert usual.dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "features", "message"),
    [
        (
            "mahalanobis",
            torch.rand(7, 6),
            "left out with fewer than 8 training images, as there are 6 features, got 'mahalanobis' and 7",
        ),
        (
            "vim",
            torch.rand(2, 6),
            "left out with fewer than 3 training images, as there are 6 features, got 'vim' and 2 images",
        ),
    ],
)
def test_features_without_a_covariance_to_rely_on_are_refused(name, features, message):
    head = Head(torch.eye(2, 6), torch.zeros(2))
    with pytest.raises(ValueError, match=f"^feature_detectors must be {message}"):
        fit_detector(name, features, torch.arange(len(features)) % 2, head)


def test_features_whose_covariance_cannot_be_inverted_are_refused(monkeypatch):
    def fit(*_):
        return torch.linalg.inv(torch.zeros(2, 2))

    monkeypatch.setattr(Mahalanobis, "fit_features", fit)
    head = Head(torch.eye(2, 6), torch.zeros(2))
    with pytest.raises(
        ValueError, match=r"^feature_detectors must be left out here, got 'mahalanobis'; the cov"
    ):
        fit_detector("mahalanobis", torch.rand(8, 6), torch.arange(8) % 2, head)


def test_fewer_images_than_neighbours_are_all_neighbours():
    features = torch.eye(3)[[0] * 9 + [1]]
    score = fit_detector("knn", features, torch.zeros(10).long(), Head(torch.eye(2, 3), torch.zeros(2)))
    assert score(torch.eye(3)[:1]).tolist() == pytest.approx([2**0.5])


def test_detectors_are_fitted_to_a_part_of_many_images(run, monkeypatch):
    monkeypatch.setattr(shift, "DETECTOR_IMAGES", 60)
    fitted: list[torch.Tensor] = []
    monkeypatch.setattr(
        shift, "fit_detector", lambda name, *given: fitted.append(given[0]) or fit_detector(name, *given)
    )
    (first,) = evaluate_ood(run, run.load_config(), ["inverted"], feature_detectors=["knn", "knn"])
    assert first.training_images == len(fitted[0]) == 60
    assert len(fitted) == 1  # though it is named twice


def test_a_part_of_a_streamed_split_keeps_images_and_labels():
    split = load_unlabelled("digits", (1, 8, 8))
    split.labels = torch.arange(len(split))
    split.records.labels[:] = range(len(split.records.labels))
    part = shift._random_part(split, 10, seed=1)
    assert len(part) == 10
    assert torch.equal(part.labels, part.labels.sort().values)
    assert not torch.equal(part.labels, shift._random_part(split, 10, seed=2).labels)
    assert all(torch.equal(part[row][0], split[int(part.labels[row])][0]) for row in range(10))


def test_scores_that_are_not_finite_are_refused():
    measured = OutOfDistribution("stars", 2, 1, 1.0, {})
    scores = {"knn": (torch.tensor([1.0, float("nan")]), torch.tensor([2.0]))}
    message = "^feature_detectors must be left out here, got 'knn'; 1 of its scores are not finite$"
    with pytest.raises(ValueError, match=message):
        measured.with_detectors(scores, training_images=1, library="x 1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--ood inverted --feature-detectors knm",
            "--feature-detectors must be one of mahalanobis, knn, vim, react, got 'knm'; did you mean knn?",
        ),
        (
            "--feature-detectors knn",
            "--feature-detectors must be left out unless --ood is given, got ['knn']",
        ),
    ],
)
def test_a_bad_request_is_one_line(run, arguments, message, capsys):
    assert main(["evaluate", str(run.path), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (run.path / "ood.json").exists()


def test_without_the_library_the_extra_is_named_before_any_work(finished_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)
    monkeypatch.setattr(shift, "_classifier", None)
    with pytest.raises(MissingExtraError):
        check_detectors(["vim"])
    assert main(["evaluate", str(finished_run), "--ood", "inverted", "--feature-detectors", "vim"]) == 2
    error = capsys.readouterr().err
    assert "detection by features needs pytorch_ood; install it by pip install 'netfission[ood]'" in error
    assert error.count("\n") == 1
    check_detectors([])


def test_a_deep_ensemble_has_features_of_its_members(settings_of, tmp_path):
    from netfission.runs.train import train

    changes = {"method": "deep-ensemble", "epochs": 1, "sparsity": 0.0}
    run = RunFolder(tmp_path / "run")
    train(settings_of(**changes), run.path, progress=False)
    assert FissionConfig(**run.load_spec().fission).exits == 2
    classifier = Classifier.from_pretrained(run.path)
    pixels = torch.randint(256, (7, *classifier.spec.shape), dtype=torch.uint8)
    outputs = exit_features(classifier.network, classifier.logits, pixels)
    members = [set(member.modules()) for member in classifier.network.members]
    assert [layer in member for layer, member in zip(outputs.layers, members, strict=True)] == [True, True]
    found = outputs.mean_head()(outputs.side_by_side)
    torch.testing.assert_close(found, mean_logits(outputs.logits))
