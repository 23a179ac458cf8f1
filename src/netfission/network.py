"""The multi-exit network that fission makes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from netfission.ensemble import ensemble_log_probabilities
from netfission.grouping.base import RepeatedLayer
from netfission.surgery.masks import Guarded

if TYPE_CHECKING:
    from netfission.config import FissionConfig


class ExitPath(Guarded):
    """One exit's own stages and head. Features at its branch point → logits `(batch, classes)`."""

    def __init__(self, stages: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        """Features at the branch point → logits `(batch, classes)`."""
        for stage in self.stages:
            features = stage(features)
        logits: Tensor = self.head(features)
        return logits


class FissionNetwork(Guarded):
    """One network with several exits, whose early stages are shared and run once.

    A plain `nn.Module`: any optimiser, loop and batch size, `torch.compile`, `torch.export`, `deepcopy`,
    pickling and DDP. Exit 0 runs through all of `paths[0]`; exit k leaves it after stage
    `branch_after[k - 1]` and goes on through `paths[k]`, which holds the stages after that one.

    Removed weights are exactly 0 and stay so. They are stored as zeros beside a bool buffer
    (1 byte a weight) and their gradients are zeroed in place as they arrive, so that a forward pass
    makes no masked copy of any weight; see `netfission.surgery.masks.remove`.

    Parameter names end in the name the parameter had in the model given:
    `paths.1.stages.0.layer3.0.conv1.weight` is exit 1's share of `layer3.0.conv1.weight`.

    Attributes:
        stem: what comes before the first stage.
        paths: one `ExitPath` an exit, exit 0 first.
        branch_after: for each exit from 1, the 1-based number of the last stage it shares with exit 0.
        stage_names: the module that ended each stage in the model given.
        repeated: stage → the layers that all its paths hold whole, though they were meant to be dealt out.
        config: the settings that `fission` made it with, where they are plain data.
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

    @property
    def exits(self) -> int:
        """The number of exits."""
        return len(self.paths)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(batch, channels, height, width)` → logits `(batch, exits, classes)`."""
        trunk, *branches = self.exit_paths
        features = [self.stem(images)]
        for stage in trunk.stages:
            features.append(stage(features[-1]))
        logits = [trunk.head(features[-1])]
        for path, after in zip(branches, self.branch_after, strict=True):
            logits.append(path(features[after]))
        return torch.stack(logits, dim=1)

    @property
    def exit_paths(self) -> list[ExitPath]:
        """`paths` as a list of their own type, exit 0 first."""
        return list(self.paths)  # type: ignore[arg-type]  # ModuleList forgets what it lists

    def stage_copies(self, number: int) -> dict[int, nn.Module]:
        """The copies of a stage, by the exit whose path holds them; a shared stage is exit 0's.

        Args:
            number: 0-based place in `stage_names`.
        """
        starts = enumerate((0, *self.branch_after))
        return {
            exit_: self.exit_paths[exit_].stages[number - start] for exit_, start in starts if start <= number
        }

    @property
    def steps(self) -> list[tuple[str, dict[int, nn.Module]]]:
        """Stem, stages and head: of each its name, and what runs there by the exit whose path holds it."""
        stages = [(name, self.stage_copies(number)) for number, name in enumerate(self.stage_names)]
        heads: dict[int, nn.Module] = {number: path.head for number, path in enumerate(self.exit_paths)}
        return [("stem", {0: self.stem}), *stages, ("head", heads)]

    def summary(self) -> str:
        """What each path holds, stage by stage, as text; and what all of them hold whole, and why."""
        width = max(len(name) for name, _ in self.steps)
        lines = [f"{'':{width}}  parameters of each path"]
        for name, copies in self.steps:
            modules = copies.values()
            counts = (sum(parameter.numel() for parameter in module.parameters()) for module in modules)
            lines.append(f"{name:{width}}  " + " + ".join(f"{count:,}" for count in counts))
        for name, layers in self.repeated.items():
            for reason in dict.fromkeys(layer.reason for layer in layers):
                own = [layer for layer in layers if layer.reason == reason]
                macs = sum(layer.macs for layer in own)
                lines.append(
                    f"{name}: every path holds {', '.join(layer.layer for layer in own)} whole, "
                    f"{macs / 1e6:.2f} M MACs a path ({reason})"
                )
        return "\n".join(lines)

    def ensemble(self, average: Literal["logits", "probabilities"] = "logits") -> "Ensemble":
        """This network as one classifier, a drop-in for the model given; it shares all weights.

        Args:
            average: what is averaged over the exits, see `Ensemble`.
        """
        return Ensemble(self, average)


class Ensemble(nn.Module):
    """A fissioned network as one classifier: images → `(batch, classes)`.

    With `average="logits"` (the paper) it returns the mean of the exits' logits; with
    `"probabilities"` the logarithm of their mean probability. The softmax of either is the ensemble's
    probability.
    """

    def __init__(
        self, network: FissionNetwork, average: Literal["logits", "probabilities"] = "logits"
    ) -> None:
        super().__init__()
        self.network = network
        self.average: Literal["logits", "probabilities"] = average

    @property
    def exits(self) -> int:
        """The number of exits."""
        return self.network.exits

    @property
    def steps(self) -> list[tuple[str, dict[int, nn.Module]]]:
        """See `FissionNetwork.steps`."""
        return self.network.steps

    def forward(self, images: Tensor) -> Tensor:
        """Images `(batch, channels, height, width)` → logits `(batch, classes)`."""
        logits: Tensor = self.network(images)
        if self.average == "logits":
            return logits.mean(dim=1)
        return ensemble_log_probabilities(logits, self.average)
