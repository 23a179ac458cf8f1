import json

import numpy as np
import pytest
import torch

from netfission.classifier import Classifier
from netfission.cli import main
from netfission.data.corrupted import CORRUPTIONS, STRENGTHS
from netfission.evaluation import evaluate_logits
from netfission.evaluation.corruption import (
    CorruptionMetrics,
    Corruptions,
    corrupt_images,
)
from netfission.runs.folder import RunFolder
from netfission.runs.setup import load_run_data
from netfission.runs.shift import evaluate_corruptions
from netfission.runs.train import train

pytest.importorskip("imagecorruptions")
NAMES = list(CORRUPTIONS)


def pictures(n=3, channels=3, side=32):
    """Smooth gradients, as photographs have them, of several colours."""
    ramp = torch.linspace(20, 220, side).expand(side, side)
    layers = [ramp, ramp.T, (ramp + ramp.T) / 2]
    images = [torch.stack(layers[:channels]).roll(3 * index, dims=1) for index in range(n)]
    return torch.stack(images).byte()


def test_they_are_those_of_the_library_in_its_order():
    import imagecorruptions

    assert imagecorruptions.get_corruption_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_changes_images_by_the_seed_and_nothing_else(name):
    images = pictures()
    before = images.clone()
    first = corrupt_images(images, name, 3, seed=1)
    np.random.rand()
    assert torch.equal(corrupt_images(images, name, 3, seed=1), first)
    assert torch.equal(corrupt_images(images[:1], name, 3, seed=1), first[:1])
    assert (first.shape, first.dtype) == (images.shape, torch.uint8)
    assert torch.equal(images, before)
    assert all(not torch.equal(new, old) for new, old in zip(first, images, strict=True))


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur", "snow", "frost"])
def test_another_seed_or_index_draws_other_numbers(name):
    images = pictures(1).repeat(2, 1, 1, 1)
    result = corrupt_images(images, name, 3, seed=1)
    assert not torch.equal(result[0], result[1])
    assert not torch.equal(result, corrupt_images(images, name, 3, seed=2))


def test_numpys_global_generator_is_left_as_it_was():
    before = np.random.get_state()[1].copy()
    corrupt_images(pictures(1), "gaussian_noise", 1, seed=0)
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize("name", ["gaussian_noise", "contrast", "brightness", "pixelate"])
def test_a_higher_strength_changes_more(name):
    images = pictures(4)
    changes = [(corrupt_images(images, name, s, 0).float() - images).abs().mean().item() for s in STRENGTHS]
    assert changes == sorted(changes)
    assert changes[0] < changes[-1]


def test_grey_images_stay_grey():
    grey = pictures(channels=1)
    result = corrupt_images(grey, "frost", 2, seed=0)
    assert result.shape == grey.shape
    coloured = corrupt_images(grey.expand(-1, 3, -1, -1), "frost", 2, seed=0)
    torch.testing.assert_close(result[:, 0].float(), coloured.float().mean(1), atol=0.51, rtol=0)


def test_small_images_are_refused():
    with pytest.raises(
        ValueError, match=r"^pixels must be at least 32×32 per image for corruptions, got 31×31$"
    ):
        corrupt_images(pictures(side=31), "fog", 1, 0)


def figures(top1, nll, exits):
    return CorruptionMetrics({"top1": top1, "nll": nll, "ece": 0.1}, {"top1": top1, "nll": nll}, exits)


def test_means_and_the_table():
    corruptions = Corruptions(
        n=8,
        seed=0,
        temperature=1.0,
        library="",
        clean=figures(1.0, 0.25, 1.0),
        corruptions={
            "fog": [figures(s / 10, s, s / 20) for s in STRENGTHS],
            "pixelate": [figures(0.5, 1, 0.5) for _ in STRENGTHS],
        },
    )
    assert corruptions.mean("top1") == pytest.approx(0.4)
    assert corruptions.mean("nll", 5) == pytest.approx(3)
    assert corruptions.mean_exit() == pytest.approx((0.15 + 0.5) / 2)
    lines = corruptions.table().splitlines()
    assert lines[1].split() == ["fog", "10.00", "20.00", "30.00", "40.00", "50.00", "30.00"]
    assert lines[3].split() == ["mean", "accuracy", "%", "30.00", "35.00", "40.00", "45.00", "50.00", "40.00"]
    assert lines[4].split()[-1] == "2.0000"


@pytest.fixture(scope="module")
def large_run(settings_of, tmp_path_factory):
    """Digits at 32×32 pixels."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "large")
    train(settings_of(image_size=32, limit_per_class=10, exits=2), folder.path, progress=False)
    return folder


def test_a_run_under_all_of_them(large_run, capsys):
    assert main(["evaluate", str(large_run.path), "--corruptions", "--corruption_images", "6"]) == 0
    shown = capsys.readouterr().out
    kept = json.loads((large_run.path / "corruptions.json").read_text("utf-8"))
    assert (kept["n"], list(kept["corruptions"])) == (6, NAMES)
    assert kept["library"].startswith("imagecorruptions-imaug ")
    assert f"{100 * kept['clean']['ensemble']['top1']:.2f}" in shown
    # One of the figures once more, by hand.
    config = large_run.load_config()
    classifier = Classifier.from_pretrained(large_run.path)
    test = load_run_data(config.data, config.fission.seed).test
    rows = torch.randperm(len(test), generator=torch.Generator().manual_seed(3))[:6].sort().values
    logits = classifier.logits(corrupt_images(test.images[rows], "contrast", 4, seed=3))
    by_hand = evaluate_logits(logits / classifier.temperature, test.labels[rows], average="logits")
    metrics = kept["corruptions"]["contrast"][3]
    assert metrics["ensemble"]["nll"] == pytest.approx(by_hand.ensemble["nll"], rel=1e-4)
    assert metrics["exits_top1"] == pytest.approx(sum(each["top1"] for each in by_hand.exits) / 2)
    assert metrics["raw"]["nll"] != metrics["ensemble"]["nll"]


def test_more_images_than_there_are_is_all_of_them(large_run, monkeypatch):
    monkeypatch.setattr("netfission.runs.shift.CORRUPTIONS", ["contrast"])
    assert evaluate_corruptions(large_run, large_run.load_config(), images=10_000).n == 359


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--corruptions", "pixels must be at least 32×32 per image for corruptions, got 8×8"),
        (
            "--corruption_images 3",
            "--corruption-images must be left out unless --corruptions is given, got 3",
        ),
        ("--corruptions --corruption-images 0", "--corruption-images must be a positive integer, got 0"),
    ],
)
def test_a_bad_request_is_one_line(finished_run, flags, message, capsys):
    assert main(["evaluate", str(finished_run), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
