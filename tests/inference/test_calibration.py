import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from netfission.inference.calibration import fit_temperature


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10))
def test_the_temperature_that_labels_were_drawn_at_is_found(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    labels = logits.softmax(dim=1).multinomial(1, generator=generator).squeeze(1)
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_no_temperature_is_more_likely(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(50, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (50,), generator=generator)
    best = fit_temperature(logits, labels)
    nll = F.cross_entropy(logits / best, labels)
    for other in (best / 1.01, best * 1.01):
        assert nll <= F.cross_entropy(logits / min(max(other, 1 / 32), 32), labels) + 1e-12


def test_labels_that_are_always_right_want_the_lowest():
    assert fit_temperature(torch.eye(4), torch.arange(4)) == pytest.approx(1 / 32)


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="logits is empty"):
        fit_temperature(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
