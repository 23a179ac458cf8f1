"""What every criterion owes its caller."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netfission.pruning.erk import erk
from netfission.pruning.grasp import grasp
from netfission.pruning.magnitude import magnitude
from netfission.pruning.random import random
from netfission.pruning.snip import snip
from netfission.pruning.synflow import synflow

ALL = [random, erk, magnitude, snip, grasp, synflow]
DATA_FREE = [random, erk, magnitude]
READING_DATA = [snip, grasp]
Criterion = Callable[..., dict[str, Tensor]]

every = pytest.mark.parametrize("criterion", ALL, ids=lambda criterion: criterion.__name__)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@every
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_model_weights_and_global_generator_stay_as_they_were(
    criterion: Criterion, training: bool, tiny: Any, weights: dict[str, Tensor], batches: Any
) -> None:
    model = tiny(0.5).train(training)
    model.bn.training = not training  # a frozen layer stays frozen, a live one live
    state, given = copy.deepcopy(model.state_dict()), copy.deepcopy(weights)
    images = [images.clone() for images, _ in batches]
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()

    criterion(model, weights, batches, seeded())

    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(weights, given, rtol=0, atol=0)
    torch.testing.assert_close([images for images, _ in batches], images, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(weight.requires_grad for weight in weights.values())
    assert torch.equal(torch.get_rng_state(), random_state)


@every
def test_scores_are_detached_finite_and_shaped_like_the_weights(
    criterion: Criterion, tiny: Any, weights: dict[str, Tensor], batches: Any
) -> None:
    scores = criterion(tiny(0.5), weights, batches, seeded())
    assert list(scores) == list(weights)
    for name, score in scores.items():
        assert score.shape == weights[name].shape
        assert score.isfinite().all()
        assert not score.requires_grad


@every
def test_same_seed_same_scores(
    criterion: Criterion, tiny: Any, weights: dict[str, Tensor], batches: Any
) -> None:
    scores = []
    for global_seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            scores.append(criterion(tiny(0.5), weights, batches, seeded()))
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=0)


@pytest.mark.parametrize("criterion", [random, erk, snip, grasp], ids=lambda c: c.__name__)
def test_other_seed_other_scores(
    criterion: Criterion, tiny: Any, weights: dict[str, Tensor], batches: Any
) -> None:
    first, second = (criterion(tiny(0.5), weights, batches, seeded(seed)) for seed in (1, 2))
    assert all(not torch.equal(first[name], second[name]) for name in weights)


@every
def test_only_the_given_weights_count(
    criterion: Criterion, tiny: Any, weights: dict[str, Tensor], batches: Any
) -> None:
    model, other = tiny(0.0), tiny(0.0)
    for name in weights:
        nn.init.constant_(other.get_parameter(name), 9.0)
    scores = [criterion(network, weights, batches, seeded()) for network in (model, other)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=0)


@every
def test_a_subset_of_the_weights_may_be_scored(
    criterion: Criterion, tiny: Any, weights: dict[str, Tensor], batches: Any
) -> None:
    scores = criterion(tiny(0.0), {"fc.weight": weights["fc.weight"]}, batches, seeded())
    assert list(scores) == ["fc.weight"]


@every
def test_works_where_gradients_are_switched_off(
    criterion: Criterion, tiny: Any, weights: dict[str, Tensor], batches: Any
) -> None:
    expected = criterion(tiny(0.0), weights, batches, seeded())
    with torch.no_grad():
        scores = criterion(tiny(0.0), weights, batches, seeded())
    torch.testing.assert_close(scores, expected, rtol=0, atol=0)


@pytest.mark.parametrize("criterion", [snip, grasp, synflow], ids=lambda c: c.__name__)
def test_removed_weights_and_weights_out_of_use_score_zero(
    criterion: Criterion, tiny: Any, weights: dict[str, Tensor], batches: Any
) -> None:
    model = tiny(0.0)
    model.unused = nn.Linear(3, 3)
    weights = weights | {"unused.weight": torch.ones(3, 3)}
    scores = criterion(model, weights, batches, seeded())
    assert not scores["unused.weight"].any()
    for name, weight in weights.items():
        assert not scores[name][weight == 0].any()


@pytest.mark.parametrize("criterion", DATA_FREE, ids=lambda c: c.__name__)
def test_no_data_needed(criterion: Criterion, tiny: Any, weights: dict[str, Tensor]) -> None:
    assert criterion(tiny(0.0), weights, [], seeded())


@pytest.mark.parametrize("criterion", [snip, grasp, synflow], ids=lambda c: c.__name__)
def test_modes_and_global_generator_are_put_back_after_an_error(
    criterion: Criterion, tiny: Any, weights: dict[str, Tensor]
) -> None:
    model = tiny(0.5)
    model.bn.eval()
    random_state = torch.get_rng_state()
    wrong_channels = [(torch.zeros(2, 3, 7, 7, dtype=torch.float64), torch.zeros(2).long())]
    with pytest.raises(RuntimeError, match="channels"):
        criterion(model, weights, wrong_channels, seeded())
    assert model.training
    assert not model.bn.training
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("criterion", READING_DATA, ids=lambda c: c.__name__)
@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range_are_refused(
    criterion: Criterion, label: int, tiny: Any, weights: dict[str, Tensor], batches: Any
) -> None:
    images, _ = batches[1]
    broken = [batches[0], (images, torch.tensor([0, label, label]))]
    with pytest.raises(ValueError, match=rf"^labels of batches must be .* from 0 to 4, got {label} \(2 of 3"):
        criterion(tiny(0.0), weights, broken, seeded())


@pytest.mark.parametrize("criterion", READING_DATA, ids=lambda c: c.__name__)
def test_soft_labels_equal_hard_ones(
    criterion: Criterion, tiny: Any, weights: dict[str, Tensor], batches: Any
) -> None:
    soft = [(images, F.one_hot(labels, 5).double()) for images, labels in batches]
    hard, same = (criterion(tiny(0.0), weights, data, seeded()) for data in (batches, soft))
    torch.testing.assert_close(same, hard)


class Attending(nn.Module):
    """Attention by PyTorch's fused kernel, over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.fc = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.flatten(2)
        return self.fc(self.attention(rows, rows, rows, need_weights=False)[0].mean(1))


@every
def test_attention_is_scored(criterion: Criterion) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attending()
    names = ["attention.in_proj_weight", "attention.out_proj.weight", "fc.weight"]
    weights = {name: model.get_parameter(name).detach() for name in names}
    batch = (torch.rand(4, 6, 3, 4, generator=seeded()), torch.tensor([0, 1, 2, 3]))
    scores = criterion(model, weights, [batch], seeded())
    assert all(score.isfinite().all() and score.any() for score in scores.values())
