"""Exits run one after another, cheapest first, until the ensemble of those so far is sure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from netfission.ensemble import as_logits
from netfission.profiling.macs import Macs, count_macs
from netfission.utils.errors import check_choice
from netfission.utils.modes import in_mode, input_errors

if TYPE_CHECKING:  # the network imports this package
    from netfission.network import ExitPath, FissionNetwork

Rule = Literal["margin", "confidence", "agreement"]
RULES: tuple[Rule, ...] = ("margin", "confidence", "agreement")


class CascadeOutput(NamedTuple):
    """What a cascade gives for a batch.

    Attributes:
        logits: `(batch, classes)`, float32 or wider: mean logits of the exits that each image ran.
        exits_used: `(batch,)`, int64: how many those were, from 1.
    """

    logits: Tensor
    exits_used: Tensor


@dataclass(frozen=True)
class ExitCosts:
    """What each exit adds to the cost of those that run before it, for one image.

    Attributes:
        order: the exits as they run.
        dense: multiply-accumulates that each adds, in that order, removed weights included.
        effective: those of them that meet a weight that is not removed.
    """

    order: tuple[int, ...]
    dense: tuple[int, ...]
    effective: tuple[int, ...]


class Cascade(nn.Module):
    """A fissioned network that stops early for the images it is sure of; it shares all weights.

    Exits run in `order`. After each but the last, an image stops if its `cascade_confidence` is above
    that step's threshold, and the rest of the batch goes on. Shared stages run once: their features are kept,
    of the images that go on, while a later exit needs them.

    The module is a classifier, images → logits `(batch, classes)`, and as such a drop-in for
    `network.ensemble()`; `run` tells the exits used as well. It records no gradients.

    It uses the network's `stem`, `paths` (of exit 0 the `stages` and `head`, of the others the whole) and
    `branch_after`, and nothing else: any module that has these may take the network's place.

    Args:
        network: a `FissionNetwork`, in eval mode whenever the cascade is called.
        thresholds: one for each exit but the last, in the order they run, each in [0, 1]. At 0 every
            image stops there, at 1 none does.
        order: every exit once, in the order to run them; default cheapest first, see `exit_costs`.
        example_input: images `(batch, channels, height, width)` to find that order with; unused where
            `order` is given.
        rule: what confidence is, see `cascade_confidence`.

    Raises:
        ValueError: an argument is not what it takes.
    """

    def __init__(
        self,
        network: FissionNetwork,
        thresholds: Sequence[float],
        *,
        order: Sequence[int] | None = None,
        example_input: Tensor | None = None,
        rule: Rule = "margin",
    ) -> None:
        super().__init__()
        _check_network(network)
        if order is None:
            if example_input is None:
                raise ValueError(
                    "example_input=None: takes a batch of images, float (batch, channels, height, width), "
                    "to find the cheapest order of exits with; or pass order"
                )
            order = exit_costs(network, example_input).order
        exits = len(network.paths)
        check_thresholds(thresholds, exits)
        check_order(order, exits)
        check_choice("rule", rule, RULES)
        self.network = network
        self.thresholds = tuple(thresholds)
        self.order = tuple(order)
        self.rule: Rule = rule
        self.training = network.training
        self._leaves = _leaves(network)
        self._kept = [self._needed_after(step) for step in range(exits)]

    def forward(self, images: Tensor) -> Tensor:
        """Images `(batch, channels, height, width)` → logits `(batch, classes)`."""
        return self.run(images).logits

    @torch.no_grad()
    def run(self, images: Tensor) -> CascadeOutput:
        """Images `(batch, channels, height, width)` → logits, and how many exits each image used.

        Raises:
            ValueError: the network is in train mode.
        """
        if self.network.training:
            raise ValueError(
                "network.training=True: takes a network in eval mode, as batch norms would see only the "
                "images that go on; call cascade.eval() first"
            )
        features = {0: self.network.stem(images)}  # stages of exit 0 that were run → what they gave
        so_far: list[Tensor] = []  # logits of the images that go on, an entry an exit
        rows: Tensor | None = None  # their places in the batch, where some have stopped
        mean: Tensor | None = None
        for step in range(len(self.order)):
            so_far.append(self._run_exit(step, features))
            mean = _mean(so_far[-1], mean, step)
            going = self._going_on(step, so_far, mean)
            if 0 < len(going) == len(mean):
                continue
            if rows is None:
                logits, used = mean, torch.full_like(mean[:, 0], step + 1, dtype=torch.int64)
            else:
                logits = logits.index_copy(0, rows, mean)
                used = used.index_fill(0, rows, step + 1)
            if len(going) == 0:
                break
            rows = going if rows is None else rows[going]
            mean, so_far = mean[going], [of_exit[going] for of_exit in so_far]
            features = {depth: _select(kept, going) for depth, kept in features.items()}
        return CascadeOutput(logits, used)

    def _going_on(self, step: int, so_far: Sequence[Tensor], mean: Tensor) -> Tensor:
        """Which images go on after a step, none after the last."""
        if step == len(self.thresholds):
            return torch.empty(0, dtype=torch.int64, device=mean.device)
        unsure = cascade_confidence(so_far, mean, len(self.order), self.rule) <= self.thresholds[step]
        return unsure.nonzero().flatten()  # the one wait for the device in a step

    def _run_exit(self, step: int, features: dict[int, Tensor]) -> Tensor:
        """Logits of a step's exit; `features` is left with what later exits start from."""
        number, kept = self.order[step], self._kept[step]
        trunk, leave = _path(self.network, 0), self._leaves[number]
        for depth in range(max(features), leave):
            features[depth + 1] = trunk.stages[depth](features[depth])
            if depth not in kept:
                del features[depth]
        own = features[leave] if leave in kept else features.pop(leave)
        return _widened(_rest(self.network, number)(own))

    def _needed_after(self, step: int) -> set[int]:
        """How deep into exit 0's stages the features are that later exits start from."""
        reached = max(self._leaves[k] for k in self.order[: step + 1])
        return {min(self._leaves[k], reached) for k in self.order[step + 1 :]}


