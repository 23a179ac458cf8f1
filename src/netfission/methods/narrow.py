"""Narrow branches with grouped convolutions: low-cost self-ensembles by another transformation (SEMBG)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import gcd, prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from netfission.config import MethodConfig
from netfission.methods.base import BuildPlan, Method
from netfission.surgery.backbone import cut, resolve_branches
from netfission.surgery.masks import check_plain_weights
from netfission.utils.modes import in_mode

_NARROWABLE = nn.Conv2d | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d


class NarrowBranches(nn.Module):
    """Early stages that run once, then branches side by side: images → logits `(batch, branches, classes)`.

    Args:
        shared: stem and early stages.
        branches: each the rest of the network and its head, features → logits `(batch, classes)`.
    """

    def __init__(self, shared: Sequence[nn.Module], branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.shared = nn.Sequential(*shared)
        self.branches = nn.ModuleList(branches)

    def forward(self, images: Tensor) -> Tensor:
        """Images → logits `(batch, branches, classes)`."""
        features = self.shared(images)
        return torch.stack([branch(features) for branch in self.branches], dim=1)


class NarrowMethod(Method):
    """SEMBG: multi-branch transformation and grouped convolution (H. Lee, J.-S. Lee, arXiv 2408.02307).

    The network is kept up to its first stage, which all branches read. After it each of the N branches is
    the rest of the network with g groups in its convolutions and every width multiplied by √(g / N), so that
    it takes 1 / N of the multiply-accumulates: a layer's are the product of its two widths over g. The
    branches have 1, 2, …, N groups, and learn from the labels and from their ensemble (temperature 3).

    Widths, groups and loss are those of the authors' code (github.com/hjdw2/SEMBG, wrn.py and
    train_SEMBG.py: groups 1, 2 and 3, shortcuts' projections without groups). Unlike there,

    - widths are rounded to the nearest multiple of g, not down;
    - the shared stage keeps its width, there rounded down to a multiple of all numbers of groups. A
      convolution that reads it has the largest number of groups that divides both g and that width;
    - projections of shortcuts are told by their being 1×1 with a stride above 1; linear layers before the
      last have widths multiplied by √(1 / N), since they take no groups; depthwise convolutions stay so;
    - a layer of another shape is drawn anew from the normal distribution with the mean and deviation of the
      model's own (deviation over √(inputs of a unit), so that its outputs vary as much); there it is He's
      over fan-out, as if there were no groups. A pretrained model's weights are used in the shared stage.

    With three branches it takes 1.04 (cifar-resnet18-w16), 1.05 (cifar-resnet18), 1.03 (wrn-28-10) and 1.11
    times (resnet50) the single network's multiply-accumulates: what is over goes to the projections and to
    the layers that read the shared stage at its full width.
    """

    settings = frozenset({"branch_groups", "branch_after", "stages"})
    distillation = 1.0

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        if config.branch_groups is not None and not (config.branch_groups and min(config.branch_groups) >= 1):
            raise ValueError(
                f"branch_groups={config.branch_groups}: takes whole numbers from 1, one a branch"
            )

    def build(self, plan: BuildPlan) -> nn.Module:
        """`NarrowBranches` of the model.

        Raises:
            ValueError: a setting is not what it takes, or the model has layers that cannot be narrowed.
        """
        fission = plan.fission
        groups = (
            list(range(1, fission.exits + 1))
            if self.config.branch_groups is None
            else self.config.branch_groups
        )
        if fission.exits < 2:
            raise ValueError(f"exits={fission.exits}: method=narrow takes 2 branches or more")
        if len(groups) != fission.exits:
            raise ValueError(f"branch_groups={groups}: takes {fission.exits} numbers, one a branch")
        if fission.sparsity > 0:
            raise ValueError(f"sparsity={fission.sparsity}: method=narrow takes 0, as it does not prune")
        if fission.ratio is not None:
            raise ValueError(
                f"ratio={fission.ratio}: does not go with method=narrow; its branches cost alike"
            )
        backbone = cut(plan.create(fission.seed), plan.example, fission.stages)
        together = [1] * (fission.exits - 1)
        after, *others = resolve_branches(
            together if fission.branch_after is None else fission.branch_after,
            fission.exits,
            backbone.stage_names,
        )
        if others and set(others) != {after}:
            raise ValueError(
                f"branch_after={fission.branch_after}: method=narrow takes the same stage for all branches"
            )
        check_plain_weights(backbone)
        shared = nn.Sequential(backbone.stem, *backbone.stages[:after])
        rest = nn.Sequential(*backbone.stages[after:], backbone.head)
        _refuse_others(rest)
        with in_mode(shared, training=False), torch.no_grad():
            features = shared(plan.example)
        generator = torch.Generator().manual_seed(fission.seed)
        return NarrowBranches(
            list(shared), [_branch(rest, features, number, fission.exits, generator) for number in groups]
        )


def _refuse_others(module: nn.Module) -> None:
    """Refuse layers whose widths are not understood."""
    for path, layer in module.named_modules():
        name = path.partition(".")[2]  # without the number of the part that holds it
        own = [*layer._parameters.values(), *layer._buffers.values()]
        if any(tensor is not None for tensor in own) and not isinstance(layer, _NARROWABLE):
            raise ValueError(
                f"method=narrow: layer {name!r} ({type(layer).__name__}) cannot be narrowed; takes models of "
                "convolutions, batch norms and linear layers"
            )
        if isinstance(layer, nn.Conv2d) and layer.groups > 1 and not _is_depthwise(layer):
            raise ValueError(
                f"method=narrow: layer {name!r} has {layer.groups} groups already; takes convolutions of one "
                "group or depthwise ones"
            )


def _is_depthwise(layer: nn.Conv2d) -> bool:
    return 1 < layer.groups == layer.in_channels


@torch.no_grad()
def _branch(
    rest: nn.Module, features: Tensor, groups: int, branches: int, generator: torch.Generator
) -> nn.Module:
    """One branch: `rest` with other widths, which it finds by running.

    Each layer learns the width of its input from what arrives, and its own width follows from what it was:
    so widths that must agree do, or the run fails and the model is refused.
    """
    branch = copy.deepcopy(rest)
    sizing = _Sizing(groups, branches, _last_layer(rest, features), generator)
    layers = [(path, layer) for path, layer in branch.named_modules() if isinstance(layer, _NARROWABLE)]
    hooks = [layer.register_forward_pre_hook(partial(sizing.fit, path)) for path, layer in layers]
    try:
        with in_mode(branch, training=False):
            branch(features.clone())
    except Exception as error:  # whatever an operation says of shapes that do not meet
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"method=narrow: the model's layers do not fit one another at other widths ({reason}); takes "
            "models whose widths follow from their layers alone"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return branch


def _last_layer(rest: nn.Module, features: Tensor) -> str:
    """The name of the layer that gives the logits: the last one with weights to run."""
    ran: list[str] = []

    def note(name: str, *_: Any) -> None:
        ran.append(name)

    layers = [(path, m) for path, m in rest.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_pre_hook(partial(note, path)) for path, layer in layers]
    with in_mode(rest, training=False):
        rest(features.clone())
    for hook in hooks:
        hook.remove()
    return ran[-1]


@dataclass(frozen=True)
class _Sizing:
    """Gives the layers of a branch their widths as they run.

    Attributes:
        groups: of its convolutions.
        branches: how many there are.
        last: the layer whose width is the number of classes.
        generator: what new weights are drawn from.
        done: the layers that have their widths; one that runs twice gets them once.
    """

    groups: int
    branches: int
    last: str
    generator: torch.Generator
    done: set[str] = field(default_factory=set)

    def fit(self, path: str, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        """Before a layer runs: make it one for the input that has arrived."""
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
        """A width times √(groups / branches), as the nearest multiple of the groups above 0."""
        return groups * max(1, round(width * sqrt(groups / self.branches) / groups))

    def _draw(self, layer: nn.Module, name: str, shape: tuple[int, ...]) -> None:
        """Give a parameter another shape, its values drawn as the old ones lie; one of that shape stays."""
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
