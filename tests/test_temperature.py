import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from netfission import ensemble
from netfission.ensemble import ensemble_log_probabilities, ensemble_probabilities, fit_temperature
from netfission.evaluation.calibration import FEW_IMAGES


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10))
def test_the_temperature_that_labels_were_drawn_at_is_found(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    labels = logits.softmax(dim=1).multinomial(1, generator=generator).squeeze(1)
    assert fit_temperature(logits.unsqueeze(1) * temperature, labels) == pytest.approx(temperature, rel=0.05)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_no_temperature_is_more_likely(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(50, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (50,), generator=generator)
    best = fit_temperature(logits.unsqueeze(1), labels)

    def loss(t: float) -> float:
        t = min(max(t, 1 / 32), 32)
        prior = torch.distributions.Gamma(3.0, 2.0).log_prob(torch.tensor(1 / t, dtype=torch.float64))
        return F.cross_entropy(logits / t, labels, reduction="sum").item() - prior.item()

    assert loss(best) <= min(loss(best / 1.01), loss(best * 1.01)) + 1e-9


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32 - 1), st.floats(0.2, 5), st.sampled_from(["logits", "probabilities"]))
def test_labels_drawn_from_an_ensemble_give_its_temperature_by_its_rule(seed, temperature, average):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(5000, 3, 5, generator=generator, dtype=torch.float64)
    labels = ensemble_probabilities(logits, average).multinomial(1, generator=generator).squeeze(1)
    found = fit_temperature(logits * temperature, labels, average)
    assert found == pytest.approx(temperature, rel=0.15)


def test_of_several_maxima_the_highest_is_found():
    """One exit is confident and right for 30 of 40 images; another hardly prefers the right class."""
    labels = torch.zeros(40, dtype=torch.int64)
    steep = torch.tensor([20.0, 0.0]) * torch.where(torch.arange(40) < 30, 1.0, -1.0)[:, None]
    flat = torch.tensor([0.02, 0.0]).expand(40, 2)
    logits = torch.stack([steep, flat], dim=1).double()

    def loss(t: float) -> float:
        prior = torch.distributions.Gamma(3.0, 2.0).log_prob(torch.tensor(1 / t, dtype=torch.float64))
        log_probabilities = ensemble_log_probabilities(logits / t, "probabilities")
        return F.nll_loss(log_probabilities, labels, reduction="sum").item() - prior.item()

    best = min((2 ** (power / 50) for power in range(-250, 251)), key=loss)
    found = fit_temperature(logits, labels, "probabilities")
    assert loss(found) <= loss(best) + 1e-9


def test_before_the_bisection_half_octaves_are_tried(monkeypatch: pytest.MonkeyPatch):
    tried = []

    def log_probabilities(logits, average):
        tried.append(logits.max().item())
        return ensemble_log_probabilities(logits, average)

    monkeypatch.setattr(ensemble, "ensemble_log_probabilities", log_probabilities)
    fit_temperature(torch.eye(2).unsqueeze(1), torch.arange(2), "probabilities")
    assert tried == pytest.approx([2 ** (half / 2) for half in range(-10, 11)])


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("n", [4, 40, 400])
def test_labels_that_are_always_right_do_not_make_sure_of_everything(n, scale):
    """Nor is a network that is sure made surer by much."""
    logits = scale * torch.eye(4).repeat(n // 4, 1)
    best = fit_temperature(logits.unsqueeze(1), torch.arange(4).repeat(n // 4))
    assert 0.1 < best < 1
    assert best > 0.9 or scale < 10


def test_a_belief_is_hardly_seen_in_many_examples():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5000, 100, generator=generator, dtype=torch.float64)
    labels = (logits / 2).softmax(dim=1).multinomial(1, generator=generator).squeeze(1)
    best = fit_temperature(logits.unsqueeze(1), labels)
    plain = min((F.cross_entropy(logits / t, labels).item(), t) for t in torch.linspace(1.9, 2.1, 201))[1]
    assert best == pytest.approx(plain.item(), abs=2e-3)


def test_no_examples_are_refused():
    with pytest.raises(
        ValueError, match=r"^logits must be at least one example, got float32 of shape \(0, 2, 3\)$"
    ):
        fit_temperature(torch.empty(0, 2, 3), torch.empty(0, dtype=torch.int64))


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^logits must be of two classes or more, got float32 of shape"):
        fit_temperature(torch.zeros(3, 2, 1), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(("images", "least", "most"), [(FEW_IMAGES, 0.07, 0.13), (20, 0.17, 0.29)])
def test_a_temperature_that_is_fitted_to_few_images_is_a_guess(images, least, most):
    """The bound FEW_IMAGES rests on this."""
    generator, temperatures = torch.Generator().manual_seed(0), []
    for _ in range(40):
        logits = 3 * torch.randn(images, 1, 10, generator=generator)
        labels = logits[:, 0].softmax(dim=1).multinomial(1, generator=generator)[:, 0]
        temperatures.append(fit_temperature(logits, labels, "logits"))
    assert least < torch.tensor(temperatures).log().std() < most
