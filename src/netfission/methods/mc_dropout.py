"""MC dropout (Gal & Ghahramani 2016, arXiv 1506.02142): dropout stays on, its samples are averaged."""

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netfission.config import FissionConfig
from netfission.methods.base import BuildPlan, Method
from netfission.methods.layers import (
    BatchedMembers,
    Layer,
    check_members,
    check_network,
    make_generator,
    replace_layers,
    run_order,
    weight_layers,
)
from netfission.methods.member_layers import find_classifiers
from netfission.utils.errors import invalid

_DROPOUTS = (nn.Dropout, nn.Dropout2d)


class MemberDropout(nn.Dropout):
    """Dropout that draws a new sample per call in train mode, and one fixed sample per member in eval mode.

    A sample covers the features of an image, `(channels, height, width)`. It is the same for all images, so
    that a prediction depends on the image alone. Each call draws it again from the seed, with a separate
    generator: nothing is stored, images may have any size, and the global generator stays as it was.

    Args:
        p: share of the features that is set to 0; the others are divided by 1 - p.
        members: number of members; in eval mode a batch holds equally many rows of each, member 0 first.
        seed: of the members' samples.
        channels: drop whole channels, as `nn.Dropout2d`.

    Example:
        >>> dropout = MemberDropout(0.5, members=2, seed=0).eval()
        >>> first, second = dropout(torch.ones(2, 100))
        >>> torch.equal(first, second), sorted(first.unique().tolist())
        (False, [0.0, 2.0])
    """

    def __init__(self, p: float, members: int, seed: int, channels: bool = False) -> None:
        super().__init__(p)
        self.members = members
        self.seed = seed
        self.channels = channels

    def forward(self, features: Tensor) -> Tensor:
        """Set some of the features to 0."""
        if self.training:
            drop = F.dropout2d if self.channels else F.dropout
            return drop(features, self.p)
        rows = features.unflatten(0, (self.members, -1))
        dropped: Tensor = (rows * self._samples(features)).flatten(0, 1)
        return dropped

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # its graphs hold no generators
    def _samples(self, features: Tensor) -> Tensor:
        """Draw factors `(members, 1, ...)` for features `(rows, ...)`."""
        shape = features.shape[1:]
        if self.channels:
            shape = torch.Size([shape[0], *(1 for _ in shape[1:])])
        generator = torch.Generator().manual_seed(self.seed)
        kept = torch.empty(self.members, 1, *shape).bernoulli_(1 - self.p, generator=generator)
        return (kept / (1 - self.p)).to(features)


class DroppedClassifier(nn.Module):
    """A linear layer under dropout: features `(batch, inputs)` → logits `(batch, members, classes)`.

    In train mode there is one prediction, under fresh noise.

    Args:
        layer: the layer.
        dropout: of its features.

    Example:
        >>> layer = DroppedClassifier(nn.Linear(8, 10), MemberDropout(0.5, members=3, seed=0))
        >>> layer(torch.rand(5, 8)).shape, layer.eval()(torch.rand(5, 8)).shape
        (torch.Size([5, 1, 10]), torch.Size([5, 3, 10]))
    """

    def __init__(self, layer: nn.Linear, dropout: MemberDropout) -> None:
        super().__init__()
        self.layer = layer
        self.dropout = dropout
        self.members = dropout.members

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of every member."""
        members = 1 if self.training else self.members
        dropped = self.dropout(features.repeat(members, 1))
        logits: Tensor = self.layer(dropped).unflatten(0, (members, -1)).transpose(0, 1)
        return logits


class McDropoutMethod(Method):
    """One network trained with dropout; its predictions under `exits` samples of the noise.

    There is dropout before each convolution and linear layer (section 3: "before every weight layer"). Only
    the first to run has none, as in uncertainty-baselines' Wide ResNet with `residual_dropout=False`, whose
    rate of 0.1 is the default. A layer right after one of the model's own `nn.Dropout` or `nn.Dropout2d` gets
    no second one; the model's own keep their rates and also stay on. Dropout by `torch.nn.functional` is not
    found and stays off in eval mode.

    With `dropout_layers: last` there is dropout before the classifier alone, and the network before it runs
    once for all predictions. It suits trained weights, which noise in every layer ruins if they never saw it.

    In the paper the noise differs between images. Here a member's noise is drawn once for all images: the
    predictions for an image have the same distribution over seeds, and they do not depend on the batch.
    """

    settings = frozenset({"dropout_layers", "dropout_rate"})
    joint = False
    average_source = "Gal & Ghahramani 2016, and uncertainty-baselines' baselines/cifar/dropout.py"
    deviations = (
        "in training each image goes once through the network, under fresh dropout",
        "in evaluation each member's dropout is drawn once, the same for all images",
    )
    differences = (
        "one sample per exit (authors of the code: 1 or 30)",
        "dropout before every layer but the first (their default: inside residual branches)",
    )

    def check(self, fission: FissionConfig) -> None:
        """Check the settings of a network.

        Raises:
            ValueError: a rate outside (0, 1), fewer than 2 exits, or pruning.
        """
        if not 0 < self.config.dropout_rate < 1:
            raise invalid("dropout_rate", "a share between 0 and 1", self.config.dropout_rate)
        check_members(fission, self.config.method)

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build the model of the plan's seed, with its weights, and add dropout.

        Raises:
            ValueError: a rate outside (0, 1), fewer than 2 exits, pruning, or a model that cannot have it.
        """
        method, members, rate = self.config.method, plan.fission.exits, self.config.dropout_rate
        self.check(plan.fission)
        model = plan.create(plan.fission.seed)
        layers = weight_layers(model, plan, method)
        generator = make_generator(plan.fission.seed)

        def dropout(p: float, channels: bool = False) -> MemberDropout:
            seed = int(torch.randint(2**62, (), generator=generator))
            return MemberDropout(p, members, seed, channels)

        if self.config.dropout_layers == "last":
            classifiers = find_classifiers(model, plan, method)

            def make_last(name: str, module: nn.Module) -> nn.Module | None:
                return DroppedClassifier(module, dropout(rate)) if name in classifiers else None  # type: ignore[arg-type]

            return check_network(replace_layers(model, make_last), plan, method)
        added = _without_dropout(model, plan, layers)

        def make(name: str, module: nn.Module) -> nn.Module | None:
            if isinstance(module, _DROPOUTS) and module.p > 0:
                return dropout(module.p, isinstance(module, nn.Dropout2d))
            return nn.Sequential(dropout(rate), module) if module in added else None

        return check_network(
            BatchedMembers(replace_layers(model, make), members, in_training=False), plan, method
        )


def _without_dropout(model: nn.Module, plan: BuildPlan, layers: Mapping[str, Layer]) -> set[nn.Module]:
    """Find the layers except the first that do not run right after a dropout of the model."""
    modules = dict(model.named_modules())
    order = [modules[name] for name in run_order(model, plan.example, nn.Conv2d, nn.Linear, *_DROPOUTS)]
    kept = [module for module in order if not isinstance(module, _DROPOUTS) or module.p > 0]
    _, *inner = layers.values()
    return {layer for before, layer in pairwise(kept) if layer in inner and not isinstance(before, _DROPOUTS)}
