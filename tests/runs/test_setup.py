"""What is built from settings and a data set."""

import warnings
from collections.abc import Callable

import pytest

from netfission.config import RunConfig
from netfission.runs.setup import build_network, load_run_data


def test_a_reconstruction_of_random_weights_is_warned_of(settings_of: Callable[..., RunConfig]) -> None:
    config = settings_of(sparsity=0.0, grouping="channels", reconstruct=True)
    data = load_run_data(config.data, seed=0)
    message = "^reconstruct has nothing to keep: without weights or pretrained, all weights are random$"
    with pytest.warns(UserWarning, match=message):
        build_network(config, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_network(settings_of(sparsity=0.0, grouping="channels"), data)


def test_images_of_a_size_that_the_model_does_not_accept_are_refused_by_their_setting(
    settings_of: Callable[..., RunConfig],
) -> None:
    config = settings_of(model="vit_tiny_patch16_224", sparsity=0.0, grouping="copies")
    message = r"^image_size must be a size that vit_tiny_patch16_224 accepts, got images of 8×8 \(Input heig"
    with pytest.raises(ValueError, match=message):
        build_network(config, load_run_data(config.data, seed=0))
