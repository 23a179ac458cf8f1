"""Narrow branches with grouped convolutions: low-cost self-ensembles by another transformation (SEMBG)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import gcd, prod, sqrt

import torch
from torch import Tensor, nn

from netfission.config import FissionConfig, MethodConfig
from netfission.methods.base import BuildPlan, Method
from netfission.methods.checks import check_several_exits, check_unused, unsuitable_model
from netfission.methods.layers import last_to_run
from netfission.surgery.backbone import cut, resolve_branches
from netfission.surgery.masks import check_plain_weights
from netfission.utils.errors import first_line, invalid
from netfission.utils.modes import in_mode

_NARROWABLE = nn.Conv2d | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d


class NarrowBranches(nn.Module):
    """Early stages that run once, then branches side by side: images → logits `(batch, branches, classes)`.

    Args:
        shared: stem and early stages.
        branches: each the rest of the network with its head, features → logits `(batch, classes)`.

    Example:
        >>> network = NarrowBranches([nn.Flatten()], [nn.Linear(16, 10), nn.Linear(16, 10)])
        >>> network(torch.rand(5, 1, 4, 4)).shape
        torch.Size([5, 2, 10])
    """

    def __init__(self, shared: Sequence[nn.Module], branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.shared = nn.Sequential(*shared)
        self.branches = nn.ModuleList(branches)
        self.training = any(branch.training for branch in branches)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits `(batch, branches, classes)`."""
        features = self.shared(images)
        return torch.stack([branch(features) for branch in self.branches], dim=1)


class NarrowMethod(Method):
    """SEMBG: multi-branch transformation and grouped convolution (H. Lee, J.-S. Lee, arXiv 2408.02307).

    All branches read the network's first stage, which stays as it is. Each of the N branches is the rest of
    the network with g groups in its convolutions, and every width multiplied by √(g / N). A branch then needs
    1 / N of the multiply-accumulates, since those of a layer are the product of its two widths over g. The
    branches have 1, 2, …, N groups, and learn from the labels and from their ensemble (temperature 3).

    Widths, groups and loss are those of the authors' code (github.com/hjdw2/SEMBG, wrn.py and
    train_SEMBG.py: groups 1, 2 and 3, shortcuts' projections without groups), with these differences:

    - Widths are rounded to the nearest multiple of g, not down.
    - The shared stage keeps its width; there it is rounded down to a multiple of all numbers of groups. A
      convolution that reads it has the largest number of groups that divides both g and that width.
    - A 1×1 convolution with a stride above 1 counts as a shortcut's projection.
    - Linear layers before the last have no groups, so their widths are multiplied by √(1 / N). Depthwise
      convolutions stay depthwise.
    - A layer whose shape changes gets new normal weights, with the mean and deviation of the model's own. The
      deviation is scaled so that the outputs keep their variance; there it is He's over fan-out, as if there
      were no groups.
    - The shared stage keeps the weights of a pretrained model.

    Three branches need 1.04 (cifar-resnet18-w16), 1.05 (cifar-resnet18), 1.03 (wrn-28-10) and 1.11 times
    (resnet50) the multiply-accumulates of the single network. The excess is in the projections and in the
    layers that read the shared stage at its full width.
    """

    settings = frozenset({"branch_groups", "branch_after", "stages"})
    loses_weights = "the branches have other widths, and so new weights"
    average = "logits"
    average_source = "Lee & Lee 2024, arXiv 2408.02307, and the authors' code"
    distillation = 1.0
    differences = ("widths are rounded to the nearest multiple of the groups (authors: down)",)

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        if config.branch_groups is not None and not (config.branch_groups and min(config.branch_groups) >= 1):
            raise invalid("branch_groups", "positive integers, one per branch", config.branch_groups)

    def check(self, fission: FissionConfig) -> None:
        """Check the settings of a network.

        Raises:
            ValueError: a setting is not valid.
        """
        method, groups = self.config.method, self.config.branch_groups
        check_several_exits(fission.exits, method)
        if groups is not None and len(groups) != fission.exits:
            raise invalid("branch_groups", f"{fission.exits} positive integers, one per branch", groups)
        check_unused("sparsity", fission.sparsity, 0.0, method, "it does not prune")
        check_unused("ratio", fission.ratio, None, method, "its branches have equal costs")

    def build(self, plan: BuildPlan) -> nn.Module:
        """Build `NarrowBranches` from the model.

        Raises:
            ValueError: a setting is not valid, or the model has layers that cannot be narrowed.
        """
        method, fission = self.config.method, plan.fission
        groups = (
            list(range(1, fission.exits + 1))
            if self.config.branch_groups is None
            else self.config.branch_groups
        )
        self.check(fission)
        backbone = cut(plan.create(fission.seed), plan.example, fission.stages, fission.exits)
        together = [1] * (fission.exits - 1)
        after, *others = resolve_branches(
            together if plan.branch_after is None else plan.branch_after,
            fission.exits,
            backbone.stage_names,
        )
        if others and set(others) != {after}:
            raise invalid(
                "branch_after", f"the same stage for all branches with method={method}", fission.branch_after
            )
        check_plain_weights(backbone)
        shared = nn.Sequential(backbone.stem, *backbone.stages[:after])
        rest = nn.Sequential(*backbone.stages[after:], backbone.head)
        _check_layers(rest)
        with in_mode(shared, training=False), torch.no_grad():
            features = shared(plan.example)
        generator = torch.Generator().manual_seed(fission.seed)
        branches = [_make_branch(rest, features, number, fission.exits, generator) for number in groups]
        return NarrowBranches(list(shared), branches)


