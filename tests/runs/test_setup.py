"""What is built from settings and a data set."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from netfission.config import DataConfig, RunConfig, TrainingConfig
from netfission.runs.lightning_module import RunDataModule
from netfission.runs.setup import build_network, load_run_data, make_batches, network_spec


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
    message = (
        r"^image_size must be a size that vit_tiny_patch16_224 accepts, got images of 8×8 \("
        r"Calculated padded input size per channel: \(8 x 8\)\. Kernel size: \(16 x 16\)\."
    )
    with pytest.raises(ValueError, match=message):
        build_network(config, load_run_data(config.data, seed=0))


def test_images_are_normalised_as_the_settings_say(settings_of):
    config = settings_of(mean=[0.5], std=[0.25])
    data = load_run_data(config.data, seed=0)
    images, _ = next(iter(make_batches(data.train, data, 4)))
    assert torch.allclose(images, (data.train.images[:4] / 255 - 0.5) / 0.25, atol=1e-6)
    spec = network_spec(config, data)
    assert (spec.mean, spec.std) == ([0.5], [0.25])


def test_a_training_alone_has_larger_images_for_random_crops() -> None:
    images = DataConfig("digits", image_size=4, crop_scale=0.25, limit_per_class=2, workers=0)
    config = RunConfig(images, training=TrainingConfig(batch_size=5))
    data = load_run_data(images, 0, training=True)
    assert load_run_data(images, 0).crops is None
    module = RunDataModule(config, data)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=1)
    batches = module.train_dataloader()
    assert batches.split is data.crops and batches.split.images.shape == (20, 1, 8, 8)
    assert {images.shape for images, _ in batches} == {(5, 1, 4, 4)}
