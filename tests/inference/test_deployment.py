import copy
import pickle
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import Tensor, nn

import netfission as nf
from netfission.inference.deployment import Deployed, deploy, deploy_exits
from netfission.inference.deployment.convolution import ACTIVATIONS, FusedConv2d
from netfission.inference.deployment.folding import SamePadding, folded, layer_of
from netfission.models import create_model
from netfission.network import ExitPath, FissionNetwork
from netfission.profiling.macs import count_macs
from netfission.surgery.masks import apply_masks

CLASSES = 7


def images(batch: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def with_statistics(network: nn.Module) -> Any:
    """Norms and biases as training leaves them, so that a wrong fold shows."""
    generator = torch.Generator().manual_seed(1)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor, low, high in (
                (layer.running_mean, -0.3, 0.3),
                (layer.running_var, 0.5, 2.0),
                (layer.weight, 0.5, 1.5),
                (layer.bias, -0.3, 0.3),
            ):
                assert tensor is not None
                tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return network


def model_of(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, CLASSES)


@cache
def fissioned(
    name: str = "cifar-resnet18-w16",
    size: int = 16,
    exits: int = 3,
    grouping: str = "channels",
    **settings: Any,
) -> FissionNetwork:
    return divided(model_of(name), size, exits, grouping, **settings)


def divided(model: nn.Module, size: int, exits: int, grouping: str, **settings: Any) -> FissionNetwork:
    net = nf.fission(model, exits, grouping=grouping, example_input=images(2, size), **settings)
    return with_statistics(net)  # type: ignore[no-any-return]


@torch.no_grad()
def assert_equal(
    deployed: nn.Module,
    network: nn.Module,
    size: int,
    batches: tuple[int, ...] = (1, 3, 8),
    tolerance: float = 1e-4,
) -> None:
    network = copy.deepcopy(network).eval()
    for batch in batches:
        expected = network(images(batch, size, seed=batch))
        largest = max(1.0, expected.abs().max().item())
        logits = deployed(images(batch, size, seed=batch))
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * largest)


FAMILIES = {
    "timm/resnet18": "channels",
    "torchvision/resnet18": "copies",
    "timm/resnet50": "channels",
    "timm/convnext_atto": "channels",
    "timm/mobilenetv3_small_100": "channels",
    "timm/efficientnet_b0": "weights",
    "timm/regnety_002": "weights",
    "torchvision/densenet121": "weights",
    "timm/vit_tiny_patch16_224": "channels",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_networks_in_eval_mode_at_any_batch_size(
    name: str, small_model: Callable[[str, int], nn.Module]
) -> None:
    size = 64 if "vit" in name else 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_model(name, CLASSES)
    net = divided(model, size, 2, FAMILIES[name])
    assert_equal(deploy(net, images(2, size), joined=True), net, size)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("grouping", ["weights", "copies", "channels"])
@pytest.mark.parametrize("name", ["cifar-resnet18-w16", "wrn-10-1"])
def test_every_grouping_deploys(name: str, grouping: str, joined: bool) -> None:
    net = fissioned(name, grouping=grouping)
    assert_equal(deploy(net, images(2, 16), joined=joined), net, 16)


@pytest.mark.parametrize("branch_after", [(), (1,), (2,), (1, 2), (2, 1), (1, 1), (2, 2, 1, 1)])
def test_every_layout_of_branches_deploys(branch_after: tuple[int, ...]) -> None:
    net = fissioned("wrn-10-1", 8, len(branch_after) + 1, "copies", branch_after=branch_after)
    assert_equal(deploy(net, images(2, 8), joined=True), net, 8, (3,))
    assert_equal(deploy(net, images(2, 8), joined=False), net, 8, (3,))
    assert_equal(deploy_exits(net, images(2, 8)), net, 8, (3,))


@pytest.mark.parametrize(("exits", "linear"), [(3, (1, 4)), (3, (2, 3, 3)), (1, (2,))])
def test_linear_exits_deploy_beside_paths_that_are_joined(exits: int, linear: tuple[int, ...]) -> None:
    net = fissioned(exits=exits, linear_exits=linear)
    joined = deploy(net, images(2, 16), joined=True)
    assert_equal(joined, net, 16)
    assert_equal(deploy(net, images(2, 16), joined=False), net, 16)
    assert_equal(deploy_exits(net, images(2, 16)), net, 16)
    assert len(layers_of(joined, FusedConv2d)) == 20  # as without linear exits


def test_unequal_paths_deploy() -> None:
    net = fissioned(ratio=(3, 2, 1))
    assert_equal(deploy(net, images(2, 16), joined=True), net, 16)


def layers_of(module: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, kind)]


