import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

from netfission.utils.modes import trial_copy


class Counting(nn.Module):
    """Keeps what it has seen in tables that are empty at first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.seen: dict[int, Tensor] = {}
        self.same = self.seen
        self.shapes: set[torch.Size] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.seen[len(self.seen)] = images
        self.shapes.add(images.shape)
        result: Tensor = self.norm(images)
        return result


class Outer(fx.Tracer):
    """Follows no traced part."""

    def is_leaf_module(self, m: nn.Module, _: str) -> bool:
        return isinstance(m, fx.GraphModule)


def build(traced: bool) -> nn.Sequential:
    """Two parts, of which the second is a traced part within a traced part if `traced`."""
    rest: nn.Module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    if traced:
        outer = nn.Sequential(fx.symbolic_trace(rest))
        rest = fx.GraphModule(outer, Outer().trace(outer))
    return nn.Sequential(Counting(), rest)


def test_a_traced_part_with_a_graph_per_mode_keeps_its_own() -> None:
    class Noisy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.dropout(images, 0.5, self.training)

    extractor = create_feature_extractor(nn.Sequential(Noisy(), nn.Identity()), ["1"])
    trial_copy(extractor).eval()(torch.ones(4, 2))
    assert not torch.equal(extractor(torch.ones(1, 99))["1"], torch.ones(1, 99))


@pytest.mark.parametrize("traced", [False, True])
def test_a_trial_leaves_no_trace(traced: bool) -> None:
    network = build(traced)
    images = torch.randn(4, 2)
    before = copy.deepcopy(network.state_dict())
    trial = trial_copy(network)
    torch.manual_seed(0)
    logits = trial(images)
    trial[0].register_forward_hook(lambda *_: None)
    trial.eval()
    assert trial[0].seen is trial[0].same and len(trial[0].seen) == 1
    assert not network[0].seen and not network[0].shapes and not network[0]._forward_hooks
    assert all(part.training for part in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    moved = [name for name, tensor in trial.named_buffers() if not torch.equal(tensor, before[name])]
    assert len(moved) == 6  # of two batch norms
    torch.manual_seed(0)
    assert torch.equal(network(images), logits)
    pairs = zip(trial.named_parameters(), network.named_parameters(), strict=True)
    assert all(name == its_name and value is its for (name, value), (its_name, its) in pairs)


def test_a_traced_part_in_two_places_stays_one() -> None:
    within = build(traced=True)[1]
    network = nn.Sequential(within, within.get_submodule("0"))
    trial = trial_copy(network)
    assert trial[0].get_submodule("0") is trial[1]
    assert trial[1] is not network[1]
    images = torch.randn(4, 2)
    torch.manual_seed(0)
    logits = trial(images)
    torch.manual_seed(0)
    assert torch.equal(network(images), logits)
    assert int(network[1].get_submodule("1").num_batches_tracked) == 2


def test_a_traced_module_itself_is_copied() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    trial = trial_copy(traced)
    trial(torch.randn(4, 2))
    assert int(traced.get_submodule("1").num_batches_tracked) == 0
    assert int(trial.get_submodule("1").num_batches_tracked) == 1
