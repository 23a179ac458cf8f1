"""What the tests of exports share."""

from functools import cache

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_table_of_operators():
    """Make PyTorch's table of ONNX operators once: every export makes it anew, in a fifth of its time."""
    registration = pytest.importorskip("torch.onnx._internal.exporter._registration")
    pytest.importorskip("onnxscript")
    registry = registration.ONNXRegistry
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "from_torchlib", staticmethod(cache(registry.from_torchlib)))
        yield