def test_a_joined_resnet_makes_no_more_calls_than_the_single_network_but_one_copy() -> None:
    single = deploy(fissioned(exits=1), images(2, 16))
    joined = deploy(fissioned(exits=3), images(2, 16), joined=True)
    apart = deploy(fissioned(exits=3), images(2, 16), joined=False)
    assert len(layers_of(single, FusedConv2d)) == 20 == len(layers_of(joined, FusedConv2d))
    assert len(layers_of(apart, FusedConv2d)) == 5 + 2 * 5 + 3 * 5 + 3 * 5
    calls = Counter(str(node.target).rpartition(".")[2] for node in joined.layers.graph.nodes)
    assert not layers_of(joined, nn.BatchNorm2d)
    assert not {"add", "relu", "iadd", "relu_"} & calls.keys()
    # Two paths' features become three's at one place: exit 2 starts from exit 0's.
    assert sum(node.target is torch.cat for node in joined.layers.graph.nodes) == 1


def test_residuals_are_written_over_only_where_they_are_not_read_again() -> None:
    joined = deploy(fissioned(), images(2, 16), joined=True)
    additions = [
        node for node in joined.layers.graph.nodes if node.op == "call_module" and len(node.args) == 2
    ]
    assert len(additions) == 8
    assert all(joined.layers.get_submodule(node.target).overwrites for node in additions)


@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(5, 12), st.integers(5, 12)),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.sampled_from([1, 2, (2, 3)]),
    dilation=st.sampled_from([1, (2, 1)]),
)
def test_a_convolution_that_pads_by_itself_becomes_a_padding_and_takes_its_norm(
    size: tuple[int, int], kernel: int, stride: Any, dilation: Any
) -> None:
    layer = Conv2dSame(2, 4, kernel, stride, dilation=dilation, groups=2)
    part = with_statistics(nn.Sequential(layer, nn.BatchNorm2d(4))).eval()
    features = torch.randn(3, 2, *size)
    graph = folded(part, features)
    torch.testing.assert_close(graph(features), part(features), rtol=1e-4, atol=1e-5)
    kinds = [type(layer_of(graph, node)) for node in graph.graph.nodes if node.op == "call_module"]
    assert kinds == [SamePadding, FusedConv2d]


