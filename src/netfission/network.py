"""The multi-exit network that `fission` returns, and its ensemble as a classifier."""

from collections.abc import Mapping, Sequence
from math import log, prod
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netfission.ensemble import Average, check_average, ensemble_log_probabilities, mean_logits, weights_of
from netfission.grouping.base import RepeatedLayer
from netfission.grouping.budget import TimedBudget
from netfission.surgery.features import Features
from netfission.surgery.masks import MaskedModule
from netfission.surgery.plain import check_plain
from netfission.surgery.reconstruction import fit_linear
from netfission.utils.errors import invalid
from netfission.utils.inputs import Inputs
from netfission.utils.text import count_noun

if TYPE_CHECKING:
    from netfission.config import FissionConfig


_RATIO_TOLERANCE = 0.2  # of the logarithm of height over width, as sizes of features are rounded


class ExitPath(MaskedModule):
    """The stages and head that belong to one exit alone.

    Args:
        stages: the exit's stages after its branch point, in the order they run.
        head: features of the last stage → logits `(batch, classes)`.
    """

    def __init__(self, stages: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.head = head

    def forward(
        self, features: Features, keep: Sequence[int] | None = None
    ) -> Tensor | tuple[Tensor, list[Features]]:
        """Map features at the branch point to logits `(batch, classes)`.

        Args:
            features: input of the first stage: a tensor, or a tuple if the stages pass on several.
            keep: numbers of stages, counted from 1, whose features are returned as well; 0 for the input.

        Returns:
            Logits; if `keep` is given, logits and the features that it names, in its order.
        """
        kept = {0: features}
        for number, stage in enumerate(self.stages, start=1):
            features = stage(features)
            if keep is not None and number in keep:
                kept[number] = features
        logits: Tensor = self.head(features)
        return logits if keep is None else (logits, [kept[number] for number in keep])


class LinearExit(nn.Module):
    """Global average pooling and a linear layer: features → logits `(batch, classes)`.

    Args:
        features: an example: `(batch, channels, height, width)`, `(batch, height, width, channels)`, tokens
            `(batch, tokens, channels)` or vectors `(batch, channels)`.
        classes: number of classes.
        images: the images that the features are of; default square. What of the features has their ratio of
            height and width are the positions. Device and type of the layer are those of the features.

    Raises:
        ValueError: the features have another shape.

    Example:
        >>> LinearExit(torch.zeros(1, 16, 8, 8), classes=10)(torch.rand(5, 16, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, features: Features, classes: int, images: Inputs | None = None) -> None:
        super().__init__()
        height, width = images.shape[-2:] if isinstance(images, Tensor) and images.ndim == 4 else (1, 1)
        self.positions = _positions(features, height / width)
        assert isinstance(features, Tensor)
        (channels,) = set(range(1, features.ndim)) - set(self.positions)
        self.linear = nn.Linear(features.shape[channels], classes).to(features)

    def forward(self, features: Tensor) -> Tensor:
        """Map features to logits `(batch, classes)`."""
        logits: Tensor = self.linear(self.pooled(features))
        return logits

    def pooled(self, features: Tensor) -> Tensor:
        """Return the means of features over their positions, `(batch, channels)`."""
        return features.mean(dim=self.positions) if self.positions else features

    def fit(self, pooled: Tensor, logits: Tensor) -> None:
        """Solve the layer by least squares, so that it maps what `pooled` returned to logits."""
        fit_linear(self.linear, pooled, logits)


class LinearMapExit(nn.Module):
    """A 1×1 convolution of each map that a stage passes on, and their sum, enlarged to the images.

    Features that skip connections pass on beside those of the stage are read, too, except maps of more than
    a third of the images' height: they cost the most time, and help an exit little. If all are that fine, the
    smallest of them are read. The convolutions run on the maps as they are. Their results are enlarged
    (bilinear) step by step, from the smallest map to the largest and then to the images, as in FCN (Long et
    al. 2015, arXiv 1411.4038).

    Args:
        features: an example: a tensor `(batch, channels, height, width)`, or a tuple with some.
        classes: number of classes.
        images: the images that the features are of, `(batch, channels, height, width)`. Logits of other
            images have the size that the features tell: a tensor without channels among them has that of the
            images. Else they are larger than the finest map by the same factors, or of this one size if there
            is no map with integers for these.

    Raises:
        ValueError: there is no map among the features.

    Example:
        >>> features = torch.rand(2, 8, 8, 12), torch.rand(2, 4, 16, 24)
        >>> LinearMapExit(features, 5, torch.rand(2, 3, 32, 48))(features).shape
        torch.Size([2, 5, 32, 48])
    """

    def __init__(self, features: Features, classes: int, images: Tensor) -> None:
        super().__init__()
        tensors = features if isinstance(features, tuple) else (features,)
        height, width = images.shape[2:]
        self.maps = _coarse_maps(tensors, height)
        if not self.maps:
            expected = "one whose stages give maps (batch, channels, height, width) for linear exits"
            raise invalid("model", expected, found=f"features of {tensors[0].ndim} dimensions")
        self.size = height, width
        self.scale = _scale_of_images(tensors, height, width)
        sizes = (number for number, tensor in enumerate(tensors) if tensor.shape[1:] == (0, height, width))
        self.size_of = next(sizes, None)  # number of the tensor that has the size of the images
        self.linear = nn.ModuleList(
            nn.Conv2d(tensors[number].shape[1], classes, 1, bias=number == self.maps[0]).to(tensors[number])
            for number in self.maps
        )

    def pooled(self, features: Features) -> Tensor:
        """Return means of maps over the positions of the smallest one, `(batch, channels, height, width)`."""
        tensors = features if isinstance(features, tuple) else (features,)
        maps = [tensors[number] for number in self.maps]
        height, width = min((tensor.shape[2:] for tensor in maps), key=prod)
        return torch.cat([F.adaptive_avg_pool2d(tensor, (height, width)) for tensor in maps], dim=1)

    @torch.no_grad()
    def fit(self, pooled: Tensor, logits: Tensor) -> None:
        """Solve the convolutions by least squares, so that they give logits, both as means over positions.

        Args:
            pooled: what `pooled` returned.
            logits: `(batch, classes, height, width)`, of any height and width.
        """
        layers = cast(list[nn.Conv2d], list(self.linear))
        weight = torch.cat([layer.weight.flatten(1) for layer in layers], dim=1)
        joint = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
        joint.weight.copy_(weight)
        wanted = F.adaptive_avg_pool2d(logits, (pooled.shape[2], pooled.shape[3]))
        fit_linear(joint, *(tensor.movedim(1, -1).flatten(0, 2) for tensor in (pooled, wanted)))
        parts = joint.weight.split([layer.in_channels for layer in layers], dim=1)
        for layer, part in zip(layers, parts, strict=True):
            layer.weight.copy_(part[..., None, None])
        assert layers[0].bias is not None
        layers[0].bias.copy_(joint.bias)

    def forward(self, features: Features) -> Tensor:
        """Map features to logits `(batch, classes, height, width)`."""
        tensors = features if isinstance(features, tuple) else (features,)
        first, *others = zip(self.maps, self.linear, strict=True)
        logits: Tensor = first[1](tensors[first[0]])
        for number, layer in others:
            finer = layer(tensors[number])
            logits = _enlarged(logits, finer.shape[2:]) + finer
        return _enlarged(logits, self._size_of_images(tensors))

    def _size_of_images(self, tensors: Sequence[Tensor]) -> tuple[int, int]:
        """Return the height and width of the images that the features are of."""
        if self.size_of is not None:
            return tensors[self.size_of].shape[2], tensors[self.size_of].shape[3]
        if self.scale is not None:
            number, down, across = self.scale
            return tensors[number].shape[2] * down, tensors[number].shape[3] * across
        return self.size


def _maps(tensors: Sequence[Tensor]) -> list[int]:
    """Return which tensors are maps with channels, `(batch, channels, height, width)`."""
    return [number for number, tensor in enumerate(tensors) if tensor.ndim == 4 and tensor.shape[1]]


def _coarse_maps(tensors: Sequence[Tensor], height: int) -> list[int]:
    """Return which tensors are maps that a linear exit of images of a height reads, smallest map first."""
    maps = sorted(_maps(tensors), key=lambda number: tensors[number].shape[2])
    coarse = [number for number in maps if 3 * tensors[number].shape[2] <= height]
    return coarse or [number for number in maps if tensors[number].shape[2] == tensors[maps[0]].shape[2]]


def _scale_of_images(tensors: Sequence[Tensor], height: int, width: int) -> tuple[int, int, int] | None:
    """Return the finest map whose sides divide those of the images, and both quotients; None without one."""
    scales = [
        (number, height // tensors[number].shape[2], width // tensors[number].shape[3])
        for number in _maps(tensors)
        if height % tensors[number].shape[2] == 0 == width % tensors[number].shape[3]
    ]
    return min(scales, key=lambda scale: scale[1], default=None)


def _enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


LINEAR_EXITS = (LinearExit, LinearMapExit)


def _positions(features: Features, ratio: float) -> tuple[int, ...]:
    """Find the dimensions to average over: of two, those whose sizes have about the ratio of the images."""
    if isinstance(features, Tensor) and features.ndim in (2, 3):
        return (1,) if features.ndim == 3 else ()
    if isinstance(features, Tensor) and features.ndim == 4:
        _, first, middle, last = features.shape
        of_first, of_last = (
            abs(log(high / wide / ratio)) for high, wide in ((middle, last), (first, middle))
        )
        return (1, 2) if of_last < min(of_first, _RATIO_TOLERANCE) else (2, 3)  # channels are usually first
    if isinstance(features, Tensor):
        found = f"features of shape {tuple(features.shape)}"
    else:
        found = f"stages that give {len(features)} tensors"
    expected = "one whose stages give (batch, channels[, height, width]) or tokens (batch, tokens, channels)"
    raise invalid("model", f"{expected} for linear exits", found=found)


class FissionNetwork(MaskedModule):
    """One network with several exits, whose early stages are shared and run once.

    It is a plain `nn.Module` and works with any optimiser, training loop and batch size, `torch.compile`,
    `torch.export`, `torch.func`, `deepcopy`, pickling, DDP and FSDP2. Exit 0 runs through all of `paths[0]`.
    Exit k leaves it after stage `branch_after[k - 1]` and continues through `paths[k]`, which holds the
    later stages. Each path is called as a module, so hooks on it run, and it can be sharded alone.

    The forward pass uses 0 for each removed weight, whatever changed the weight before, and its gradient is
    0. A bool buffer beside each weight marks them (1 byte per weight); see
    `netfission.surgery.masks.apply_masks`. `torch.nn.utils.parametrize` on such a weight is refused.

    Parameter names end in the parameter's name in the original model:
    `paths.1.stages.0.layer3.0.conv1.weight` is exit 1's share of `layer3.0.conv1.weight`.

    Attributes:
        stem: what comes before the first stage.
        paths: one `ExitPath` per exit, exit 0 first.
        branch_after: for each exit from 1, the 1-based number of the last stage it shares with exit 0. Linear
            exits come last; their paths pass features on unchanged, up to a `LinearExit` or `LinearMapExit`.
        stage_names: the module that ends each stage in the original model.
        repeated: stage → the layers that its paths repeat as a whole, although the stage is divided.
        config: the settings that `fission` was called with; None if they are not plain data. A budget in
            time is replaced by the multiply-accumulates that were found for it.
        timed: what was found and measured for a budget in time.
        leaves_earlier: whether late exits leave earlier than they were to, as the budget asks.

    Example:
        >>> import netfission as nf
        >>> from netfission.models import create_model
        >>> model = create_model("wrn-10-1", num_classes=10)
        >>> net = nf.fission(model, exits=2, example_input=torch.zeros(1, 3, 32, 32))
        >>> net(torch.zeros(4, 3, 32, 32)).shape
        torch.Size([4, 2, 10])
        >>> [len(path.stages) for path in net.exit_paths]  # exit 1 shares the first of three stages
        [3, 2]
        >>> print(net.summary())
                parameters of each path
        stem    432
        block1  4,672
        block2  14,432 + 14,432
        bn      57,664 + 57,664
        head    650 + 650
    """

    def __init__(
        self,
        stem: nn.Module,
        paths: Sequence[ExitPath],
        branch_after: Sequence[int],
        stage_names: Sequence[str],
        repeated: Mapping[str, Sequence[RepeatedLayer]] | None = None,
        config: "FissionConfig | None" = None,
    ) -> None:
        super().__init__()
        assert len(branch_after) == len(paths) - 1
        self.stem = stem
        self.paths = nn.ModuleList(paths)
        self.branch_after = tuple(branch_after)
        self.stage_names = tuple(stage_names)
        self.repeated = {name: tuple(layers) for name, layers in (repeated or {}).items()}
        self.config = config
        self.timed: TimedBudget | None = None
        self.leaves_earlier = False

    @property
    def exits(self) -> int:
        """The number of exits."""
        return len(self.paths)

    @property
    def linear(self) -> int:
        """The number of linear exits, which are the last."""
        return sum(isinstance(path.head, LINEAR_EXITS) for path in self.exit_paths)

    @property
    def exit_weights(self) -> tuple[float, ...] | None:
        """Weights of the exits in the ensemble's mean of logits, exit 0 first; None if all are equal."""
        return None if self.config is None else self.config.exit_weights

    def forward(self, images: Inputs) -> Tensor:
        """Map images `(batch, channels, height, width)` to logits `(batch, exits, classes)`.

        Those of a network of maps are `(batch, exits, classes, height, width)`. Linear exits come last.

        Args:
            images: or what else the model reads, of the structure of `fission`'s `example_input`: another
                tensor, or a dictionary or tuple of tensors.
        """
        trunk, *branches = self.exit_paths
        logits, features = trunk(self.stem(images), self.branch_after)
        others = [path(inputs) for path, inputs in zip(branches, features, strict=True)]
        return torch.stack([logits, *others], dim=1)

    @property
    def exit_paths(self) -> list[ExitPath]:
        """`paths` as a list of `ExitPath`, exit 0 first."""
        return list(self.paths)  # type: ignore[arg-type]  # ModuleList forgets what it lists

    def stage_copies(self, number: int) -> dict[int, nn.Module]:
        """Return the copies of a stage by the exit whose path holds them; a shared stage is exit 0's.

        Args:
            number: 0-based index into `stage_names`.
        """
        starts = enumerate((0, *self.branch_after))
        return {
            exit_: self.exit_paths[exit_].stages[number - start] for exit_, start in starts if start <= number
        }

    @property
    def parts(self) -> list[tuple[str, dict[int, nn.Module]]]:
        """Stem, stages and head in order: the name of each, and its modules by the exit that holds them."""
        stages = [(name, self.stage_copies(number)) for number, name in enumerate(self.stage_names)]
        heads: dict[int, nn.Module] = {number: path.head for number, path in enumerate(self.exit_paths)}
        return [("stem", {0: self.stem}), *stages, ("head", heads)]

    def summary(self) -> str:
        """Return the parameters of each path per stage, and the layers that all paths repeat, as text.

        If `branch_after` is `late` or `auto`, a line says where the exits leave, and why. It is missing if a
        budget made them leave earlier, and the network was loaded from files.

        A network by channels that was loaded from files lists no repeated layers: its widths come from its
        weights, without finding the channel groups again.
        """
        width = max(len(name) for name, _ in self.parts)
        lines = [f"{'':{width}}  parameters of each path"]
        for name, modules in self.parts:
            counts = (sum(p.numel() for p in module.parameters()) for module in modules.values())
            lines.append(f"{name:{width}}  " + " + ".join(f"{count:,}" for count in counts))
        chosen = self.config is not None and isinstance(self.config.branch_after, str)
        if self.config is not None and (chosen or self.leaves_earlier) and self.config.exits > 1:
            lines.append(self._branch_points(self.config))
        if self.config is not None and self.timed is not None:
            lines.append(self._time(self.config, self.timed))
        for name, layers in self.repeated.items():
            for reason in dict.fromkeys(layer.reason for layer in layers):
                alike = [layer for layer in layers if layer.reason == reason]
                macs = sum(layer.macs for layer in alike)
                lines.append(
                    f"{name}: every path repeats {', '.join(layer.layer for layer in alike)}, "
                    f"{macs / 1e6:.2f} M MACs per path ({reason})"
                )
        return "\n".join(lines)

    def _branch_points(self, config: "FissionConfig") -> str:
        """Return where the exits leave, and why, in words."""
        names = [self.stage_names[after - 1] for after in self.branch_after[: config.exits - 1]]
        where = f"exits leave after {', '.join(dict.fromkeys(names))}"
        if self.leaves_earlier:
            return f"{where}: as late as the budget can be met"
        if config.known_branch_after(trained=False) == "late":
            return f"{where}: late, so that most of the network stays whole and keeps what it has learned"
        return f"{where}: early, as nothing says that the weights are trained (reconstruct)"

    def _time(self, config: "FissionConfig", timed: TimedBudget) -> str:
        """Return the time that was measured, and what it was measured with, in words."""
        time, images = timed.time, count_noun(config.budget_batch_size, "image")
        return (
            f"with {timed.macs:.2f} times the model's multiply-accumulates it takes {time.median:.2f} "
            f"({time.lower:.2f}–{time.upper:.2f}) times its time for {images}, {timed.run}"
        )

    def ensemble(self, average: Average | None = None) -> "Ensemble":
        """Return this network as one classifier, a drop-in for the original model; it shares all weights.

        Args:
            average: what is averaged over the exits, see `Ensemble`.

        Raises:
            ValueError: `average` is not valid.
        """
        return Ensemble(self, average)


class Ensemble(MaskedModule):
    """A fissioned network as one classifier, in the network's mode: images → logits `(batch, classes)`.

    With `average="logits"` (the paper) it returns the mean of the exits' logits, with weights their weighted
    mean, with `"probabilities"` the logarithm of their mean probability. In all cases, the softmax of the
    output is the ensemble's probability.

    Args:
        network: the network; weights are shared, not copied.
        average: `"logits"`, `"probabilities"`, or a tuple of weights, one per exit; default logits, by
            the network's `exit_weights` if it has any.

    Raises:
        ValueError: `average` is not valid.

    Example:
        >>> import netfission as nf
        >>> from netfission.models import create_model
        >>> model = create_model("wrn-10-1", num_classes=10)
        >>> net = nf.fission(model, exits=2, example_input=torch.zeros(1, 3, 32, 32)).eval()
        >>> images = torch.randn(4, 3, 32, 32)
        >>> Ensemble(net)(images).equal(net(images).mean(dim=1))
        True
    """

    def __init__(self, network: FissionNetwork, average: Average | None = None) -> None:
        super().__init__()
        average = network.exit_weights or "logits" if average is None else average
        check_average(average, network.exits)
        self.network = network
        self.average: Average = average
        self.training = network.training

    @property
    def exits(self) -> int:
        """The number of exits."""
        return self.network.exits

    @property
    def linear(self) -> int:
        """The number of linear exits, which are the last."""
        return self.network.linear

    @property
    def parts(self) -> list[tuple[str, dict[int, nn.Module]]]:
        """See `FissionNetwork.parts`."""
        return self.network.parts

    def forward(self, images: Inputs) -> Tensor:
        """Map images, or what else the network reads, to logits `(batch, classes)`."""
        logits: Tensor = self.network(images)
        if self.average != "probabilities":
            return mean_logits(logits, weights_of(self.average))
        return ensemble_log_probabilities(logits, self.average)


def check_network(argument: str, network: nn.Module) -> None:
    """Raise a `ValueError` unless a module is a plain `FissionNetwork`; the message says what to pass.

    Example:
        >>> check_network("network", nn.DataParallel(nn.Linear(2, 2)))
        Traceback (most recent call last):
        ValueError: network must be a plain network, got DataParallel, which wraps it; pass network.module
    """
    check_plain(argument, network)
    if not isinstance(network, FissionNetwork):
        hint = "make one with netfission.fission"
        raise invalid(argument, "a FissionNetwork", found=type(network).__name__, hint=hint)
