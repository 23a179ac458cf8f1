"""Fast inference: batch norms folded, masks burnt in, and the paths of a stage run together."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, fx, nn

from netfission.inference.deploy.folding import folded
from netfission.inference.deploy.fusing import fuse
from netfission.inference.deploy.joining import Builder, Features
from netfission.profiling.timing import inference_times
from netfission.surgery.masks import discard_masks
from netfission.utils.modes import input_errors

if TYPE_CHECKING:  # the network imports this package
    from netfission.network import FissionNetwork

# Largest difference of logits, in units of the largest logit or of 1, whichever is larger.
TOLERANCE = 1e-4


class Deployed(nn.Module):
    """A module for inference alone: always in eval mode, its parameters without gradients."""

    def __init__(self, layers: fx.GraphModule) -> None:
        super().__init__()
        self.layers = layers
        self.eval().requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """What the module it was made from gives in eval mode."""
        result: Tensor = self.layers(features)
        return result

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode.

        Raises:
            ValueError: `mode` is True.
        """
        if mode:
            raise ValueError(
                "mode=True: takes False, a deployed network is for inference alone; "
                "train the network it was made from"
            )
        return super().train(False)


@torch.inference_mode(False)
@torch.no_grad()
def deploy(network: "FissionNetwork", example_input: Tensor, *, joined: bool | None = None) -> Deployed:
    """Make a fissioned network fast to run.

    Batch norms are folded into the convolutions before them, masks are burnt in, features lie in memory
    channels last, and convolutions do the addition and activation after them as well (see `FusedConv2d`).
    The paths of a stage run as one where their layers have equal shapes and work channel by channel, as in
    ResNets (see `joining`).

    Args:
        network: in train or eval mode; not changed.
        example_input: images `(batch, channels, height, width)` on the network's device, to find shapes and
            check the result with. Any other batch size may follow.
        joined: whether the paths of a stage run as one where they can, or one after another. Joined mostly
            wins at batch 1. Default whichever is faster on `example_input`, measured.

    Returns:
        Images → logits `(batch, exits, classes)` as the network gives in eval mode, up to rounding. It can
        be copied, pickled, moved, compiled and exported, and has a state dict of its own. On a CPU it holds
        the weights of convolutions once more in each layout that oneDNN wants for the shapes that come.

    Raises:
        ValueError: the network does not take `example_input`, or its logits on it cannot be repeated
            within 1e-4 of the largest.
    """
    network, expected = _copied(network, example_input)
    steps = [own for _, own in network.parts]
    parts = [
        {exit_: folded(part, features[exit_]) for exit_, part in own.items()}
        for own, features in zip(steps, _reads(steps, example_input), strict=True)
    ]
    choices = {}
    for choice in (True, False) if joined is None else (joined,):
        choices[f"{choice}"] = _assembled(parts, example_input, choice)
        _check(choices[f"{choice}"](example_input), expected)
    times = inference_times(choices, example_input, rounds=5 if joined is None else 0, warm_up=1)
    return choices[min(choices, key=lambda choice: min(times[choice], default=0))]


@torch.inference_mode(False)
@torch.no_grad()
def deploy_exits(network: "FissionNetwork", example_input: Tensor) -> "FissionNetwork":
    """Make a fissioned network fast to run exit by exit, as a cascade does.

    As `deploy`, but each stage of each path stays a module of its own.

    Args:
        network: in train or eval mode; not changed.
        example_input: as for `deploy`.

    Returns:
        A `FissionNetwork` for inference alone, in eval mode, of the same form.

    Raises:
        ValueError: as `deploy`.
    """
    network, expected = _copied(network, example_input)
    steps = [own for _, own in network.parts]
    stem, *stages, heads = [
        {exit_: _alone(part, features[exit_]) for exit_, part in own.items()}
        for own, features in zip(steps, _reads(steps, example_input), strict=True)
    ]
    network.stem = stem[0]
    for exit_, path in enumerate(_paths(network)):
        path.stages = nn.ModuleList(own[exit_] for own in stages if exit_ in own)
        path.head = heads[exit_]
    _check(network.eval()(example_input), expected)
    return network


def _paths(network: "FissionNetwork") -> list[Any]:
    return list(network.paths)


def _copied(network: "FissionNetwork", example_input: Tensor) -> tuple["FissionNetwork", Tensor]:
    """A copy in eval mode with its masks burnt in, and its logits."""
    network = copy.deepcopy(network).eval()
    with input_errors("example_input", example_input):
        logits: Tensor = network(example_input)
    discard_masks(network)
    return network, logits


def _reads(steps: Sequence[Mapping[int, nn.Module]], images: Tensor) -> list[dict[int, Tensor]]:
    """What each part of each step reads."""
    reads = []
    made = {0: images}
    for own in steps:
        reads.append({exit_: made.get(exit_, made[0]) for exit_ in own})
        made = {exit_: part(reads[-1][exit_]) for exit_, part in own.items()}
    return reads


def _assembled(parts: Sequence[Mapping[int, fx.GraphModule]], images: Tensor, joined: bool) -> Deployed:
    builder = Builder(joined=joined)
    features = Features((_channels_last(builder, images),))
    running = [0]
    for number, own in enumerate(parts):
        if 1 < len(running) < len(own):  # those that join in read what exit 0 does
            nodes = dict(zip(running, builder.each(features, len(running)), strict=True))
            features = Features(tuple(nodes.get(exit_, nodes[0]) for exit_ in own))
        name = "stem" if number == 0 else "head" if number == len(parts) - 1 else f"stages.{number - 1}"
        features = builder.run(name, list(own.values()), features)
        running = list(own)
    if features.joined:
        logits = builder.graph.call_method("unflatten", (features.nodes[0], 1, (len(running), -1)))
    else:
        logits = builder.graph.call_function(torch.stack, (list(features.nodes), 1))
    return _finished(builder, logits, images)


def _alone(part: nn.Module, features: Tensor) -> Deployed:
    builder = Builder(joined=False)
    source = Features((_channels_last(builder, features),))
    (result,) = builder.run("part", [folded(part, features)], source).nodes
    return _finished(builder, result, features)


def _channels_last(builder: Builder, features: Tensor) -> fx.Node:
    source = builder.graph.placeholder("features")
    if features.ndim != 4:
        return source
    return builder.graph.call_method("contiguous", (source,), {"memory_format": torch.channels_last})


def _finished(builder: Builder, result: fx.Node, features: Tensor) -> Deployed:
    layers = builder.finish(result)
    fuse(layers, features)
    return Deployed(layers)


def _check(logits: Tensor, expected: Tensor) -> None:
    difference = (logits - expected).abs().max().item()
    largest = max(1.0, expected.abs().max().item())
    if not difference <= max(TOLERANCE, 8 * torch.finfo(expected.dtype).eps) * largest:
        raise ValueError(
            f"network: its logits on example_input differ by {difference:.2g} once deployed, of at most "
            f"{largest:.2g}; takes a network that gives the same finite logits again in eval mode"
        )