def cascade_confidence(so_far: Sequence[Tensor], mean: Tensor, exits: int, rule: Rule) -> Tensor:
    """How sure the ensemble of the exits so far is of its class, per example.

    With `"margin"` the largest probability of the softmax of their mean logits less the second largest: the
    exits to come change the class where the two are close, however likely they are. With `"confidence"` the
    largest probability itself. With `"agreement"` the share of *all* the network's exits that have voted for
    the ensemble's class by now: it is at most `1 / exits` after one exit, so that a threshold from there on
    asks for two exits that agree; above a half, the exits to come cannot outvote them.

    Args:
        so_far: logits of each exit so far, `(batch, classes)` each.
        mean: their mean, `(batch, classes)`.
        exits: number of exits of the network.
        rule: `"margin"`, `"confidence"` or `"agreement"`.

    Returns:
        `(batch,)` in (0, 1], of the dtype of `mean`.
    """
    if rule == "margin":
        best, *others = mean.softmax(dim=1).topk(min(2, mean.shape[1]), dim=1).values.unbind(dim=1)
        return (best - sum(others)).clamp(min=torch.finfo(mean.dtype).tiny)  # equals are above 0, too
    if rule == "confidence":
        return mean.softmax(dim=1).amax(dim=1)
    votes = torch.stack(list(so_far)).argmax(dim=2) == mean.argmax(dim=1)
    return votes.sum(dim=0).to(mean.dtype) / exits


def cascade_logits(
    logits: Tensor,
    thresholds: Sequence[float],
    *,
    order: Sequence[int] | None = None,
    rule: Rule = "margin",
) -> CascadeOutput:
    """What a `Cascade` gives, from the logits of all exits.

    Args:
        logits: `(batch, exits, classes)`, floating point, exit 0 first.
        thresholds: see `Cascade`.
        order: see `Cascade`; default as numbered.
        rule: see `cascade_confidence`.

    Returns:
        Mean logits of the exits that each example would run, and their number.

    Raises:
        ValueError: an argument is not what it takes.
    """
    check_thresholds(thresholds, logits.shape[1])
    means, scores = step_by_step(logits, order, rule)
    goes_on = scores <= scores.new_tensor(thresholds)
    last = goes_on.int().cumprod(dim=1).sum(dim=1)
    return CascadeOutput(means[torch.arange(len(means), device=means.device), last], last + 1)


