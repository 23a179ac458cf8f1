import copy
import math
import weakref
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import accumulate, permutations, product

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor, nn

import netfission as nf
from netfission.inference import Cascade, CascadeOutput, cascade_logits, exit_costs
from netfission.inference.cascade import RULES, ExitCosts, step_by_step
from netfission.models import create_model
from netfission.profiling.macs import count_macs

CLASSES = 5
IMAGES = torch.randn(23, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LAYOUTS = [(), (1,), (1, 2), (2, 1), (1, 1), (1, 2, 2)]
LOOSE = {"atol": 1e-5, "rtol": 1e-5}


@cache
def build(branch_after: tuple[int, ...], sparsity: float = 0.0) -> nf.FissionNetwork:
    """A network in eval mode whose logits are well apart; shared, so tests must not change it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("wrn-10-1", CLASSES)
        net = nf.fission(
            model,
            len(branch_after) + 1,
            branch_after=branch_after,
            example_input=IMAGES,
            sparsity=sparsity,
            criterion="random",
        )
        for path in net.paths:
            nn.init.normal_(path.head.get_parameter("fc.weight"), std=0.5)
        net.train()(IMAGES)  # norms that fit the images
    return net.eval()


@cache
def logits_of(branch_after: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        return build(branch_after)(IMAGES)


layouts_orders_and_thresholds = st.sampled_from(LAYOUTS).flatmap(
    lambda layout: st.tuples(
        st.just(layout),
        st.permutations(range(len(layout) + 1)),
        st.lists(st.floats(0, 1), min_size=len(layout), max_size=len(layout)),
    )
)


def clear_of_rounding(layout: tuple[int, ...], order: list[int], thresholds: list[float], rule: str) -> bool:
    """Whether no image's confidence is so near a threshold that rounding could decide."""
    _, scores = step_by_step(logits_of(layout), order, rule)
    return not ((scores - torch.tensor(thresholds)).abs() < 1e-5).any()


@settings(deadline=None, max_examples=120)
@given(drawn=layouts_orders_and_thresholds, rule=st.sampled_from(RULES))
def test_what_runs_is_what_the_logits_say(drawn, rule) -> None:
    layout, order, thresholds = drawn
    assume(clear_of_rounding(layout, order, thresholds, rule))
    output = Cascade(build(layout), thresholds, order=order, rule=rule).run(IMAGES)
    expected = cascade_logits(logits_of(layout), thresholds, order=order, rule=rule)
    assert torch.equal(output.exits_used, expected.exits_used)
    torch.testing.assert_close(output.logits, expected.logits, **LOOSE)


def weighted(layout: tuple[int, ...]) -> nf.FissionNetwork:
    """A network whose exits but the first are said to be linear, with a weight of their own."""
    net = copy.copy(build(layout))
    net.config = replace(net.config, exits=1, linear_exits=list(layout), linear_weight=0.3)
    return net


@settings(deadline=None, max_examples=30)
@given(drawn=layouts_orders_and_thresholds)
def test_exits_count_by_their_weights(drawn) -> None:
    layout, order, thresholds = drawn
    net = weighted(layout)
    weights = (1.0, *[0.3] * len(layout))
    _, scores = step_by_step(logits_of(layout), order, "margin", weights)
    assume(not ((scores - torch.tensor(thresholds)).abs() < 1e-5).any())
    output = Cascade(net, thresholds, order=order).run(IMAGES)
    expected = cascade_logits(logits_of(layout), thresholds, order=order, weights=weights)
    assert torch.equal(output.exits_used, expected.exits_used)
    torch.testing.assert_close(output.logits, expected.logits, **LOOSE)
    full = Cascade(net, [1.0] * len(layout), order=order)(IMAGES)
    torch.testing.assert_close(full, net.ensemble()(IMAGES), **LOOSE)
    mean = (logits_of(layout) * torch.tensor(weights)[:, None]).sum(dim=1) / sum(weights)
    torch.testing.assert_close(full, mean, **LOOSE)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.0, 1.0), r"^weights must be above 0 for each exit of a cascade, got \(0\.0, 1\.0\)$"),
        ((1.0,), r"^weights must be 2 weights, one of at least 0 per exit, not all 0, got \(1\.0,\)$"),
    ],
)
def test_weights_that_no_cascade_has_are_refused(weights, message) -> None:
    with pytest.raises(ValueError, match=message):
        Cascade(build((1,)), [0.5], order=[0, 1], weights=weights)
    with pytest.raises(ValueError, match=message):
        cascade_logits(logits_of((1,)), [0.5], weights=weights)