def _check_layers(module: nn.Module) -> None:
    """Raise ValueError if there are layers that cannot be narrowed."""
    for path, layer in module.named_modules():
        name = path.partition(".")[2]  # without the number of the part that holds it
        tensors = [*layer._parameters.values(), *layer._buffers.values()]
        if any(tensor is not None for tensor in tensors) and not isinstance(layer, _NARROWABLE):
            expected = "made of convolutions, batch norms and linear layers"
            raise unsuitable_model("narrow", expected, f"layer {name!r} ({type(layer).__name__})")
        if isinstance(layer, nn.Conv2d) and layer.groups > 1 and not _is_depthwise(layer):
            expected = "made of convolutions of one group or depthwise ones"
            raise unsuitable_model("narrow", expected, f"layer {name!r} of {layer.groups} groups")


def _is_depthwise(layer: nn.Conv2d) -> bool:
    return 1 < layer.groups == layer.in_channels


@torch.no_grad()
def _make_branch(
    rest: nn.Module, features: Tensor, groups: int, branches: int, generator: torch.Generator
) -> nn.Module:
    """Make one branch: `rest` with other widths, which are found by running it.

    The input width of each layer is that of the features that arrive; its output width follows from its old
    one. Widths that must agree then do, or the run fails.

    Raises:
        ValueError: the run fails.
    """
    branch = copy.deepcopy(rest)
    last = last_to_run(rest, features.clone(), nn.Conv2d, nn.Linear)  # it gives the logits
    sizing = _Resizer(groups, branches, last, generator)
    layers = [(path, layer) for path, layer in branch.named_modules() if isinstance(layer, _NARROWABLE)]
    hooks = [layer.register_forward_pre_hook(partial(sizing.fit, path)) for path, layer in layers]
    try:
        with in_mode(branch, training=False):
            branch(features.clone())
    except Exception as error:  # whatever an operation raises for shapes that do not match
        expected = "a network whose widths follow from its layers alone"
        found = f"an error at other widths ({first_line(error)})"
        raise unsuitable_model("narrow", expected, found) from error
    finally:
        for hook in hooks:
            hook.remove()
    return branch


@dataclass(frozen=True)
class _Resizer:
    """Changes the widths of a branch's layers when they first run.

    Attributes:
        groups: of the branch's convolutions.
        branches: number of branches.
        last: name of the layer whose width is the number of classes.
        generator: draws the new weights.
        done: names of the layers that have their new widths.
    """

    groups: int
    branches: int
    last: str
    generator: torch.Generator
    done: set[str] = field(default_factory=set)

    def fit(self, path: str, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        """Fit a layer to its input, before it runs for the first time."""
        if path in self.done:
            return
        self.done.add(path)
        features = inputs[0]
        match layer:
            case nn.Conv2d():
                self._fit_convolution(layer, features.shape[1], path == self.last)
            case nn.Linear():
                layer.in_features = features.shape[-1]
                if path != self.last:
                    layer.out_features = self._width(layer.out_features, 1)
                self._draw(layer, "weight", (layer.out_features, layer.in_features))
                self._draw(layer, "bias", (layer.out_features,))
            case nn.BatchNorm1d() | nn.BatchNorm2d():
                self._fit_norm(layer, features.shape[1])

    def _fit_convolution(self, layer: nn.Conv2d, inputs: int, is_last: bool) -> None:
        if _is_depthwise(layer):
            outputs, layer.groups = layer.out_channels // layer.in_channels * inputs, inputs
        elif is_last:
            outputs = layer.out_channels
        else:
            outputs = self._width(layer.out_channels, self.groups)
            layer.groups = 1 if _is_projection(layer) else gcd(self.groups, inputs)
        layer.in_channels, layer.out_channels = inputs, outputs
        self._draw(layer, "weight", (outputs, inputs // layer.groups, *layer.kernel_size))
        self._draw(layer, "bias", (outputs,))

    def _fit_norm(self, layer: nn.BatchNorm1d | nn.BatchNorm2d, inputs: int) -> None:
        if layer.num_features == inputs:
            return
        layer.num_features = inputs
        for name in ("weight", "bias"):
            self._draw(layer, name, (inputs,))
        if layer.running_mean is not None and layer.running_var is not None:  # of other channels
            layer.running_mean = layer.running_mean.new_zeros(inputs)
            layer.running_var = layer.running_var.new_ones(inputs)

    def _width(self, width: int, groups: int) -> int:
        """Return width · √(groups / branches), rounded to the nearest positive multiple of the groups."""
        return groups * max(1, round(width * sqrt(groups / self.branches) / groups))

    def _draw(self, layer: nn.Module, name: str, shape: tuple[int, ...]) -> None:
        """Draw a parameter of another shape from the distribution of its values; keep one of that shape."""
        old = getattr(layer, name)
        if old is None or old.shape == shape:
            return
        inputs_before, inputs = prod(old.shape[1:]), prod(shape[1:])
        deviation = old.std(correction=0) * sqrt(inputs_before / inputs)
        new = torch.randn(shape, generator=self.generator, dtype=old.dtype) * deviation + old.mean()
        if old.ndim == 4 and not old.is_contiguous():
            new = new.contiguous(memory_format=torch.channels_last)
        setattr(layer, name, nn.Parameter(new))


def _is_projection(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and max(layer.stride) > 1
