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
    one_hot = F.one_hot(labels, 3).double()
    second = F.one_hot((logits - 1e9 * one_hot).argmax(dim=1), 3)
    targets = one_hot * 51 / 52 + second / 52  # Platt's, by hand
    best = fit_temperature(logits, labels)
    nll = F.cross_entropy(logits / best, targets)
    for other in (best / 1.01, best * 1.01):
        assert nll <= F.cross_entropy(logits / min(max(other, 1 / 32), 32), targets) + 1e-12


@pytest.mark.parametrize("n", [4, 40, 400])
def test_labels_that_are_always_right_leave_a_doubt(n):
    """With two classes as probable as each other, by the rule of succession."""
    logits = torch.eye(2).repeat(n // 2, 1)
    best = fit_temperature(logits, torch.arange(2).repeat(n // 2))
    assert (logits / best).softmax(dim=1).amax(dim=1).tolist() == pytest.approx([(n + 1) / (n + 2)] * n)


def test_a_doubt_is_hardly_seen_in_many_examples():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5000, 100, generator=generator, dtype=torch.float64)
    labels = (logits / 2).softmax(dim=1).multinomial(1, generator=generator).squeeze(1)
    best = fit_temperature(logits, labels)
    plain = min((F.cross_entropy(logits / t, labels).item(), t) for t in torch.linspace(1.9, 2.1, 201))[1]
    assert best == pytest.approx(plain.item(), abs=2e-3)


def test_a_network_that_is_always_wrong_knows_nothing():
    assert fit_temperature(torch.eye(4), (torch.arange(4) + 1) % 4) == pytest.approx(32)


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="logits is empty"):
        fit_temperature(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