def by_hand(
    logits: list[list[float]], thresholds: list[float], order: list[int], rule: str
) -> tuple[list[float], int]:
    """One image's mean logits and exits used, in plain Python."""
    exits = len(logits)
    for used in range(1, exits + 1):
        run = [logits[number] for number in order[:used]]
        mean = [math.fsum(column) / used for column in zip(*run, strict=True)]
        best = mean.index(max(mean))
        exponentials = sorted(math.exp(value - max(mean)) for value in mean)
        if rule == "margin":
            score = (exponentials[-1] - exponentials[-2]) / math.fsum(exponentials)
        elif rule == "confidence":
            score = 1 / math.fsum(math.exp(value - max(mean)) for value in mean)
        else:
            score = sum(one.index(max(one)) == best for one in run) / exits
        if used == exits or score > thresholds[used - 1]:
            return mean, used
    raise AssertionError


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    exits=st.integers(1, 5),
    share=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    rule=st.sampled_from(RULES),
)
def test_the_pure_function_is_its_definition(seed, exits, share, rule) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(9, exits, 3, generator=generator, dtype=torch.float64)
    order = torch.randperm(exits, generator=generator).tolist()
    thresholds = [min(value + 1e-9, 1.0) for value in share[: exits - 1]]  # off the shares of votes
    output = cascade_logits(logits, thresholds, order=order, rule=rule)
    for image, mean, used in zip(logits.tolist(), *output, strict=True):
        expected_mean, expected_used = by_hand(image, thresholds, order, rule)
        assert used == expected_used
        assert mean.tolist() == pytest.approx(expected_mean)


@settings(deadline=None, max_examples=80)
@given(drawn=layouts_orders_and_thresholds, raised=st.floats(0, 1), rule=st.sampled_from(RULES))
def test_higher_thresholds_never_use_fewer_exits(drawn, raised, rule) -> None:
    layout, order, thresholds = drawn
    higher = [threshold + raised * (1 - threshold) for threshold in thresholds]
    lower_used, higher_used = (
        cascade_logits(logits_of(layout), each, order=order, rule=rule).exits_used
        for each in (thresholds, [min(value, 1.0) for value in higher])
    )
    assert (higher_used >= lower_used).all()