class NormOfVectors(nn.Module):
    """A linear layer and a norm that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(self.linear(x), norm.running_mean, norm.running_var, norm.weight, norm.bias)


def test_a_linear_layer_takes_a_norm_that_is_a_function() -> None:
    part = with_statistics(NormOfVectors()).eval()
    features = torch.randn(3, 4)
    graph = folded(part, features)
    torch.testing.assert_close(graph(features), part(features))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]


class Awkward(nn.Module):
    """What folding and fusing must leave alone, a line each."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once, self.both, self.tanh, self.wide, self.sum = (
            nn.Conv2d(4, 4, 3, padding=1) for _ in range(6)
        )
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(4, 4, 3, padding="same")
        self.norm, self.norm_of_same, self.norm_of_sum = (nn.BatchNorm2d(4) for _ in range(3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.twice(F.relu(self.twice(x))))  # a convolution that is called twice
        first = self.once(x)
        x = F.relu(self.norm(first)) + first  # one that is read twice, and a norm that is called twice
        x = F.hardswish(torch.sigmoid(self.both(x))) + x  # two activations
        x = F.gelu(self.tanh(9 * x), approximate="tanh") + self.norm_of_sum(x + 1)
        x = self.wide(x) + x.mean(dim=(2, 3), keepdim=True)  # a sum of two shapes
        x = F.relu6(self.sum(x) + x)  # an activation that oneDNN cannot fuse after a sum
        x = torch.add(self.reflect(x), self.norm_of_same(self.same(x)), alpha=2)
        return F.dropout(self.drop(x), 0.5, self.training) / 2


class KeepsResidual(nn.Module):
    """Residuals that are read once more after the sum, as they are and as a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Conv2d(4, 4, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.relu(self.second(x) + x) + x
        x = self.third(x)
        view = x.transpose(2, 3)
        return (self.fourth(x) + x) * view


class ReadsResidual(nn.Module):
    """A convolution whose residual is its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.second(x)


class DependsOnData(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.sum() > 0 else self.norm(self.conv(-x))


class Mixes(nn.Module):
    """On joined channels it would mix the paths."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.gate = nn.Conv2d(4, 1, 1)
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.kind == "gate":
            return x * self.gate(x).sigmoid()
        if self.kind == "mean":
            return x.mean(1).flatten(1)
        if self.kind == "flatten":
            return x.flatten(0, 1)
        if self.kind == "linear":
            return self.linear(x)
        if self.kind == "scale":
            return (x * self.scale).relu()
        if self.kind == "half":
            both = torch.cat([x, -x], 1)
            return both[:, : both.shape[1] // 2]
        if self.kind == "transposed":
            return x * x.mT.mT
        return torch.cat([x, x.roll(1, 1)], 1)[:, ::2]


def network_of(*stages: nn.Module, to_maps: nn.Module | None = None) -> FissionNetwork:
    """Exits that part after the stem, each with one of the stages."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    heads = [nn.Sequential(to_maps or nn.Identity(), *copy.deepcopy(head)) for _ in stages]
    stem = nn.Conv2d(3, 4, 3, padding=1)
    paths = [ExitPath([stage], head) for stage, head in zip(stages[1:], heads[1:], strict=True)]
    paths = [ExitPath([nn.Identity(), stages[0]], heads[0]), *paths]
    return with_statistics(  # type: ignore[no-any-return]
        FissionNetwork(stem, paths, [1] * (len(stages) - 1), ["first", "second"])
    )


@pytest.mark.parametrize("stage", [Awkward, KeepsResidual, ReadsResidual, DependsOnData])
def test_what_cannot_be_folded_or_fused_is_kept(stage: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = network_of(stage(), stage())
    whole = [deploy(net, images(2, 4), joined=joined) for joined in (True, False)]
    for deployed in (*whole, deploy_exits(net, images(2, 4))):
        assert_equal(deployed, net, 4, tolerance=3e-6)


@pytest.mark.parametrize("kind", ["gate", "mean", "flatten", "linear", "roll", "half", "transposed", "scale"])
def test_what_would_mix_the_paths_runs_apart(kind: str) -> None:
    torch.manual_seed(0)
    to_maps = {"mean": nn.Unflatten(1, (4, 2, 2)), "flatten": nn.Unflatten(0, (-1, 4))}
    net = network_of(Mixes(kind), Mixes(kind), to_maps=to_maps.get(kind))
    deployed = deploy(net, images(2, 4), joined=True)
    assert_equal(deployed, net, 4)
    assert all(node.users or node.op == "output" for node in deployed.layers.graph.nodes)


class Flattens(nn.Sequential):
    """Flattens its maps by a function that keeps the paths apart."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(1).relu()


def test_maps_of_all_paths_are_flattened_at_once() -> None:
    torch.manual_seed(0)
    net = network_of(Flattens(), Flattens(), to_maps=nn.Unflatten(1, (4, 4, 4)))
    deployed = deploy(net, images(2, 4), joined=True)
    assert_equal(deployed, net, 4)
    assert [node.target for node in deployed.layers.graph.nodes].count("flatten") == 1


def test_a_stage_that_copies_its_input_by_a_hook_still_does() -> None:
    def copy_input(_stage: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0].clone()

    stages = [nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)) for _ in range(2)]
    for stage in stages:
        stage.register_forward_pre_hook(copy_input)
    net = network_of(*stages, nn.Conv2d(4, 4, 1))
    assert_equal(deploy(net, images(2, 4), joined=False), net, 4)


def test_a_network_in_train_mode_is_deployed_in_eval_mode_and_left_as_it_is() -> None:
    net = copy.deepcopy(fissioned()).train()
    before = copy.deepcopy(net.state_dict())
    for deployed in (deploy(net, images(2, 16)), deploy_exits(net, images(2, 16))):
        assert not any(part.training for part in deployed.modules())
        assert_equal(deployed, net, 16)
    assert all(part.training for part in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_masks_are_burnt_in() -> None:
    net = fissioned(grouping="weights", sparsity=0.5, criterion="magnitude")
    zeros = sum(int((parameter == 0).sum()) for parameter in net.parameters())
    for deployed in (deploy(net, images(2, 16), joined=True), deploy_exits(net, images(2, 16))):
        assert all(buffer.dtype is not torch.bool for buffer in deployed.buffers())
        assert sum(int((parameter == 0).sum()) for parameter in deployed.parameters()) == zeros


def test_masks_of_layers_that_stay_as_they_are_are_burnt_in() -> None:
    net = network_of(nn.Linear(4, 4), nn.Linear(4, 4))
    apply_masks(net, {"paths.0.stages.1.weight": torch.eye(4, dtype=torch.bool)})
    deployed = deploy(net, images(2, 4))
    assert_equal(deployed, net, 4)
    assert all(buffer.dtype is not torch.bool for buffer in deployed.buffers())


def test_deployed_is_for_inference_only() -> None:
    deployed = deploy(fissioned(), images(2, 16), joined=False)
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    assert deployed.eval() is deployed
    with pytest.raises(
        ValueError,
        match=r"^mode must be False, as .* is for inference only, got True; train the network",
    ):
        deployed.train()
    with pytest.raises(ValueError, match=r"^mode must be False, "):
        deploy_exits(fissioned(), images(2, 16)).train()


@torch.no_grad()
def test_copies_and_pickles_give_the_same_logits() -> None:
    deployed = deploy(fissioned(), images(2, 16))
    expected = deployed(images(3, 16))
    for other in (copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))):
        torch.testing.assert_close(other(images(3, 16)), expected)
        with pytest.raises(ValueError, match=r"^mode must be False, "):
            other.train()


@pytest.mark.parametrize("assign", [True, False])
@torch.no_grad()
def test_another_state_is_used_once_loaded(assign: bool) -> None:
    deployed, other = (deploy(fissioned(seed=seed), images(2, 16), joined=True) for seed in (0, 1))
    expected = other(images(3, 16))
    assert (deployed(images(3, 16)) - expected).abs().max() > 1e-3
    deployed.load_state_dict(other.state_dict(), assign=assign)
    torch.testing.assert_close(deployed(images(3, 16)), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_deployed_moves_to_other_types(dtype: torch.dtype) -> None:
    deployed = deploy(fissioned(), images(2, 16), joined=True)
    expected = deployed(images(3, 16))
    logits = deployed.to(dtype)(images(3, 16).to(dtype))
    assert logits.dtype is dtype
    precision = 1e-4 if dtype is torch.float64 else 0.05 * expected.abs().max().item()
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=precision)


def test_deployed_exports_with_any_batch_size() -> None:
    deployed = deploy(fissioned(), images(2, 16), joined=True)
    exported = torch.export.export(
        deployed, (images(2, 16),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    torch.testing.assert_close(exported.module()(images(5, 16)), deployed(images(5, 16)))


def test_gradients_of_images_are_the_networks() -> None:
    net = copy.deepcopy(fissioned()).eval()
    given = images(2, 16).requires_grad_()
    (expected,) = torch.autograd.grad(net(given).square().sum(), given)
    (gradient,) = torch.autograd.grad(deploy(net, images(2, 16))(given).square().sum(), given)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def test_deployed_in_inference_mode_it_serves_outside() -> None:
    net = fissioned()
    with torch.inference_mode():
        deployed = deploy(net, images(2, 16))
        deployed(images(1, 16))
    assert_equal(deployed, net, 16)
    deployed(images(1, 16).requires_grad_()).sum().backward()
    with torch.inference_mode():
        assert_equal(copy.deepcopy(deployed), net, 16)


def test_deployed_costs_the_networks_multiply_accumulates() -> None:
    net = fissioned()
    deployed = deploy(net, images(2, 16), joined=True)
    assert count_macs(deployed, images(1, 16)).dense == count_macs(net, images(1, 16)).dense


@torch.no_grad()
def test_exits_run_one_by_one() -> None:
    net = copy.deepcopy(fissioned(grouping="weights")).eval()
    exits = deploy_exits(net, images(2, 16))
    assert isinstance(exits, FissionNetwork)
    assert exits.branch_after == net.branch_after
    assert not layers_of(exits, nn.BatchNorm2d)
    assert all(isinstance(part, Deployed) for path in exits.paths for part in (*path.stages, path.head))
    features = exits.paths[0].stages[0](exits.stem(images(3, 16)))
    torch.testing.assert_close(exits.paths[1](features), net(images(3, 16))[:, 1])


@pytest.mark.parametrize("made", [deploy, deploy_exits])
def test_images_that_the_network_does_not_take_are_refused(made: Any) -> None:
    net = fissioned()
    for wrong in (torch.zeros(2, 1, 16, 16), images(2, 16).double()):
        with pytest.raises(
            ValueError, match=r"^example_input must be accepted by the network, got .* of shape .* \("
        ):
            made(net, wrong)
    with pytest.raises(ValueError, match=r"^example_input must be at least one image, got shape \(0, "):
        made(net, images(0, 16))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


@pytest.mark.parametrize("made", [deploy, deploy_exits])
def test_logits_that_cannot_be_repeated_are_refused(made: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"^network must be a network that gives equal, .* got logits that spread over .* and differ by",
    ):
        made(network_of(Noise(), Noise()), images(2, 4))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("made", [deploy, deploy_exits])
def test_logits_are_compared_relative_to_their_spread(
    made: Any, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = copy.deepcopy(fissioned("wrn-10-1", 8))
    with torch.no_grad():
        for path in net.exit_paths:
            for parameter in path.head.parameters():
                parameter.mul_(scale)
    made(net, images(2, 8))
    plain = folded

    def off_by_a_thousandth(part: nn.Module, features: Tensor) -> Any:
        with torch.no_grad():
            for layer in layers_of(part, nn.Linear):
                layer.weight.mul_(1.001)
        return plain(part, features)

    monkeypatch.setattr("netfission.inference.deployment.deployed.folded", off_by_a_thousandth)
    with pytest.raises(ValueError, match=r"^network must be .* and differ by .* when deployed$"):
        made(net, images(2, 8))


def test_logits_that_differ_from_their_mean_by_rounding_alone_deploy() -> None:
    net = copy.deepcopy(fissioned("wrn-10-1", 8))
    with torch.no_grad():
        for path in net.exit_paths:
            path.head.get_parameter("fc.weight").mul_(1e-3)
            path.head.get_parameter("fc.bias").fill_(1e3)
    assert_equal(deploy(net, images(2, 8)), net, 8)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("groups", [1, 2, 6])
@torch.no_grad()
def test_a_fused_convolution_is_the_plain_sequence(groups: int, activation: str | None) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=groups)
    fused = FusedConv2d.like(plain, plain.weight, plain.bias)
    fused.activation = activation
    reference = copy.deepcopy(fused).double()
    for batch in (1, 3):
        features = torch.randn(batch, 6, 9, 9)
        torch.testing.assert_close(fused(features), reference(features.double()).float())
        if activation in (None, "relu"):
            residual = torch.randn(batch, 12, 5, 5)
            expected = reference(features.double(), residual.double()).float()
            kept = residual.clone()
            torch.testing.assert_close(fused(features, residual), expected)
            assert torch.equal(residual, kept)
            fused.overwrites = True
            torch.testing.assert_close(fused(features, residual), expected)
            fused.overwrites = False


def test_paddings_of_equal_text_do_the_same() -> None:
    layers = [nn.Conv2d(1, 1, size, stride=stride) for size, stride in ((3, 1), (3, 2), (5, 1))]
    assert len({repr(SamePadding(layer)) for layer in layers}) == 3


@pytest.mark.parametrize("channels", [16, 64, 96])
def test_a_weight_is_reordered_as_onednn_wants_it_for_each_batch_and_held_once_a_layout(
    channels: int,
) -> None:
    layer = FusedConv2d.like(
        nn.Conv2d(channels, channels, 3, padding=1), torch.randn(channels, channels, 3, 3), None
    )
    onednn = torch.ops.mkldnn

    def layout(weight: torch.Tensor) -> bytes:
        return bytes(onednn._get_mkldnn_serialized_md(weight).tolist())

    wanted = {}
    for size in (2, 1, 5, 1, 2):
        features = torch.randn(size, channels, 8, 8).contiguous(memory_format=torch.channels_last)
        layer(features)
        assert layer._reordered is not None and features.shape in layer._reordered.by_shape
        settings = layer.padding, layer.stride, layer.dilation, layer.groups, features.shape
        wanted[size] = layout(onednn._reorder_convolution_weight(layer.weight, *settings))
        assert layout(layer._weight_for(features)) == wanted[size]
    assert set(layer._reordered.by_layout) == set(wanted.values())
    held = {id(weight) for weight in layer._reordered.by_shape.values()}
    assert len(held) == len(set(wanted.values()))
