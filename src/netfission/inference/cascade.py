"""Early exit: run exits one after another, cheapest first, until their ensemble is confident."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from netfission.ensemble import as_logits, check_weights
from netfission.network import ExitPath, FissionNetwork
from netfission.profiling.macs import Macs, count_macs
from netfission.surgery.features import Features, map_tensors
from netfission.surgery.plain import check_plain
from netfission.utils.errors import check_choice, invalid
from netfission.utils.inputs import Inputs, first_rows
from netfission.utils.modes import in_mode, input_errors

Rule = Literal["margin", "confidence", "agreement"]
RULES: tuple[Rule, ...] = ("margin", "confidence", "agreement")


class StoppingRule(Protocol):
    """How the outputs of exits make one, and how confident that is, if they are not logits of classes.

    Attributes:
        name: of the confidence, in one word.

    Example:
        >>> from netfission.tasks import find_task
        >>> rule: StoppingRule = find_task("multilabel", ["car", "tree"]).early_exit()
        >>> rule.combined(torch.tensor([[[4.0, 0.0], [0.0, 0.0]]])), rule.name
        (tensor([[2., 0.]]), 'certainty')
    """

    name: str

    def combined(self, outputs: Tensor, weights: Sequence[float] | None = None) -> Tensor:
        """Return the output of one exit that stands for the ensemble of several.

        Args:
            outputs: `(batch, exits, outputs, …)`, of those that ran.
            weights: of these exits; default equal ones.
        """

    def confidence(self, output: Tensor) -> Tensor:
        """Return how confident such an output is, `(batch,)` in (0, 1]."""


def describe_stops(rule: str, thresholds: Sequence[float], unit: str = "image") -> str:
    """Say in words when an image, or a part of one, stops, given a cascade's rule and thresholds.

    Example:
        >>> describe_stops("margin", [0.5, 0.25])
        'an image stops at margin above 0.5, 0.25'
        >>> describe_stops("margin", [0.0, 0.0])
        'every image stops at the first exit'
    """
    if thresholds[0] == 0:
        return f"every {unit} stops at the first exit"
    article = "an" if unit == "image" else "a"
    return (
        f"{article} {unit} stops at {rule} above {', '.join(f'{threshold:.4g}' for threshold in thresholds)}"
    )


class CascadeOutput(NamedTuple):
    """The answers of a cascade to a batch.

    Attributes:
        logits: `(batch, classes)`, float32 or wider: mean logits of the exits that each image ran.
        exits_used: `(batch,)`, int64: their number, from 1.

    Example:
        >>> output = cascade_logits(torch.zeros(2, 3, 5), [0.0, 0.0])
        >>> output.logits.shape, output.exits_used
        (torch.Size([2, 5]), tensor([1, 1]))
    """

    logits: Tensor
    exits_used: Tensor


@dataclass(frozen=True)
class ExitCosts:
    """What each exit adds to the cost of those that run before it, for one image.

    Attributes:
        order: the exits as they run.
        dense: multiply-accumulates that each adds, in that order, including those of removed weights.
        effective: those of weights that are not removed.

    Example:
        >>> costs = ExitCosts(order=(1, 0), dense=(600, 400), effective=(300, 200))
        >>> sum(costs.dense)  # of all exits
        1000
    """

    order: tuple[int, ...]
    dense: tuple[int, ...]
    effective: tuple[int, ...]


class Cascade(nn.Module):
    """A fissioned network that stops early for the images it is confident about; it shares all weights.

    Exits run in `order`. After each but the last, an image stops if its `cascade_confidence` is above
    that step's threshold, and the rest of the batch continues. Shared stages run once: the features of the
    images that continue are kept while a later exit needs them.

    The module is a classifier, images → logits `(batch, classes)`, and so a drop-in replacement for
    `network.ensemble()`; `run` also returns the number of exits used. It records no gradients.

    It uses nothing but the network's `stem`, `paths` (`stages` and `head` of exit 0, the whole of the others)
    and `branch_after`: any module with these can replace the network.

    Args:
        network: a `FissionNetwork`, in eval mode whenever the cascade is called.
        thresholds: one per exit but the last, in the order they run, each in [0, 1]. At 0 every
            image stops there, at 1 none does.
        order: every exit once, in the order to run them; default cheapest first, see `exit_costs`.
        example_input: images `(batch, channels, height, width)` to find that order with; unused if `order`
            is given.
        rule: how confidence is measured, see `cascade_confidence`; or a `StoppingRule`, such as
            `Task.early_exit` returns, if the outputs are not logits of one class per image.
        weights: of the exits in the mean of logits, exit 0 first; default the network's
            `exit_weights`, or else equal weights.

    Attributes:
        branch_depths: per exit, the number of stages that it runs in exit 0's path.
        kept_depths: per step, the depths of the features that later steps start from.
        shares: per step, the share of its exit in the mean logits of the exits so far.

    Raises:
        ValueError: an argument is invalid.

    Example:
        >>> import netfission as nf
        >>> from netfission.models import create_model
        >>> images = torch.randn(4, 3, 8, 8)
        >>> net = nf.fission(create_model("wrn-10-1", 10), 3, example_input=images).eval()
        >>> cascade = nf.Cascade(net, thresholds=[0.0, 0.5], example_input=images)
        >>> cascade(images).shape
        torch.Size([4, 10])
        >>> cascade.run(images).exits_used  # a threshold of 0 stops every image at the first exit
        tensor([1, 1, 1, 1])
    """

    def __init__(
        self,
        network: FissionNetwork,
        thresholds: Sequence[float],
        *,
        order: Sequence[int] | None = None,
        example_input: Inputs | None = None,
        rule: Rule | StoppingRule = "margin",
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check_network(network)
        if order is None:
            if example_input is None:
                raise invalid(
                    "example_input", "images of shape (batch, channels, height, width) unless order is given"
                )
            order = exit_costs(network, example_input).order
        exits = len(network.paths)
        check_thresholds(thresholds, exits)
        check_order(order, exits)
        if isinstance(rule, str):
            check_choice("rule", rule, RULES)
        self.network = network
        self.thresholds = tuple(thresholds)
        self.order = tuple(order)
        self.rule: Rule | StoppingRule = rule
        if weights is None:
            weights = getattr(network, "exit_weights", None)
        self.shares = _shares(self.order, weights)
        self.weights = None if weights is None else [weights[number] for number in self.order]
        self.training = network.training
        self.branch_depths = _branch_depths(network)
        self.kept_depths = [self._needed_after(step) for step in range(exits)]

    def forward(self, images: Inputs) -> Tensor:
        """Images `(batch, channels, height, width)` → logits `(batch, classes)`."""
        return self.run(images).logits

    @torch.no_grad()
    def run(self, images: Inputs) -> CascadeOutput:
        """Images `(batch, channels, height, width)` → logits, and how many exits each image used.

        Raises:
            ValueError: the network is in train mode.
        """
        if self.network.training:
            raise invalid(
                "network",
                "in eval mode, as batch norms would see only the images that continue",
                found="train mode",
                hint="call cascade.eval() first",
            )
        # depth: stages of exit 0 that were run → their features
        features: dict[int, Features] = {0: self.network.stem(images)}
        exit_logits: list[Tensor] = []  # of the images that continue, one entry per exit so far
        rows: Tensor | None = None  # their indices in the batch; None until some have stopped
        mean: Tensor | None = None
        for step in range(len(self.order)):
            exit_logits.append(self.run_exit(step, features))
            mean = self.ensemble(exit_logits, mean)
            continuing = self._continuing(step, exit_logits, mean)
            if 0 < len(continuing) == len(mean):
                continue
            if rows is None:
                logits = mean
                used = torch.full((len(mean),), step + 1, dtype=torch.int64, device=mean.device)
            else:
                logits = logits.index_copy(0, rows, mean)
                used = used.index_fill(0, rows, step + 1)
            if len(continuing) == 0:
                break
            rows = continuing if rows is None else rows[continuing]
            mean, exit_logits = mean[continuing], [logits_[continuing] for logits_ in exit_logits]
            features = {depth: _select(kept, continuing) for depth, kept in features.items()}
        return CascadeOutput(logits, used)

    def run_exit(self, step: int, features: dict[int, Features]) -> Tensor:
        """Run one exit, from the features that earlier steps kept.

        Args:
            step: index of the exit in the order.
            features: depth → features after as many stages of exit 0. Afterwards it holds those of
                `kept_depths[step]`.

        Returns:
            The exit's logits `(batch, classes)`, float32 or wider.
        """
        number, kept = self.order[step], self.kept_depths[step]
        trunk, branch = _path(self.network, 0), self.branch_depths[number]
        for depth in range(max(features), branch):
            features[depth + 1] = trunk.stages[depth](features[depth])
            if depth not in kept:
                del features[depth]
        start = features[branch] if branch in kept else features.pop(branch)
        return _widened(_after_branch(self.network, number)(start))

    def ensemble(self, exit_logits: Sequence[Tensor], before: Tensor | None = None) -> Tensor:
        """Return the output of the ensemble of the exits so far.

        Args:
            exit_logits: their outputs, `(batch, outputs, …)` each.
            before: what this returned for all of them but the last; default not known.
        """
        if not isinstance(self.rule, str):
            ran = len(exit_logits)
            weights = None if self.weights is None else self.weights[:ran]
            return self.rule.combined(torch.stack(list(exit_logits), dim=1), weights)
        return _running_mean(exit_logits[-1], before, self.shares[len(exit_logits) - 1])

    def confidence(self, exit_logits: Sequence[Tensor], mean: Tensor) -> Tensor:
        """Return how confident the ensemble of the exits so far is, `(batch,)`.

        Args:
            exit_logits: their outputs, `(batch, outputs, …)` each.
            mean: the output of their ensemble, see `ensemble`.
        """
        if isinstance(self.rule, str):
            return cascade_confidence(exit_logits, mean, len(self.order), self.rule)
        return self.rule.confidence(mean)

    def _continuing(self, step: int, exit_logits: Sequence[Tensor], mean: Tensor) -> Tensor:
        """Return the rows of the images that continue after a step; none after the last."""
        if step == len(self.thresholds):
            return torch.empty(0, dtype=torch.int64, device=mean.device)
        below = self.confidence(exit_logits, mean) <= self.thresholds[step]
        return below.nonzero().flatten()  # the only synchronisation with the device in a step

    def _needed_after(self, step: int) -> set[int]:
        """Return the depths of the features that later exits start from."""
        reached = max(self.branch_depths[number] for number in self.order[: step + 1])
        return {min(self.branch_depths[number], reached) for number in self.order[step + 1 :]}


def cascade_confidence(exit_logits: Sequence[Tensor], mean: Tensor, exits: int, rule: Rule) -> Tensor:
    """Measure how confident the ensemble of the exits so far is of its class, per example.

    - `"margin"`: the largest probability of the softmax of the mean logits less the second largest. If the
      two are close, the remaining exits can change the class.
    - `"confidence"`: the largest probability itself.
    - `"agreement"`: the share of *all* the network's exits that have voted for the ensemble's class so far.
      After one exit it is at most `1 / exits`, so a threshold from there on requires two exits that agree.
      Above a half, the remaining exits cannot outvote them.

    Args:
        exit_logits: logits of each exit so far, `(batch, classes)` each.
        mean: their mean, `(batch, classes)`.
        exits: number of exits of the network.
        rule: `"margin"`, `"confidence"` or `"agreement"`.

    Returns:
        `(batch,)` in (0, 1], of the dtype of `mean`.

    Example:
        >>> logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
        >>> [round(cascade_confidence([logits], logits, 3, rule).item(), 2) for rule in RULES]
        [0.5, 0.7, 0.33]
    """
    if rule == "margin":
        best, second = mean.softmax(dim=1).topk(2, dim=1).values.unbind(dim=1)
        return (best - second).clamp(min=torch.finfo(mean.dtype).tiny)  # ties are above 0, too
    if rule == "confidence":
        return mean.softmax(dim=1).amax(dim=1)
    votes = torch.stack(list(exit_logits)).argmax(dim=2) == mean.argmax(dim=1)
    return votes.sum(dim=0).to(mean.dtype) / exits


def cascade_logits(
    logits: Tensor,
    thresholds: Sequence[float],
    *,
    order: Sequence[int] | None = None,
    rule: Rule = "margin",
    weights: Sequence[float] | None = None,
) -> CascadeOutput:
    """Compute the output of a `Cascade` from the logits of all exits.

    Args:
        logits: `(batch, exits, classes)`, floating point, exit 0 first.
        thresholds: see `Cascade`.
        order: see `Cascade`; default exit 0 first, then by number.
        rule: see `cascade_confidence`.
        weights: of the exits in the mean, exit 0 first; default equal weights.

    Returns:
        Mean logits of the exits that each example would run, and their number.

    Raises:
        ValueError: an argument is invalid.

    Example:
        >>> logits = torch.tensor([[[9.0, 0.0], [7.0, 0.0]], [[1.0, 0.0], [0.0, 4.0]]])
        >>> cascade_logits(logits, [0.9])  # the first image stops after exit 0, with a margin of 0.9998
        CascadeOutput(logits=tensor([[9.0000, 0.0000],
                [0.5000, 2.0000]]), exits_used=tensor([1, 2]))
    """
    check_thresholds(thresholds, logits.shape[1])
    means, scores = step_by_step(logits, order, rule, weights)
    continues = scores <= scores.new_tensor(thresholds)
    last = continues.int().cumprod(dim=1).sum(dim=1)
    return CascadeOutput(means[torch.arange(len(means), device=means.device), last], last + 1)


def step_by_step(
    logits: Tensor, order: Sequence[int] | None, rule: Rule, weights: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Compute mean logits and confidence after each step of a cascade that never stops.

    Args:
        logits: `(batch, exits, classes)`, floating point, exit 0 first.
        order: every exit once; default exit 0 first, then by number.
        rule: see `cascade_confidence`.
        weights: of the exits in the mean, exit 0 first; default equal weights.

    Returns:
        Mean logits after each step, `(batch, exits, classes)`, and confidence after each step but the last,
        `(batch, exits - 1)`; float32 or wider.

    Raises:
        ValueError: an argument is invalid.

    Example:
        >>> means, scores = step_by_step(torch.zeros(2, 3, 5), None, "confidence")
        >>> means.shape, scores.shape
        (torch.Size([2, 3, 5]), torch.Size([2, 2]))
    """
    logits = as_logits(logits)
    exits = logits.shape[1]
    order = range(exits) if order is None else order
    check_order(order, exits)
    check_choice("rule", rule, RULES)
    shares = _shares(order, weights)
    exit_logits: list[Tensor] = []
    means: list[Tensor] = []
    scores: list[Tensor] = []
    for step, number in enumerate(order):
        exit_logits.append(logits[:, number])
        means.append(_running_mean(exit_logits[-1], means[-1] if means else None, shares[step]))
        scores.append(cascade_confidence(exit_logits, means[-1], exits, rule))
    return torch.stack(means, dim=1), torch.stack(scores, dim=1)[:, :-1]


