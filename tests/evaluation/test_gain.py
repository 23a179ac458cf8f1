from dataclasses import replace

import pytest

from netfission.evaluation.gain import Gain, NetworkFigures
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
    return Gain(400, single, ensemble, times, {"device": "CPU"})


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
        "better than the single network: NLL -0.2500\n"
        "worse than the single network: ECE +1.00 points\n"
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
    import json

    assert typed(Gain, json.loads(gain().to_json())) == gain()


def test_what_the_test_images_show_is_called_better_or_worse():
    better = replace(
        gain(), n=40_000, ensemble=replace(gain().ensemble, metrics={"top1": 0.66, "nll": 1.4, "ece": 0.04})
    )
    assert better.summary().splitlines()[:-1] == [
        "better than the single network: accuracy +2.00 points (standard error below 0.34), NLL -0.1000",
        "as the single network: ECE +0.00 points",
    ]
    worse = replace(better, single=better.ensemble, ensemble=better.single)
    assert worse.summary().splitlines()[0] == (
        "worse than the single network: accuracy -2.00 points (standard error below 0.34), NLL +0.1000"
    )


def test_few_test_images_show_nothing():
    assert replace(gain(), n=99).summary().splitlines()[0] == (
        "not clear from 99 test images: accuracy -3.00 points (standard error below 6.76), NLL -0.2500, ECE "
        "+1.00 points"
    )


def test_two_right_answers_of_two_are_not_certain():
    figures = replace(gain().single, metrics={"top1": 1.0, "nll": 0.1, "ece": 0.1})
    assert "100.00 ± 19.25" in replace(gain(), n=2, single=figures).table()
