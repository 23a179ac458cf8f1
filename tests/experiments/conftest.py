import pytest
from matplotlib.figure import Figure

from netfission.experiments.contenders import CONTENDERS
from netfission.experiments.grid import Grid

# Runs of a second: 50 real digits, a small network, one epoch.
COMMON = {
    "data": "digits", "limit_per_class": 5, "validation": 0.0, "model": "wrn-10-1", "exits": 2, "epochs": 1,
    "batch_size": 25, "accelerator": "cpu",
}  # fmt: skip


@pytest.fixture
def grid_of():
    """A grid of these contenders, with changes to the common settings."""

    def make(*names: str, seeds: int = 1, **changes) -> Grid:
        contenders = {name: CONTENDERS[name] for name in names}
        return Grid(contenders, range(seeds), COMMON | changes, names[0])

    return make


@pytest.fixture
def undrawn(monkeypatch):
    """Comparisons draw an empty picture, for tests that look at none: drawing takes most of their time."""
    monkeypatch.setattr("netfission.experiments.plots.plot_against_cost", lambda *_: Figure((1, 1)))


@pytest.fixture
def few_timed(monkeypatch):
    """Costs are timed on batches of 1 and 2 images, for tests that do not look at the times."""
    monkeypatch.setattr("netfission.experiments.compare.LARGEST_BATCH", 2)
