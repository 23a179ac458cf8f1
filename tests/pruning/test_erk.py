import math

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from netfission.pruning.erk import erk

shapes = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3), st.just(3)),
)


def published_counts(layers: list[tuple[int, ...]], keep: float) -> list[float]:
    """Weights per layer by RigL's rule: ε r_l N_l, layers over their size filled, ε solved anew."""
    full: set[int] = set()
    while True:
        open_layers = [i for i in range(len(layers)) if i not in full]
        left = keep - sum(math.prod(layers[i]) for i in full)
        raw = {i: sum(layers[i]) / math.prod(layers[i]) for i in open_layers}
        weighted = sum(raw[i] * math.prod(layers[i]) for i in open_layers)
        epsilon = left / weighted if open_layers else 0.0
        over = [i for i in open_layers if epsilon * raw[i] > 1]
        if not over:
            break
        # RigL fills the layer of the greatest raw density first, then solves again.
        full.add(max(over, key=lambda i: raw[i]))
    return [math.prod(shape) * (1.0 if i in full else epsilon * raw[i]) for i, shape in enumerate(layers)]


def kept_by_top_k(scores: dict[str, torch.Tensor], keep: int) -> dict[str, torch.Tensor]:
    flat = torch.cat([score.flatten() for score in scores.values()])
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    mask[flat.topk(keep).indices] = True
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}


@example([(37, 39), (2, 20, 3, 3), (11, 22, 3, 3), *[(13, 15, 3, 3)] * 3], 0.16384242115417585, 0)
@given(st.lists(shapes, min_size=1, max_size=6), st.floats(0.01, 0.99), st.integers(0, 99))
@settings(deadline=None, max_examples=100)
def test_one_top_k_keeps_the_published_counts(
    layers: list[tuple[int, ...]], density: float, seed: int
) -> None:
    weights = {str(i): torch.ones(shape) for i, shape in enumerate(layers)}
    keep = round(density * sum(weight.numel() for weight in weights.values()))
    scores = erk(torch.nn.Identity(), weights, [], torch.Generator().manual_seed(seed))
    kept = kept_by_top_k(scores, keep)
    counts = published_counts(layers, keep)
    still_open = sum(count for count, shape in zip(counts, layers, strict=True) if count < math.prod(shape))
    for mask, expected in zip(kept.values(), counts, strict=True):
        # Each count is rounded, and all are scaled by one factor so that they sum up after that.
        scaling = len(layers) * expected / (still_open or keep or 1)
        assert abs(int(mask.sum()) - expected) <= 0.5 * (1 + scaling) + 1e-9


@given(st.lists(shapes, min_size=1, max_size=4), st.floats(0.02, 0.98), st.floats(0.1, 0.9))
@settings(deadline=None, max_examples=50)
def test_two_rounds_keep_the_counts_of_one(
    layers: list[tuple[int, ...]], density: float, between: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {str(i): torch.ones(shape) for i, shape in enumerate(layers)}
    total = sum(weight.numel() for weight in weights.values())
    last = round(density * total)
    first = last + round(between * (total - last))
    for keep in (first, last):
        kept = kept_by_top_k(erk(torch.nn.Identity(), weights, [], generator), keep)
        assert all(weights[name][mask].all() for name, mask in kept.items())
        weights = {name: kept[name].float() for name in weights}
    for weight, expected in zip(weights.values(), published_counts(layers, last), strict=True):
        assert abs(int(weight.sum()) - expected) <= 1


def test_within_a_layer_every_weight_is_as_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.ones(6, 10)}
    times = torch.zeros(6, 10)
    for _ in range(2000):
        times += kept_by_top_k(erk(torch.nn.Identity(), weights, [], generator), 15)["w"]
    # 500 expected of each, standard deviation 19.4
    assert (times - 500).abs().max() < 90