def exit_costs(
    network: FissionNetwork, example_input: Inputs, order: Sequence[int] | None = None
) -> ExitCosts:
    """Count what each exit adds to the cost of those before it, and find the cheapest order.

    Stages that an earlier exit ran are not run again and cost nothing. The default order costs the fewest
    dense MACs on average, if each exit is equally likely to be the last that runs. Of equal orders, it
    continues with the exit that adds the fewest dense MACs, then effective MACs, then the lower number.

    Args:
        network: as for `Cascade`, in any mode.
        example_input: images `(batch, channels, height, width)`; one of them is used.
        order: every exit once; default the cheapest.

    Returns:
        The order, and the multiply-accumulates that each exit adds.

    Raises:
        ValueError: an argument is invalid.

    Example:
        >>> import netfission as nf
        >>> from netfission.models import create_model
        >>> images = torch.randn(1, 3, 8, 8)
        >>> net = nf.fission(create_model("wrn-10-1", 10), 3, example_input=images)
        >>> nf.exit_costs(net, images).order  # exit 2 shares the most stages with exit 0
        (2, 0, 1)
    """
    _check_network(network)
    trunk, rests = _count_parts(network, first_rows(example_input, 1))
    depths = _branch_depths(network)
    if order is not None:
        check_order(order, len(depths))
    order = _cheapest_order(trunk, rests, depths) if order is None else order
    added = []
    reached = -1  # not even the stem
    for number in order:
        added.append(_sum([*trunk[reached + 1 : depths[number] + 1], rests[number]]))
        reached = max(reached, depths[number])
    dense, effective = zip(*added, strict=True)
    return ExitCosts(tuple(order), dense, effective)


