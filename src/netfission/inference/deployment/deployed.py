"""Convert a fissioned network into modules for fast inference."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from netfission.inference.deployment.folding import folded
from netfission.inference.deployment.fusing import fuse
from netfission.inference.deployment.joining import GraphBuilder, PathFeatures, PathNodes
from netfission.network import FissionNetwork, check_network
from netfission.profiling.timing import inference_times
from netfission.surgery.features import Features
from netfission.surgery.masks import discard_masks
from netfission.utils.errors import invalid
from netfission.utils.inputs import Inputs
from netfission.utils.modes import input_errors

TOLERANCE = 1e-4  # largest difference of logits, over their largest spread among classes
_ROUNDINGS = 8  # that a logit may differ by as well, each the resolution of the largest logit
_TF32_RESOLUTION = 2**-10  # of float32 on a GPU whose convolutions run in TF32


class Deployed(nn.Module):
    """A module for inference only: always in eval mode, its parameters without gradients; see `deploy`.

    Example:
        >>> layer = Deployed(fx.symbolic_trace(nn.Linear(3, 2)))
        >>> layer.training, layer(torch.zeros(1, 3)).requires_grad
        (False, False)
    """

    def __init__(self, layers: fx.GraphModule) -> None:
        super().__init__()
        self.layers = layers
        self.eval().requires_grad_(False)

    def forward(self, features: Features) -> Features:
        """Compute the output of the original module in eval mode."""
        result: Features = self.layers(features)
        return result

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode.

        Raises:
            ValueError: `mode` is True.
        """
        if mode:
            raise invalid(
                "mode",
                "False, as a deployed network is for inference only",
                mode,
                hint="train the network that it was made from",
            )
        return super().train(False)


@torch.inference_mode(False)
@torch.no_grad()
def deploy(network: FissionNetwork, example_input: Inputs, *, joined: bool | None = None) -> Deployed:
    """Convert a fissioned network into a module for fast inference.

    Batch norms are folded into the convolutions before them, and masks are applied to the weights. Features
    are stored channels last. Convolutions include the addition and activation after them, see `FusedConv2d`.
    The paths of a stage run as one if their layers have equal shapes and work channel by channel, as in
    ResNets; see `netfission.inference.deployment.joining`.

    Args:
        network: in train or eval mode; not changed.
        example_input: images `(batch, channels, height, width)` on the network's device, or what else it
            reads, to find shapes and check the result with. Other batch sizes work, too.
        joined: True to run the paths of a stage as one if possible, False to run them one after another.
            Joined is mostly faster at batch size 1. Default whichever is faster on `example_input`, measured.

    Returns:
        Images → logits `(batch, exits, classes)`, equal to the network's in eval mode up to rounding. It can
        be copied, pickled, moved, compiled and exported, and has its own state dict. On a CPU it also stores
        the weights of convolutions in each layout that oneDNN requires for the shapes of its input.

    Raises:
        ValueError: the network is not a plain `FissionNetwork`, it raises an error on `example_input`, or
            its logits on it cannot be reproduced within 1e-4 of their spread over the classes, plus rounding.

    Example:
        >>> import netfission as nf
        >>> from netfission.models import create_model
        >>> images = torch.randn(2, 3, 8, 8)
        >>> net = nf.fission(create_model("wrn-10-1", 10), 3, example_input=images)
        >>> deployed = nf.deploy(net, images)
        >>> torch.allclose(deployed(images), net.eval()(images), atol=1e-4)
        True
    """
    network, expected = _copy(network, example_input)
    steps = [copies for _, copies in network.parts]
    parts = [
        {number: folded(part, features[number]) for number, part in copies.items()}
        for copies, features in zip(steps, _step_inputs(steps, example_input), strict=True)
    ]
    choices = {}
    for choice in (True, False) if joined is None else (joined,):
        choices[f"{choice}"] = _assemble(parts, example_input, choice)
        _check(choices[f"{choice}"](example_input), expected)
    times = inference_times(choices, example_input, rounds=5 if joined is None else 0, warm_up=1)
    return choices[min(choices, key=lambda choice: min(times[choice], default=0))]


@torch.inference_mode(False)
@torch.no_grad()
def deploy_exits(network: FissionNetwork, example_input: Inputs) -> FissionNetwork:
    """Convert a fissioned network for fast inference exit by exit, as in a cascade.

    Like `deploy`, but each stage of each path stays a separate module.

    Args:
        network: in train or eval mode; not changed.
        example_input: as for `deploy`.

    Returns:
        A `FissionNetwork` of the same structure for inference only, in eval mode.

    Raises:
        ValueError: as for `deploy`.

    Example:
        >>> import netfission as nf
        >>> from netfission.models import create_model
        >>> images = torch.randn(2, 3, 8, 8)
        >>> net = nf.fission(create_model("wrn-10-1", 10), 3, example_input=images)
        >>> cascade = nf.Cascade(deploy_exits(net, images), [0.5, 0.5], example_input=images)
        >>> cascade(images).shape
        torch.Size([2, 10])
    """
    network, expected = _copy(network, example_input)
    steps = [copies for _, copies in network.parts]
    stem, *stages, heads = [
        {number: _convert(part, features[number]) for number, part in copies.items()}
        for copies, features in zip(steps, _step_inputs(steps, example_input), strict=True)
    ]
    network.stem = stem[0]
    for number, path in enumerate(network.exit_paths):
        path.stages = nn.ModuleList(copies[number] for copies in stages if number in copies)
        path.head = heads[number]
    _check(network.eval()(example_input), expected)
    return network