@pytest.mark.parametrize("rule", RULES)
def test_no_tie_goes_on_at_zero(rule) -> None:
    assert cascade_logits(torch.zeros(1, 2, 3), [0.0], rule=rule).exits_used == 1
    assert cascade_logits(torch.zeros(1, 2, 2), [0.0], rule=rule).exits_used == 1


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^logits must be of two classes or more, got float32 of shape "):
        cascade_logits(torch.zeros(1, 2, 1), [0.0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_thresholds_of_one_run_all_and_of_zero_the_first(layout, rule) -> None:
    net = build(layout)
    order = list(reversed(range(net.exits)))
    full = Cascade(net, [1.0] * len(layout), order=order, rule=rule).run(IMAGES)
    torch.testing.assert_close(full.logits, net.ensemble()(IMAGES), **LOOSE)
    assert (full.exits_used == net.exits).all()
    first = Cascade(net, [0.0] * len(layout), order=order, rule=rule).run(IMAGES)
    torch.testing.assert_close(first.logits, logits_of(layout)[:, order[0]], **LOOSE)
    assert (first.exits_used == 1).all()


def median_cascade(layout: tuple[int, ...], order: list[int]) -> Cascade:
    """Half of the images stop at each step."""
    _, scores = step_by_step(logits_of(layout), order, "margin")
    thresholds: list[float] = []
    going = torch.ones(len(scores), dtype=torch.bool)
    for column in scores.unbind(1):
        ranked = column[going].sort().values
        thresholds.append(ranked[len(ranked) // 2 - 1 : len(ranked) // 2 + 1].mean().item())
        going &= column <= thresholds[-1]
    return Cascade(build(layout), thresholds, order=order)


@pytest.mark.parametrize("layout", [(1, 2), (1, 1), (1, 2, 2)], ids=str)
def test_batches_do_not_matter(layout) -> None:
    cascade = median_cascade(layout, list(range(len(layout) + 1)))
    whole = cascade.run(IMAGES)
    assert set(whole.exits_used.tolist()) == set(range(1, len(layout) + 2))
    shuffled = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(1))
    backwards = cascade.run(IMAGES[shuffled])
    assert torch.equal(backwards.exits_used, whole.exits_used[shuffled])
    torch.testing.assert_close(backwards.logits, whole.logits[shuffled], **LOOSE)
    for size in (1, 4, 22):
        parts = [cascade.run(part) for part in IMAGES.split(size)]
        assert torch.equal(torch.cat([part.exits_used for part in parts]), whole.exits_used)
        torch.testing.assert_close(torch.cat([part.logits for part in parts]), whole.logits, **LOOSE)
    assert cascade.run(IMAGES[:0]).logits.shape == (0, CLASSES)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_each_stage_runs_once_on_the_images_that_go_on(memory_format) -> None:
    layout, order = (1, 2), [2, 0, 1]
    cascade = copy.deepcopy(median_cascade(layout, order)).to(memory_format=memory_format)
    seen: Counter[str] = Counter()
    runs: Counter[str] = Counter()

    def count(name):
        def hook(_module, inputs, _output):
            runs[name] += 1
            seen[name] += len(inputs[0])
            assert inputs[0].ndim < 4 or inputs[0].is_contiguous(memory_format=memory_format)

        return hook

    net = cascade.network
    net.stem.register_forward_hook(count("stem"))
    for number, path in enumerate(net.paths):
        for index, stage in enumerate(path.stages, start=(0, *layout)[number]):
            stage.register_forward_hook(count(f"{number}/{index}"))
        path.head.register_forward_hook(count(f"{number}/head"))
    used = cascade.run(IMAGES.contiguous(memory_format=memory_format)).exits_used
    first, second, third = (int((used > step).sum()) for step in range(3))
    assert first > second > third > 0
    assert set(runs.values()) == {1}
    expected = dict.fromkeys(["stem", "0/0", "0/1", "2/2", "2/head"], first)
    expected |= dict.fromkeys(["0/2", "0/head"], second)
    expected |= dict.fromkeys(["1/1", "1/2", "1/head"], third)
    assert seen == expected


def test_what_is_not_run_costs_nothing() -> None:
    net = copy.deepcopy(build((1, 2)))

    def refuse(*_):
        raise AssertionError

    for module in (net.paths[0].stages[1], net.paths[0].head, net.paths[2]):
        module.register_forward_hook(refuse)
    assert (Cascade(net, [0, 1], order=[1, 0, 2]).run(IMAGES).exits_used == 1).all()


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_features_are_kept_only_while_a_later_exit_needs_them(order) -> None:
    layout = (1, 2)
    net = copy.deepcopy(build(layout))
    leaves = (3, *layout)
    held: dict[int, weakref.ref[Tensor]] = {}
    for depth, module in enumerate([net.stem, *net.paths[0].stages]):
        module.register_forward_hook(
            lambda _module, _inputs, output, depth=depth: held.update({depth: weakref.ref(output)})
        )
    alive: list[set[int]] = []

    def look(*_):
        alive.append({depth for depth, reference in held.items() if reference() is not None})

    for module in (net.paths[0].head, net.paths[1].head, net.paths[2].head):
        module.register_forward_hook(look)
    Cascade(net, [1, 1], order=order)(IMAGES)
    for step, now in enumerate(alive):
        reached = max(leaves[number] for number in order[: step + 1])
        needed = {min(leaves[number], reached) for number in order[step + 1 :]}
        running = {leaves[order[step]]}  # the exit that runs still holds what it reads
        assert needed <= now <= needed | running


def test_it_is_a_classifier_that_shares_the_weights() -> None:
    net = copy.deepcopy(build((1, 2)))
    cascade = Cascade(net, [0.5, 0.5], order=[0, 1, 2])
    assert {id(p) for p in cascade.parameters()} == {id(p) for p in net.parameters()}
    logits = cascade(IMAGES)
    assert logits.shape == (len(IMAGES), CLASSES)
    assert torch.equal(logits, cascade.run(IMAGES).logits)
    assert not logits.requires_grad
    assert isinstance(cascade.run(IMAGES), CascadeOutput)
    assert cascade.double()(IMAGES.double()).dtype == torch.float64
    assert cascade.bfloat16()(IMAGES.bfloat16()).dtype == torch.float32


class Replacement(nn.Module):
    """No `FissionNetwork`, but with what a cascade uses of one."""

    def __init__(self, net: nf.FissionNetwork) -> None:
        super().__init__()
        self.stem, self.paths, self.branch_after = net.stem, net.paths, net.branch_after


def test_a_faster_network_may_take_its_place() -> None:
    net = build((2, 1))
    cascade = Cascade(net, [0.4, 0.6], order=[1, 2, 0])
    other = Cascade(Replacement(net).eval(), [0.4, 0.6], example_input=IMAGES, order=[1, 2, 0])
    assert torch.equal(other(IMAGES), cascade(IMAGES))


def test_train_mode_is_refused() -> None:
    net = copy.deepcopy(build((1,))).train()
    cascade = Cascade(net, [0.5], order=[0, 1])
    with pytest.raises(ValueError, match=r"^network must be in eval mode, .*, got train mode; call"):
        cascade(IMAGES)
    assert cascade.eval()(IMAGES).shape == (len(IMAGES), CLASSES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"thresholds": [0.5]},
            r"^thresholds must be 2 numbers in \[0, 1\], one for each exit but the last, got \[0\.5\]$",
        ),
        ({"thresholds": [0.5, 0.5, 0.5]}, r"^thresholds must be 2 numbers .*, got \[0\.5, 0\.5, 0\.5\]$"),
        ({"thresholds": [0.5, 1.5]}, r"^thresholds must be 2 numbers in \[0, 1\].*, got \[0\.5, 1\.5\]$"),
        ({"thresholds": [-0.1, 0.5]}, r"^thresholds must be 2 .*, got \[-0\.1, 0\.5\]$"),
        ({"thresholds": [math.nan, 0.5]}, r"^thresholds must be 2 .*, got \[nan, 0\.5\]$"),
        ({"thresholds": 0.5}, r"^thresholds must be 2 numbers .*, got 0\.5$"),
        ({"thresholds": ["0", "1"]}, r"^thresholds must be 2 numbers .*, got \['0', '1'\]$"),
        ({"order": [0, 1]}, r"^order must be every exit from 0 to 2 once, got \[0, 1\]$"),
        ({"order": [0, 1, 1]}, r"^order must be every .*, got \[0, 1, 1\]$"),
        ({"order": [1, 2, 3]}, r"^order must be every .*, got \[1, 2, 3\]$"),
        ({"order": None}, "^example_input must be images of shape .* unless order is given, got None$"),
        (
            {"rule": "confident"},
            "^rule must be one of margin, confidence, agreement, got 'confident'; did you mean confidence",
        ),
    ],
)
def test_arguments_that_are_not_what_it_takes(arguments, message) -> None:
    given_ = {"thresholds": [0.5, 0.5], "order": [0, 1, 2], "rule": "confidence"} | arguments
    with pytest.raises(ValueError, match=message) as caught:
        Cascade(build((1, 2)), **given_)
    assert "\n" not in str(caught.value)
    if given_["order"] is not None:
        with pytest.raises(ValueError, match=message):
            cascade_logits(torch.zeros(4, 3, 5), **given_)
    if arguments.keys() == {"order"} and arguments["order"]:
        with pytest.raises(ValueError, match=message):
            exit_costs(build((1, 2)), IMAGES, arguments["order"])