def _cheapest_order(trunk: Sequence[Macs], rests: Sequence[Macs], depths: Sequence[int]) -> tuple[int, ...]:
    """Return the order of exits with the smallest sum, over its beginnings, of what a beginning costs.

    What exits cost together does not depend on their order. Of those with the same depth, the cheaper runs
    first. So a search over how many exits of each depth have run finds the best order.

    Args:
        trunk: cost of the stem and of each stage of exit 0.
        rests: cost of what each exit runs after its branch.
        depths: number of stages of exit 0 that each exit runs.
    """
    by_depth = {
        depth: sorted((rests[number], number) for number in range(len(depths)) if depths[number] == depth)
        for depth in sorted(set(depths))
    }

    @cache
    def remaining(ran: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """Return the sum from here on if `ran` exits of each depth have run, and the order of the others."""
        reached = max((depth for depth, count in zip(by_depth, ran, strict=True) if count), default=-1)
        options = []
        for index, (depth, exits) in enumerate(by_depth.items()):
            if ran[index] < len(exits):
                rest, number = exits[ran[index]]
                adds = _sum([*trunk[reached + 1 : depth + 1], rest])
                after = (*ran[:index], ran[index] + 1, *ran[index + 1 :])
                total, order = remaining(after)
                # Every later beginning contains this exit as well.
                options.append((total + adds.dense * (len(depths) - sum(ran)), adds, number, order))
        if not options:
            return 0, ()
        total, _, number, order = min(options)
        return total, (number, *order)

    return remaining((0,) * len(by_depth))[1]


@torch.no_grad()
def _count_parts(network: FissionNetwork, image: Tensor) -> tuple[list[Macs], list[Macs]]:
    """Count the MACs of the stem and each stage of exit 0, and of what each exit runs after its branch."""
    trunk = []
    features: list[Features] = [image]
    with in_mode(network, training=False), input_errors("example_input", image):
        for part in (network.stem, *_path(network, 0).stages):
            trunk.append(count_macs(part, features[-1]))
            features.append(part(features[-1]))
        rests = [
            count_macs(_after_branch(network, number), features[1 + depth])
            for number, depth in enumerate(_branch_depths(network))
        ]
    return trunk, rests


def _sum(parts: Sequence[Macs]) -> Macs:
    return Macs(sum(part.dense for part in parts), sum(part.effective for part in parts))


def _path(network: FissionNetwork, number: int) -> ExitPath:
    return network.paths[number]  # type: ignore[return-value]  # ModuleList forgets the type of its items


def _after_branch(network: FissionNetwork, number: int) -> nn.Module:
    """Return what an exit runs by itself, after the stages of exit 0."""
    path = _path(network, number)
    return path if number else path.head


def _branch_depths(network: FissionNetwork) -> tuple[int, ...]:
    """Return the number of stages of exit 0 that each exit runs."""
    return len(_path(network, 0).stages), *network.branch_after


def _shares(order: Sequence[int], weights: Sequence[float] | None) -> tuple[float, ...]:
    """Return, per step, the share of its exit in the mean of the exits so far."""
    exits = len(order)
    weights = (1.0,) * exits if weights is None else weights
    check_weights("weights", weights, exits)
    if min(weights) == 0:  # the first exits alone would have no mean
        raise invalid("weights", "above 0 for each exit of a cascade", weights)
    in_order = [weights[number] for number in order]
    return tuple(weight / total for weight, total in zip(in_order, accumulate(in_order), strict=True))


def _running_mean(last: Tensor, before: Tensor | None, share: float) -> Tensor:
    """Update the mean logits with those of the last exit."""
    return last if before is None else before.lerp(last, share)


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _select(features: Features, rows: Tensor) -> Features:
    # On a CPU index_select is twice as fast, but it loses a channels-last layout.
    def of_tensor(tensor: Tensor) -> Tensor:
        return tensor.index_select(0, rows) if tensor.is_contiguous() else tensor[rows]

    return map_tensors(of_tensor, features)


def _check_network(network: nn.Module) -> None:
    if not all(hasattr(network, name) for name in ("stem", "paths", "branch_after")):
        check_plain("network", network)  # names the network within a wrapper
        raise invalid(
            "network",
            "a FissionNetwork, or the result of netfission.inference.deploy_exits",
            found=f"{type(network).__name__}, whose exits cannot run one by one",
        )


def check_thresholds(thresholds: Sequence[float], exits: int) -> None:
    """Raise a `ValueError` unless there is one number in [0, 1] for each exit but the last."""
    try:
        valid = len(thresholds) == exits - 1 and all(0 <= threshold <= 1 for threshold in thresholds)
    except TypeError:  # one number, or no numbers
        valid = False
    if not valid:
        raise invalid(
            "thresholds", f"{exits - 1} numbers in [0, 1], one for each exit but the last", thresholds
        )


def check_order(order: Sequence[int], exits: int) -> None:
    """Raise a `ValueError` unless `order` holds every exit once."""
    if sorted(order) != list(range(exits)):
        raise invalid("order", f"every exit from 0 to {exits - 1} once", list(order))