def _copy(network: FissionNetwork, example_input: Inputs) -> tuple[FissionNetwork, Tensor]:
    """Return a copy in eval mode with masks applied to its weights, and its logits."""
    check_network("network", network)
    network = copy.deepcopy(network).eval()
    with input_errors("example_input", example_input):
        logits: Tensor = network(example_input)
    discard_masks(network)
    return network, logits


def _step_inputs(steps: Sequence[Mapping[int, nn.Module]], images: Inputs) -> list[dict[int, Features]]:
    """Return the input of every part of every step, by exit."""
    inputs: list[dict[int, Features]] = []
    outputs: dict[int, Any] = {0: images}
    for copies in steps:
        inputs.append({number: outputs.get(number, outputs[0]) for number in copies})
        outputs = {number: part(inputs[-1][number]) for number, part in copies.items()}
    return inputs


def _assemble(parts: Sequence[Mapping[int, fx.GraphModule]], images: Inputs, joined: bool) -> Deployed:
    builder = GraphBuilder(joined=joined)
    features: PathFeatures = PathNodes((_channels_last(builder, images),))
    running = [0]
    linear = _linear_exits(parts)
    waiting: dict[int, fx.Node] = {}  # what the linear exits read
    for step, every in enumerate(parts):
        for number in every.keys() & linear - waiting.keys():
            waiting[number] = builder.separate(features, len(running))[0]
        copies = {number: part for number, part in every.items() if number not in linear}
        if 1 < len(running) < len(copies):  # paths that branch off here read the same as exit 0
            nodes = dict(zip(running, builder.separate(features, len(running)), strict=True))
            features = PathNodes(tuple(nodes.get(number, nodes[0]) for number in copies))
        name = "stem" if step == 0 else "head" if step == len(parts) - 1 else f"stages.{step - 1}"
        features = builder.add(name, list(copies.values()), features)
        running = list(copies)
    assert isinstance(features, PathNodes)  # a head gives logits
    if features.joined:
        logits = builder.graph.call_method("unflatten", (features.nodes[0], 1, (len(running), -1)))
    else:
        logits = builder.graph.call_function(torch.stack, (list(features.nodes), 1))
    if linear:  # they come last
        alone = [
            builder.add_alone(f"head.{number}", parts[-1][number], waiting[number])
            for number in sorted(linear)
        ]
        others = builder.graph.call_function(torch.stack, (alone, 1))
        logits = builder.graph.call_function(torch.cat, ([logits, others], 1))
    return _finish(builder, logits, images)


def _linear_exits(parts: Sequence[Mapping[int, fx.GraphModule]]) -> set[int]:
    """Return the exits whose paths pass features on unchanged to their head."""
    *before, heads = parts
    return {
        number
        for number in heads
        if number
        and all(
            node.op in ("placeholder", "output")
            for copies in before
            if number in copies
            for node in copies[number].graph.nodes
        )
    }


def _convert(part: nn.Module, features: Features) -> Deployed:
    builder = GraphBuilder(joined=False)
    result = builder.add_alone("part", folded(part, features), _channels_last(builder, features))
    return _finish(builder, result, features)


def _channels_last(builder: GraphBuilder, features: Inputs) -> fx.Node:
    source = builder.graph.placeholder("features")
    if not isinstance(features, Tensor) or features.ndim != 4:
        return source
    return builder.graph.call_method("contiguous", (source,), {"memory_format": torch.channels_last})


def _finish(builder: GraphBuilder, result: fx.Node, features: Inputs) -> Deployed:
    layers = builder.finish(result)
    fuse(layers, features)
    return Deployed(layers)


def _check(logits: Tensor, expected: Tensor) -> None:
    """Check that logits are equal up to rounding, relative to their spread: softmax ignores their mean."""
    difference = (logits - expected).abs().max().item()
    spread = (expected.amax(dim=2) - expected.amin(dim=2)).max().item()
    rounding = _ROUNDINGS * _resolution(expected) * expected.abs().max().item()
    if not difference <= TOLERANCE * spread + rounding:
        raise invalid(
            "network",
            "a network that gives equal, finite logits every time in eval mode",
            found=f"logits that spread over {spread:.2g} and differ by {difference:.2g} when deployed",
        )


def _resolution(logits: Tensor) -> float:
    """Return the relative spacing of the numbers that convolutions compute with."""
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # missing in stubs
    if logits.is_cuda and logits.dtype == torch.float32 and precision == "tf32":
        return _TF32_RESOLUTION
    return torch.finfo(logits.dtype).eps