def test_networks_whose_exits_do_not_run_one_by_one_are_refused() -> None:
    for network in (nf.deploy(build((1,)), IMAGES), nn.Conv2d(3, 4, 1)):
        with pytest.raises(
            ValueError,
            match=r"^network must be a FissionNetwork, or the result of .*deploy_exits, got ",
        ):
            Cascade(network, [0.5], order=[0, 1])
        with pytest.raises(
            ValueError,
            match=r"^network must be a FissionNetwork, or the result of .*deploy_exits, got ",
        ):
            exit_costs(network, IMAGES)


@pytest.mark.parametrize("images", [IMAGES[:0], IMAGES.double(), IMAGES[:, :1]])
def test_costs_of_images_that_the_network_does_not_take(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^example_input"):
        exit_costs(build((1,)), images)


def alone(net: nf.FissionNetwork, number: int) -> nn.Sequential:
    """All that one exit runs."""
    path = net.paths[number]
    shared = net.paths[0].stages[: net.branch_after[number - 1]] if number else []
    return nn.Sequential(net.stem, *shared, *path.stages, path.head)


@pytest.mark.parametrize(("layout", "sparsity"), list(product([(1,), (1, 2), (2, 1), (1, 2, 2)], [0.0, 0.5])))
def test_costs_add_up_and_the_order_is_the_cheapest(layout, sparsity) -> None:
    net = build(layout, sparsity)
    costs = exit_costs(net, IMAGES)
    whole = count_macs(net, IMAGES[:1])
    assert (sum(costs.dense), sum(costs.effective)) == whole
    assert (whole.dense == whole.effective) == (sparsity == 0 and not layout)
    for number in range(net.exits):
        rest = [other for other in range(net.exits) if other != number]
        given_ = exit_costs(net, IMAGES, [number, *rest])
        assert given_.order == (number, *rest)
        assert (sum(given_.dense), sum(given_.effective)) == whole
        assert (given_.dense[0], given_.effective[0]) == count_macs(alone(net, number), IMAGES[:1])
    every = [exit_costs(net, IMAGES, order) for order in permutations(range(net.exits))]
    cheapest = min(mean_dense(each) for each in every)
    assert mean_dense(costs) == cheapest
    best = [each for each in every if mean_dense(each) == cheapest]
    steps = {each.order: list(zip(each.dense, each.effective, each.order, strict=True)) for each in best}
    assert steps[costs.order] == min(steps.values())  # of equal ones, the exit that adds least is next


def mean_dense(costs: ExitCosts) -> float:
    """The mean cost of an image if each exit is equally likely to be the last that runs."""
    return sum(accumulate(costs.dense)) / len(costs.dense)


def test_the_cheapest_order_looks_ahead_where_branches_are_unequal() -> None:
    model = create_model("wrn-10-1", CLASSES)
    net = nf.fission(model, 3, branch_after=[2, 1], ratio=[1, 4, 1], example_input=IMAGES)
    greedy = exit_costs(net, IMAGES, [2, 0, 1])  # exit 2 alone has the fewest effective MACs
    costs = exit_costs(net, IMAGES)
    assert costs.order == (0, 1, 2)
    assert costs.dense[0] == greedy.dense[0] and sum(costs.dense[:2]) < 0.9 * sum(greedy.dense[:2])


def test_the_cheapest_order_is_the_default() -> None:
    net = build((1, 2))
    assert exit_costs(net, IMAGES).order == (2, 0, 1)  # exit 2 has the most stages in common with exit 0
    assert Cascade(net, [0.5, 0.5], example_input=IMAGES).order == (2, 0, 1)