def step_by_step(logits: Tensor, order: Sequence[int] | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """The running ensemble's mean logits and confidence, as a cascade that never stops would see them.

    Args:
        logits: `(batch, exits, classes)`, floating point, exit 0 first.
        order: every exit once; default as numbered.
        rule: see `cascade_confidence`.

    Returns:
        Mean logits after each step, `(batch, exits, classes)`, and confidence after each step but the last,
        `(batch, exits - 1)`; float32 or wider.

    Raises:
        ValueError: an argument is not what it takes.
    """
    logits = as_logits(logits)
    exits = logits.shape[1]
    order = range(exits) if order is None else order
    check_order(order, exits)
    check_choice("rule", rule, RULES)
    so_far: list[Tensor] = []
    means: list[Tensor] = []
    scores: list[Tensor] = []
    for step, number in enumerate(order):
        so_far.append(logits[:, number])
        means.append(_mean(so_far[-1], means[-1] if means else None, step))
        scores.append(cascade_confidence(so_far, means[-1], exits, rule))
    return torch.stack(means, dim=1), torch.stack(scores, dim=1)[:, :-1]


def exit_costs(
    network: FissionNetwork, example_input: Tensor, order: Sequence[int] | None = None
) -> ExitCosts:
    """Count what each exit adds to the cost of those before it, and find the cheapest order.

    Stages that an earlier exit ran are not run again and cost nothing. The default order takes next the
    exit that adds the fewest dense MACs, of equals the fewest effective ones, then the lower number.

    Args:
        network: as `Cascade` takes it, in any mode.
        example_input: images `(batch, channels, height, width)`; one of them is used.
        order: every exit once; default cheapest first.

    Raises:
        ValueError: an argument is not what it takes.
    """
    _check_network(network)
    trunk, rests = _count_parts(network, example_input[:1])
    leaves = _leaves(network)
    if order is not None:
        check_order(order, len(leaves))
    done: list[int] = []
    added: list[Macs] = []
    reached = -1  # not even the stem
    while len(done) < len(leaves):
        adds = {
            number: _sum([*trunk[reached + 1 : leave + 1], rests[number]])
            for number, leave in enumerate(leaves)
            if number not in done
        }
        number = min(adds, key=adds.__getitem__) if order is None else order[len(done)]
        done.append(number)
        added.append(adds[number])
        reached = max(reached, leaves[number])
    dense, effective = zip(*added, strict=True)
    return ExitCosts(tuple(done), dense, effective)


@torch.no_grad()
def _count_parts(network: FissionNetwork, image: Tensor) -> tuple[list[Macs], list[Macs]]:
    """MACs of the stem and of each stage of exit 0, and of what each exit runs behind those by itself."""
    trunk = []
    features = [image]
    with in_mode(network, training=False), input_errors("example_input", image):
        for part in (network.stem, *_path(network, 0).stages):
            trunk.append(count_macs(part, features[-1]))
            features.append(part(features[-1]))
        rests = [
            count_macs(_rest(network, number), features[1 + leave])
            for number, leave in enumerate(_leaves(network))
        ]
    return trunk, rests


def _sum(parts: Sequence[Macs]) -> Macs:
    return Macs(sum(part.dense for part in parts), sum(part.effective for part in parts))


def _path(network: FissionNetwork, number: int) -> ExitPath:
    return network.paths[number]  # type: ignore[return-value]  # ModuleList forgets what it lists


def _rest(network: FissionNetwork, number: int) -> nn.Module:
    """What an exit runs by itself, behind the stages of exit 0."""
    path = _path(network, number)
    return path if number else path.head


def _leaves(network: FissionNetwork) -> tuple[int, ...]:
    """How many stages of exit 0 each exit runs."""
    return len(_path(network, 0).stages), *network.branch_after


def _mean(last: Tensor, before: Tensor | None, step: int) -> Tensor:
    """Mean logits of the exits so far, from the last one's and the mean of those before it."""
    return last if before is None else before.lerp(last, 1 / (step + 1))


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _select(features: Tensor, rows: Tensor) -> Tensor:
    # On a CPU index_select is twice as fast, but it loses a channels-last layout.
    return features.index_select(0, rows) if features.is_contiguous() else features[rows]


def _check_network(network: nn.Module) -> None:
    if not all(hasattr(network, name) for name in ("stem", "paths", "branch_after")):
        raise ValueError(
            "network: takes a FissionNetwork, or what netfission.inference.deploy.deploy_exits makes of one; "
            f"a {type(network).__name__} has no exits that run one by one"
        )


def check_thresholds(thresholds: Sequence[float], exits: int) -> None:
    """ValueError unless there is one in [0, 1] for each exit but the last."""
    try:
        fits = len(thresholds) == exits - 1 and all(0 <= threshold <= 1 for threshold in thresholds)
    except TypeError:  # one number, or no numbers
        fits = False
    if not fits:
        raise ValueError(
            f"thresholds={thresholds!r}: takes {exits - 1} numbers in [0, 1], one for each exit but the last"
        )


def check_order(order: Sequence[int], exits: int) -> None:
    """ValueError unless it holds every exit once."""
    if sorted(order) != list(range(exits)):
        raise ValueError(f"order={list(order)}: takes every exit from 0 to {exits - 1} once")
