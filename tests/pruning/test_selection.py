"""Exact selection: neither ties nor rounding lose or gain a weight."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netfission.pruning.selection import select

FEW = settings(deadline=None, max_examples=80)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@FEW
@given(
    shapes=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=5),
    value=st.sampled_from([0.0, 1.0, -3.5, torch.inf, -torch.inf]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    data=st.data(),
)
def test_ties_neither_lose_nor_gain_a_weight(
    shapes: list[list[int]], value: float, dtype: torch.dtype, data: st.DataObject
) -> None:
    scores = {f"w{i}": torch.full(shape, value, dtype=dtype) for i, shape in enumerate(shapes)}
    keep = data.draw(st.integers(0, sum(score.numel() for score in scores.values())))
    kept = select(scores, keep)
    assert list(kept) == list(scores)
    assert all(kept[n].shape == scores[n].shape and kept[n].dtype is torch.bool for n in scores)
    assert sum(int(mask.sum()) for mask in kept.values()) == keep


@FEW
@given(levels=st.integers(1, 4), seed=st.integers(0, 2**31), data=st.data())
def test_ties_at_the_threshold_give_way_to_higher_scores(levels: int, seed: int, data: st.DataObject) -> None:
    flat = torch.randint(levels, (120,), generator=seeded(seed)).float()
    keep = data.draw(st.integers(0, 120))
    scores = {"a": flat[:40].view(5, 8), "b": flat[40:].view(2, 4, 10)}
    kept = select(scores, keep)
    chosen = torch.cat([kept["a"].flatten(), kept["b"].flatten()])
    assert int(chosen.sum()) == keep
    assert flat[chosen].sort().values.equal(flat.sort().values[120 - keep :])


@FEW
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    share=st.floats(0, 1),
)
def test_the_best_are_those_of_an_independent_sort(sizes: list[int], seed: int, share: float) -> None:
    scores = {
        str(i): torch.randn(size, generator=seeded(seed + i), dtype=torch.float64)
        for i, size in enumerate(sizes)
    }
    keep = int(share * sum(sizes))
    flat = np.concatenate([score.numpy() for score in scores.values()])
    expected = np.zeros(len(flat), dtype=bool)
    expected[np.argsort(-flat)[:keep]] = True
    chosen = torch.cat(list(select(scores, keep).values())).numpy()
    assert np.array_equal(chosen, expected)


def test_the_generator_chooses_among_ties_only() -> None:
    scores = {"a": torch.tensor([2.0, 1.0, 0.0, 1.0, 1.0]), "b": torch.tensor([1.0, 3.0, 1.0])}
    kept = [torch.cat(list(select(scores, 4, seeded(seed)).values())) for seed in range(40)]
    assert all(int(mask.sum()) == 4 and mask[0] and mask[6] and not mask[2] for mask in kept)
    chosen = torch.stack(kept).float().mean(0)[[1, 3, 4, 5, 7]]
    assert ((chosen > 0.1) & (chosen < 0.8)).all()  # 2 of 5, each as likely as the others
    assert torch.equal(kept[0], torch.cat(list(select(scores, 4, seeded(0)).values())))


def test_selection_is_over_all_tensors_together() -> None:
    kept = select({"low": torch.zeros(3, 3), "high": torch.ones(4)}, 4)
    assert not kept["low"].any() and kept["high"].all()


@pytest.mark.parametrize("keep", range(7))
def test_what_is_gone_comes_last(keep: int) -> None:
    scores = {"a": torch.tensor([-torch.inf, -1e30, 2.0]), "b": torch.tensor([-torch.inf, -5.0, -torch.inf])}
    kept = select(scores, keep)
    chosen = torch.cat(list(kept.values()))
    alive = torch.tensor([False, True, True, False, True, False])
    assert int(chosen.sum()) == keep
    assert int((chosen & alive).sum()) == min(keep, 3)


def test_nan_scores_are_refused_by_name() -> None:
    scores = {"fine": torch.ones(3), "broken": torch.tensor([1.0, torch.nan])}
    with pytest.raises(
        ValueError, match=r"^pruning scores must be numbers, got NaN in broken; check the images"
    ):
        select(scores, 2)
