from pathlib import Path

import pytest

from netfission.config import DataConfig, FissionConfig, ModelConfig, RunConfig, TrainingConfig
from netfission.runs.train import train


def settings(**changes) -> RunConfig:
    """A run of seconds: 200 real digits, a small network, two epochs."""
    flat = RunConfig(
        DataConfig("digits", limit_per_class=20),
        ModelConfig("wrn-10-1"),
        FissionConfig(exits=2, sparsity=0.5, seed=3),
        TrainingConfig(epochs=2, batch_size=50, accelerator="cpu", pruning_batches=1),
    ).to_dict()
    return RunConfig.from_dict(flat | changes)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a finished run; not to be changed."""
    path = tmp_path_factory.mktemp("runs") / "run"
    train(settings(), path, progress=False)
    return path


@pytest.fixture(scope="session")
def settings_of():
    """`settings` itself, for tests that change some."""
    return settings
