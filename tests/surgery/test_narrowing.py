import copy

import pytest
import torch
from timm.layers import Attention
from torch import Tensor, nn

from netfission.surgery import narrowing
from netfission.surgery.heads import heads_of
from netfission.surgery.narrowing import ScatteredNorm, fit, narrowed


def numbered(module: nn.Module) -> nn.Module:
    """Parameters and statistics with a value of its own in every place."""
    with torch.no_grad():
        for start, tensor in enumerate((*module.parameters(), *module.buffers())):
            if tensor.is_floating_point():
                tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) + 1000.0 * start)
    return module


def test_slices_are_those_asked_for_and_the_module_is_left_alone() -> None:
    module = numbered(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)))
    before = copy.deepcopy(module.state_dict())
    keep = torch.tensor([1, 4])
    rows = ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    narrow = narrowed(module, {name: {0: keep} for name in rows} | {"2.weight": {1: keep}})
    after = narrow.state_dict()
    for name in rows:
        assert torch.equal(after[name], before[name][keep]), name
    assert torch.equal(after["2.weight"], before["2.weight"][:, keep])
    assert torch.equal(after["2.bias"], before["2.bias"])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    first, norm, second = narrow.children()
    assert (first.out_channels, norm.num_features, second.in_channels) == (2, 2, 2)
    assert isinstance(narrow.get_parameter("0.weight"), nn.Parameter)
    assert narrow(torch.randn(1, 3, 5, 5)).shape == (1, 2, 3, 3)


@pytest.mark.parametrize("groups", [6, 3], ids=["depthwise", "grouped"])
def test_a_grouped_convolution_keeps_as_many_channels_a_group(groups: int) -> None:
    module = nn.Sequential(nn.Conv2d(6, 12, 3, groups=groups))
    keep = torch.arange(8)
    narrow = narrowed(module, {"0.weight": {0: keep}, "0.bias": {0: keep}})
    (layer,) = narrow.children()
    assert (layer.in_channels, layer.out_channels, layer.groups) == (4, 8, groups * 2 // 3)
    images = torch.randn(2, 6, 5, 5)
    assert torch.allclose(narrow(images[:, :4]), module(images)[:, :8], atol=1e-6)


def test_norms_of_several_channels() -> None:
    module = nn.ModuleDict(
        {"group": nn.GroupNorm(4, 8), "one": nn.GroupNorm(1, 8), "layer": nn.LayerNorm(8), "act": nn.PReLU(8)}
    )
    keep = {0: torch.arange(4)}
    narrow = narrowed(module, {name: keep for name, _ in module.named_parameters()})
    assert isinstance(narrow, nn.ModuleDict)
    assert (narrow["group"].num_groups, narrow["group"].num_channels) == (2, 4)
    assert narrow["one"].num_groups == 1
    assert narrow["layer"].normalized_shape == (4,)
    for layer in (narrow["group"], narrow["one"], narrow["act"]):
        assert layer(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)


def test_heads_of_an_attention() -> None:
    attention = Attention(dim=12, num_heads=3, qkv_bias=True).eval()
    assert heads_of(attention) == 3
    keep = torch.arange(4, 12)  # the second and the third head
    of_all = torch.cat([keep, 12 + keep, 24 + keep])
    narrow = narrowed(
        attention, {"qkv.weight": {0: of_all}, "qkv.bias": {0: of_all}, "proj.weight": {1: keep}}
    )
    assert (narrow.num_heads, narrow.head_dim) == (2, 4)
    tokens = torch.randn(2, 5, 12)
    with torch.no_grad():
        attention.proj.weight[:, :4] = 0  # the whole attention, deaf to the first head
        assert torch.allclose(narrow(tokens), attention(tokens), atol=1e-6)


def test_what_has_no_heads_to_divide() -> None:
    assert heads_of(nn.MultiheadAttention(8, 2)) is None
    assert heads_of(nn.Linear(2, 2)) is None


def test_memory_format_and_frozen_weights_stay_as_they_are() -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last)
    module.requires_grad_(False)
    weight = narrowed(module, {"0.weight": {0: torch.arange(4)}, "0.bias": {0: torch.arange(4)}})
    narrow = weight.get_parameter("0.weight")
    assert narrow.is_contiguous(memory_format=torch.channels_last) and not narrow.is_contiguous()
    assert not narrow.requires_grad


def test_fit_takes_the_widths_of_a_state_dict() -> None:
    def make(width: int, heads: int) -> nn.Sequential:
        attention = Attention(dim=8, num_heads=heads, attn_head_dim=4)
        return nn.Sequential(
            nn.Conv2d(3, width, 3),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 3, groups=width),
            nn.Conv2d(width, 8, 1),
            nn.Flatten(2),
            nn.Unflatten(1, (8,)),
            Turn(),
            attention,
        ).eval()

    trained, fresh = make(6, 1), make(10, 2)
    fit(fresh, {name: tensor.shape for name, tensor in trained.state_dict().items()})
    fresh.load_state_dict(trained.state_dict())
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(fresh(images), trained(images))


class Offset(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("offset", torch.arange(float(width)), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.offset


def test_what_is_left_of_a_constant_is_stored_with_the_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 6), Offset(6), nn.Linear(6, 2))
    kept = torch.tensor([1, 4])
    narrow = narrowed(
        model, {"0.weight": {0: kept}, "0.bias": {0: kept}, "1.offset": {0: kept}, "2.weight": {1: kept}}
    )
    state = narrow.state_dict()
    assert state["1.offset"].tolist() == [1, 4] and "1.offset" not in model.state_dict()
    fit(model, {name: tensor.shape for name, tensor in state.items()})
    model.load_state_dict(state)
    features = torch.randn(2, 3)
    assert torch.equal(model(features), narrow(features))


class Turn(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.transpose(1, 2)


def test_a_scattered_norm_adds_nothing_for_the_channels_it_lacks_and_is_fitted() -> None:
    module = numbered(nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1))).eval()
    keep = torch.tensor([1, 4])
    rows = ("0.weight", "0.bias", "0.running_mean", "0.running_var")
    narrow = narrowed(module, {name: {0: keep} for name in rows}, ["0"])
    features = torch.randn(3, 5, 2, 2)
    found = narrow.get_submodule("0")(features[:, keep])
    expected = module.get_submodule("0")(features)
    assert torch.equal(found[:, keep], expected[:, keep])
    assert not found[:, [0, 2, 3]].any()
    fresh = copy.deepcopy(module)
    fit(fresh, {name: tensor.shape for name, tensor in narrow.state_dict().items()})
    fresh.load_state_dict(narrow.state_dict())
    assert torch.equal(fresh(features[:, keep]), narrow(features[:, keep]))
    whole = narrowed(module, {}, ["0"])
    assert not any(isinstance(part, ScatteredNorm) for part in whole.modules())


def test_the_width_of_one_head_stays() -> None:
    module = nn.Module()
    module.head_dim = module.attn_head_size = module.all_head_size = module.dim = 8
    narrowing._set_sizes(module, {8: 4})
    assert (module.head_dim, module.attn_head_size, module.all_head_size, module.dim) == (8, 8, 4, 4)
