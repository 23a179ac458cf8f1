import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from netfission.evaluation.gain import Gain, NetworkFigures, change_errors
from netfission.profiling.timing import Quartiles
from netfission.utils.typed import typed


def gain(seconds: float | None = 100.0) -> Gain:
    metrics = {"top1": 0.64, "nll": 1.5, "ece": 0.04}, {"top1": 0.61, "nll": 1.25, "ece": 0.05}
    images = "50 validation images"
    single = NetworkFigures(
        1, metrics[0], 2_000_000, 30_000_000, seconds, calibrated_on=images, guess="too few"
    )
    ensemble = NetworkFigures(
        5, metrics[1], 2_200_000, 29_700_000, 50.0, calibrated_on=images, guess="too few"
    )
    times = {1: Quartiles(1.1, 1.2, 1.3), 32: Quartiles(1.0, 1.05, 1.1)}
    return Gain(400, single, ensemble, times, {"device": "CPU"}, {"nll": 0.05, "ece": 0.005})


def test_the_table_has_both_networks_with_the_standard_error_of_their_accuracies():
    assert gain().table().splitlines() == [
        "                  accuracy %     NLL  ECE %  MACs, M  parameters, M  training time",
        "single network  64.00 ± 2.39  1.5000   4.00    30.00          2.000     1 min 40 s",
        "ensemble of 5   61.00 ± 2.43  1.2500   5.00    29.70          2.200           50 s",
        "on 400 test images, calibrated on 50 validation images (too few); ± is the standard error; NLL and "
        "ECE are better if lower",
    ]


def test_networks_that_are_calibrated_on_other_images_are_told_apart():
    ensemble = replace(gain().ensemble, calibrated_on="1 image of pets", guess="")
    last = replace(gain(), ensemble=ensemble).table().splitlines()[-1]
    of_both = "50 validation images (too few) for the single network and 1 image of pets for the ensemble"
    assert f"calibrated on {of_both}; ±" in last


def test_a_loss_of_accuracy_is_not_hidden():
    assert gain().summary() == (
        "better than the single network: NLL -0.2500 (standard error 0.0500)\n"
        "worse than the single network: ECE +1.00 points (standard error 0.50)\n"
        "not clear from 400 test images: accuracy -3.00 points (standard error below 3.41)\n"
        "cost relative to the single network: MACs 0.99×, parameters 1.10×, inference time 1.20× for 1 image "
        "(quartiles 1.10–1.30) and 1.05× for 32 images (quartiles 1.00–1.10); its training took another 0.50×"
    )


@pytest.mark.parametrize("seconds", [None, 0.0])
def test_a_network_that_was_trained_elsewhere_has_no_time(seconds):
    assert gain(seconds).summary().endswith("for 32 images (quartiles 1.00–1.10)")
    assert gain(None).table().splitlines()[1].endswith("–")


def test_a_time_that_was_not_measured_is_named_so():
    assert (
        replace(gain(), time={})
        .summary()
        .endswith("parameters 1.10×, inference time not measured; its training took another 0.50×")
    )


def test_it_is_read_as_it_is_written():
    assert typed(Gain, json.loads(gain().to_json())) == gain()


def test_what_the_test_images_show_is_called_better_or_worse():
    better = replace(
        gain(), n=40_000, ensemble=replace(gain().ensemble, metrics={"top1": 0.66, "nll": 1.4, "ece": 0.04})
    )
    assert better.summary().splitlines()[:-1] == [
        "better than the single network: accuracy +2.00 points (standard error below 0.34), NLL -0.1000 "
        "(standard error 0.0500)",
        "as the single network: ECE +0.00 points (standard error 0.50)",
    ]
    worse = replace(better, single=better.ensemble, ensemble=better.single)
    assert worse.summary().splitlines()[0] == (
        "worse than the single network: accuracy -2.00 points (standard error below 0.34), NLL +0.1000 "
        "(standard error 0.0500)"
    )


def test_a_change_within_its_noise_is_not_clear():
    noisy = replace(gain(), n=100, errors={"nll": 0.13, "ece": 0.006})
    assert noisy.summary().splitlines()[0] == (
        "not clear from 100 test images: accuracy -3.00 points (standard error below 6.73), NLL -0.2500 "
        "(standard error 0.1300), ECE +1.00 points (standard error 0.60)"
    )


def test_a_gain_of_an_older_version_is_read_and_shows_no_more_than_is_known():
    content = json.loads(gain().to_json())
    del content["errors"]
    older = typed(Gain, content)
    assert older == replace(gain(), errors={})
    assert (
        older.summary()
        .splitlines()[0]
        .endswith("NLL -0.2500 (standard error not known), ECE +1.00 points (standard error not known)")
    )


def drawn(n, seed):
    """Log-probabilities of two networks of 4 classes that err alike, and labels by the first."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
    other = logits + 0.5 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits.log_softmax(1), other.log_softmax(1), labels


def test_errors_are_the_spread_of_the_changes_over_test_sets():
    changes = {"nll": [], "ece": []}
    for seed in range(60):
        *networks, labels = drawn(2000, seed)
        for name, metric in (("nll", F.nll_loss), ("ece", ece)):
            before, after = (metric(network, labels) for network in networks)
            changes[name].append(after - before)
    errors = change_errors(*drawn(2000, 0))
    for name, values in changes.items():
        assert errors[name] == pytest.approx(torch.stack(values).std().item(), rel=0.25)


def ece(log_probabilities, labels):
    return multiclass_calibration_error(log_probabilities.exp(), labels, num_classes=4)


def test_the_same_network_has_no_change_and_no_error():
    single, _, labels = drawn(100, 0)
    assert change_errors(single, single, labels) == {"nll": 0, "ece": 0}
    assert change_errors(single[:1], single[:1], labels[:1]) == {}


def test_few_test_images_show_nothing():
    assert replace(gain(), n=99).summary().splitlines()[0] == (
        "not clear from 99 test images: accuracy -3.00 points (standard error below 6.76), NLL -0.2500 "
        "(standard error 0.0500), ECE +1.00 points (standard error 0.50)"
    )


def test_two_right_answers_of_two_are_not_certain():
    figures = replace(gain().single, metrics={"top1": 1.0, "nll": 0.1, "ece": 0.1})
    assert "100.00 ± 19.25" in replace(gain(), n=2, single=figures).table()
