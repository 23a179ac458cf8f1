"""Prune and regrow: exact counts, the right weights, and zeros that stay zeros."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from netfission.pruning.regrow import exchanged, regrow, reset_state
from netfission.surgery.masks import apply_masks, dense_gradients, kept_masks, masked_weights

FEW = settings(deadline=None, max_examples=40)
IMAGES = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int = 0, density: float = 0.4) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(2, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 2),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
        apply_masks(net, {name: torch.rand(mask.shape) < density for name, mask in kept_masks(net).items()})
    return net


def loss_of(net: nn.Module) -> Tensor:
    return F.cross_entropy(net(IMAGES), LABELS)


def counts(net: nn.Module) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in kept_masks(net).items()}


def assert_zeros(net: nn.Module) -> None:
    for name, weight, removed in masked_weights(net):
        assert not weight[removed].any(), name


# --- one layer --------------------------------------------------------------------------------------


@FEW
@given(
    size=st.integers(1, 60),
    levels=st.integers(1, 5),
    density=st.floats(0, 1),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_the_smallest_go_and_the_most_promising_come_back(
    size: int, levels: int, density: float, share: float, seed: int
) -> None:
    generator = seeded(seed)
    kept = torch.rand(size, generator=generator) < density
    magnitude = torch.randint(levels, (size,), generator=generator).float()  # full of ties
    promise = torch.randint(levels, (size,), generator=generator).float()
    after = exchanged(kept, magnitude, promise, share, generator)
    number = min(int(share * int(kept.sum())), int((~kept).sum()))
    gone, back = kept & ~after, after & ~kept
    assert int(after.sum()) == int(kept.sum())
    assert int(gone.sum()) == int(back.sum()) == number
    assert np.array_equal(np.sort(magnitude[gone]), np.sort(magnitude[kept])[:number])
    assert np.array_equal(np.sort(promise[back]), np.sort(promise[~kept])[int((~kept).sum()) - number :])


def test_what_goes_does_not_come_back_at_once() -> None:
    kept = torch.tensor([True, True, False])
    after = exchanged(kept, torch.tensor([0.1, 1.0, 0.0]), torch.tensor([9.0, 0.0, 1.0]), 0.5, seeded())
    assert after.tolist() == [False, True, True]


@pytest.mark.parametrize("kept", [torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)])
def test_an_empty_or_a_full_layer_stays(kept: Tensor) -> None:
    assert torch.equal(exchanged(kept, torch.rand(4), torch.rand(4), 1.0, seeded()), kept)


# --- a network --------------------------------------------------------------------------------------


def test_gradients_choose_what_comes_back() -> None:
    net = network()
    raw = dict(
        zip(
            dict(net.named_parameters()),
            torch.autograd.grad(loss_of(net), list(net.parameters())),
            strict=True,
        )
    )
    before = {name: mask.clone() for name, mask in kept_masks(net).items()}
    weights = {name: weight.detach().clone() for name, weight, _ in masked_weights(net)}
    with dense_gradients(net):
        loss_of(net).backward()
        changed = regrow(net, 0.3, "gradient", seeded())
    for name, after in kept_masks(net).items():
        back, gone = after & ~before[name], before[name] & ~after
        assert back.any()
        assert torch.equal(changed[name], back | gone)
        assert raw[name][back].abs().min() >= raw[name][~before[name] & ~back].abs().max()
        assert weights[name][gone].abs().max() <= weights[name][before[name] & after].abs().min()
        now = net.get_parameter(name)
        assert not now[changed[name]].any()
        assert torch.equal(now[~changed[name]], weights[name][~changed[name]])


def test_chance_follows_from_the_generator_alone() -> None:
    nets = [network() for _ in range(3)]
    for net, seed in zip(nets, (5, 5, 6), strict=True):
        loss_of(net).backward()
        torch.rand(seed)  # the global generator plays no part
        regrow(net, 0.5, "random", seeded(seed))
    first, again, other = (kept_masks(net) for net in nets)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_copy_moves_by_itself() -> None:
    net = network()
    other = copy.deepcopy(net)
    regrow(other, 0.5, "random", seeded())
    assert all(torch.equal(mask, kept_masks(network())[name]) for name, mask in kept_masks(net).items())


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_gradients_that_are_no_numbers_do_no_harm(value: float) -> None:
    net = network()
    before = counts(net)
    loss_of(net).backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(value)
    changed = regrow(net, 0.5, "gradient", seeded())
    assert all(places.any() for places in changed.values())
    assert counts(net) == before


def test_a_network_that_has_seen_no_gradient_moves_by_chance() -> None:
    net = network()
    before = counts(net)
    assert all(places.any() for places in regrow(net, 0.5, "gradient", seeded()).values())
    assert counts(net) == before


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda net: torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1),
    "amsgrad": lambda net: torch.optim.Adam(net.parameters(), lr=0.01, amsgrad=True),
    "rmsprop": lambda net: torch.optim.RMSprop(net.parameters(), lr=0.01, momentum=0.5),
    "adagrad": lambda net: torch.optim.Adagrad(net.parameters(), lr=0.05),
}


@FEW
@given(
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    growth=st.sampled_from(["gradient", "random"]),
    shares=st.lists(st.floats(0, 1) | st.none(), min_size=1, max_size=6),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_training_keeps_counts_and_zeros_at_every_step(
    optimizer: str, growth: str, shares: list[float | None], density: float, seed: int
) -> None:
    net = network(seed, density)
    chosen = OPTIMIZERS[optimizer](net)
    before = counts(net)
    for step, share in enumerate(shares):  # a share: connections move; None: the weights learn
        chosen.zero_grad()
        if share is None:
            loss_of(net).backward()
            chosen.step()
        else:
            with dense_gradients(net):
                loss_of(net).backward()
                reset_state(chosen, net, regrow(net, share, growth, seeded(step)))
        assert_zeros(net)
        assert counts(net) == before
        for name, weight, removed in masked_weights(net):
            assert weight.isfinite().all()
            for memory in chosen.state.get(weight, {}).values():
                if isinstance(memory, Tensor) and memory.shape == weight.shape:
                    assert not memory[removed].any(), name


def test_what_comes_back_is_new_to_the_optimizer_and_nothing_else_is() -> None:
    net = network()
    optimizer = OPTIMIZERS["sgd"](net)
    loss_of(net).backward()
    optimizer.step()
    remembered = {name: optimizer.state[weight]["momentum_buffer"] for name, weight, _ in masked_weights(net)}
    for memory in remembered.values():
        memory.fill_(1.0)
    changed = regrow(net, 0.5, "random", seeded())
    reset_state(optimizer, net, changed)
    for name, memory in remembered.items():
        assert changed[name].any()
        assert torch.equal(memory, (~changed[name]).float())
