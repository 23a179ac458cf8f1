import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netfission.models import create_model
from netfission.models.cifar_resnet import BasicBlock
from netfission.profiling.macs import macs_by_weight
from netfission.surgery import channel_flow
from netfission.surgery.channel_flow import Flow
from netfission.surgery.coupling import (
    MIXED,
    ON_INTERFACE,
    Coupling,
    find_coupling,
    kept_indices,
    scattered_norms,
)
from netfission.surgery.narrowing import narrowed

FEATURES = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seeded() -> object:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def layers(coupling: Coupling) -> dict[str, int]:
    return {group.layer: group.units for group in coupling.groups}


def without_units(coupling: Coupling, stage: nn.Module, keep: int) -> nn.Module:
    kept = [torch.arange(group.units) >= group.units - keep for group in coupling.groups]  # the last ones
    return narrowed(stage, kept_indices(coupling.groups, kept))


def test_the_inner_channels_of_residual_blocks_and_nothing_else() -> None:
    stage = nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 16, 1))
    before = copy.deepcopy(stage.state_dict())
    coupling = find_coupling(stage, FEATURES)
    assert layers(coupling) == {"0.conv1": 16, "1.conv1": 16}
    assert coupling.undivided == {"0.shortcut.0.weight": ON_INTERFACE}
    held = {(part.tensor, part.dim) for part in coupling.groups[0].slices}
    assert held == {
        ("0.conv1.weight", 0),
        *((f"0.bn1.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var")),
        ("0.conv2.weight", 1),
    }
    assert all(torch.equal(part.units, torch.arange(16)) for part in coupling.groups[0].slices)
    assert all(torch.equal(value, before[name]) for name, value in stage.state_dict().items())
    assert not any(parameter.grad is not None for parameter in stage.parameters())


def test_macs_of_each_weight() -> None:
    stage = nn.Sequential(nn.Conv2d(8, 4, 3, 2, 1, bias=False), nn.Conv2d(4, 8, 3, 1, 1, groups=4))
    assert macs_by_weight(stage, FEATURES) == {"0.weight": 9 * 8 * 4 * 9, "1.weight": 9 * 8 * 1 * 9}


class Branches(nn.Module):
    """Two branches side by side, then one layer that reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 1)
        self.both = nn.Conv2d(10, 8, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.both(torch.cat([self.left(features), self.right(features)], 1).relu())


def test_channels_that_are_concatenated() -> None:
    stage = Branches()
    coupling = find_coupling(stage, FEATURES)
    assert layers(coupling) == {"left": 4, "right": 6}
    narrow = without_units(coupling, stage, keep=2)
    with torch.no_grad():
        stage.both.weight[:, [0, 1, 4, 5, 6, 7]] = 0
        assert torch.allclose(narrow(FEATURES), stage(FEATURES), atol=1e-6)
    assert narrow.get_parameter("both.weight").shape == (8, 4, 1, 1)


class Inverted(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self, groups: int = 12) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.spatial = nn.Conv2d(12, 12, 3, padding=1, groups=groups)
        self.squeeze, self.excite = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.project = nn.Conv2d(12, 8, 1)

    def forward(self, features: Tensor) -> Tensor:
        inner = self.spatial(self.norm(self.expand(features)).relu()).relu()
        gate = self.excite(self.squeeze(inner.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return features + self.project(inner * gate)


def test_depthwise_and_squeeze_excite_layers_follow_their_group() -> None:
    stage = Inverted()
    coupling = find_coupling(stage, FEATURES)
    assert layers(coupling) == {"expand": 12, "squeeze": 3}
    narrow = without_units(coupling, stage.eval(), keep=3)
    shapes = {name: tuple(parameter.shape[:2]) for name, parameter in narrow.named_parameters()}
    assert shapes["spatial.weight"] == (3, 1)
    assert shapes["squeeze.weight"] == (3, 3)
    assert shapes["excite.weight"] == (3, 3)
    assert narrow(FEATURES).shape == FEATURES.shape


def test_a_grouped_convolution_is_divided_by_its_groups() -> None:
    stage = Inverted(groups=3)
    coupling = find_coupling(stage, FEATURES)
    assert sorted(group.units for group in coupling.groups) == [3, 3]
    (group,) = (group for group in coupling.groups if group.layer == "expand")
    units = {part.tensor: part.units for part in group.slices}
    assert units["expand.weight"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(units["spatial.weight"], units["expand.weight"])
    narrow = without_units(coupling, stage, keep=2)
    assert narrow.spatial.groups == 2
    assert narrow(FEATURES).shape == FEATURES.shape


class Normed(nn.Sequential):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__(nn.Conv2d(8, 12, 1), norm, nn.ReLU(), nn.Conv2d(12, 8, 1))


def test_group_norm_is_divided_by_its_groups_and_a_norm_over_all_channels_by_channel() -> None:
    assert [group.units for group in find_coupling(Normed(nn.GroupNorm(4, 12)), FEATURES).groups] == [4]
    assert [group.units for group in find_coupling(Normed(nn.GroupNorm(1, 12)), FEATURES).groups] == [12]


def test_a_norm_over_positions_too_stays_whole() -> None:
    coupling = find_coupling(Normed(nn.LayerNorm([12, 6, 6])), FEATURES)
    assert coupling.groups == ()
    assert coupling.undivided == dict.fromkeys(("0.weight", "3.weight"), ON_INTERFACE)


def test_a_batch_norm_over_tokens_leaves_the_hidden_units_of_each() -> None:
    stage = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(12, 8))
    assert layers(find_coupling(stage, torch.randn(2, 5, 8))) == {"0": 12}


@pytest.mark.parametrize("pool", [nn.AvgPool3d(2), nn.AdaptiveAvgPool3d(2), nn.MaxPool3d(2)], ids=repr)
def test_pools_of_volumes_leave_channels_alone(pool: nn.Module) -> None:
    stage = nn.Sequential(nn.Conv3d(3, 12, 1), pool, nn.Conv3d(12, 3, 1))
    assert layers(find_coupling(stage, torch.randn(1, 3, 4, 4, 4))) == {"0": 12}


def test_channels_that_code_normalises_by_groups_are_divided_by_these() -> None:
    class UnitLength(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            groups = features.unflatten(1, (-1, 4))
            return (groups / groups.square().sum(-3, keepdim=True).sqrt()).flatten(1, 2)

    (group,) = find_coupling(Normed(UnitLength()), FEATURES).groups
    assert group.slices[0].units.tolist() == [0] * 4 + [1] * 4 + [2] * 4


class Mixing(nn.Module):
    """Channels that do not act one by one: what one gives depends on its place among the others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.free = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, features: Tensor) -> Tensor:
        mixed = self.outer(F.softmax(self.inner(features), 1))
        return mixed + self.last(self.free(features).relu())


def test_channels_that_depend_on_one_another_stay_whole() -> None:
    coupling = find_coupling(Mixing(), FEATURES)
    assert layers(coupling) == {"free": 8}
    assert coupling.undivided["inner.weight"] == "its channels do not act one by one"
    assert "outer.weight" in coupling.undivided


def test_attention_is_divided_by_heads_and_relative_positions_follow() -> None:
    model = create_model("timm/swin_tiny_patch4_window7_224", 5, in_channels=3)
    block = model.layers[0].blocks[0]
    features = torch.randn(1, 14, 14, 96)
    coupling = find_coupling(block, features)
    assert layers(coupling) == {"attn.qkv": 3, "mlp.fc1": 384}
    heads = coupling.groups[0]
    assert {(part.tensor, part.dim) for part in heads.slices} == {
        ("attn.qkv.weight", 0),
        ("attn.qkv.bias", 0),
        ("attn.relative_position_bias_table", 1),
        ("attn.proj.weight", 1),
    }
    narrow = without_units(coupling, block.eval(), keep=2)
    assert narrow.attn.num_heads == 2
    with torch.no_grad():
        block.attn.proj.weight[:, :32] = 0
        block.mlp.fc2.weight[:, :-2] = 0
        assert torch.allclose(narrow(features), block(features), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_precision_does_not_change_what_is_divided(dtype: torch.dtype) -> None:
    model = create_model("timm/vit_tiny_patch16_224", 5, in_channels=3)
    block = model.blocks[0]
    features = torch.randn(1, 5, 192)
    expected = find_coupling(block, features)
    assert layers(expected) == {"attn.qkv": 3, "mlp.fc1": 768}
    coupling = find_coupling(block.to(dtype), features.to(dtype))
    assert layers(coupling) == layers(expected)
    assert coupling.undivided == expected.undivided
    assert {parameter.dtype for parameter in block.parameters()} == {dtype}


def test_torch_attention_is_divided_by_heads_and_carries_its_whole_cost() -> None:
    stage = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    coupling = find_coupling(stage, torch.randn(2, 5, 8))
    projections, products, mlp = 4 * 5 * 8 * 8, 2 * 5 * 5 * 8, 2 * 5 * 8 * 16
    macs = macs_by_weight(stage, torch.randn(2, 5, 8))
    assert macs["self_attn.in_proj_weight"] == projections + products
    assert sum(macs.values()) == projections + products + mlp
    assert layers(coupling) == {"self_attn": 2, "linear1": 16}


class _CutUp(nn.Module):
    """A residual block whose inner channels are halved, and put together again by `mix`."""

    def __init__(self, mix: Callable[[Tensor, Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.plain = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 1))
        self.mix = mix

    def forward(self, features: Tensor) -> Tensor:
        inner = self.first(features)
        features = features + self.last(torch.cat(self.mix(*inner.chunk(2, 1)), 1))
        return features + self.plain(features)


@pytest.mark.parametrize(
    ("mix", "first"),
    [
        (lambda u, v: [v, u], None),  # unequal pieces of a narrower layer would be put together wrongly
        (lambda u, v: [u * v.sigmoid(), v], 8),
        (lambda u, v: [torch.fft.fft(u, dim=1).real, v], None),
    ],
    ids=["swapped", "gated", "transformed"],
)
def test_halves_of_a_layer(mix: Callable[[Tensor, Tensor], list[Tensor]], first: int | None) -> None:
    stage = _CutUp(mix)
    coupling = find_coupling(stage, FEATURES)
    assert layers(coupling) == ({"first": first} if first else {}) | {"plain.0": 12}
    if first:
        assert coupling.groups[0].slices[0].units.tolist() == list(range(8)) * 2
        narrow = without_units(coupling, stage, keep=5)
        assert narrow.first.out_channels == 10
        with torch.no_grad():
            stage.last.weight[:, [0, 1, 2, 8, 9, 10]] = 0
            stage.plain[2].weight[:, :7] = 0
            assert torch.allclose(narrow(FEATURES), stage(FEATURES), atol=1e-6)
    else:
        assert "first.weight" in coupling.undivided


def test_an_operation_that_is_not_followed_is_named() -> None:
    coupling = find_coupling(_CutUp(lambda u, v: [torch.fft.fft(u, dim=1).real, v]), FEATURES)
    assert coupling.undivided["first.weight"] == "its channels pass through _fft_r2c, which is not followed"


def test_an_operation_that_its_rule_does_not_expect_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(*_: object) -> None:
        raise KeyError("dim")

    monkeypatch.setattr(channel_flow._Follow, "_joined", joined)
    coupling = find_coupling(_CutUp(lambda u, v: [v, u]), FEATURES)
    assert coupling.undivided["first.weight"] == "its channels pass through cat, which is not followed"
    assert layers(coupling) == {"plain.0": 12}


def test_sorting_over_the_last_dimension_by_default_is_followed() -> None:
    coupling = find_coupling(_CutUp(lambda u, v: [torch.cat([u, v], 1).sort()[0]]), FEATURES)
    assert layers(coupling) == {"first": 16, "plain.0": 12}


def test_a_maximum_over_channels_reads_them_all_and_one_of_two_tensors_each_alone() -> None:
    class Gated(nn.Module):
        def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.inner, self.outer, self.gate = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1), gate

        def forward(self, features: Tensor) -> Tensor:
            inner = self.inner(features)
            return self.outer(inner * self.gate(inner))

    over_channels = find_coupling(Gated(lambda inner: inner.max(1, keepdim=True).values), FEATURES)
    assert over_channels.undivided["inner.weight"] == MIXED
    assert layers(find_coupling(Gated(lambda inner: inner.max(2, keepdim=True)[0]), FEATURES)) == {
        "inner": 12
    }
    assert layers(find_coupling(Gated(lambda inner: torch.max(inner, -inner)), FEATURES)) == {"inner": 12}


class _SplitAttention(nn.Module):
    """Attention with layers of its own for queries, keys and values, that takes its width from its input."""

    def __init__(self, width: int = 12, heads: int = 3, drop: float = 0.0, shared_key: bool = False) -> None:
        super().__init__()
        self.num_heads, self.shared_key = heads, shared_key
        self.q, self.v, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width // heads if shared_key else width)
        self.drop = nn.Dropout(drop)
        self.scales = nn.Parameter(torch.rand(heads, 1, 1))
        self.width_of_head = nn.Parameter(torch.rand(width // heads))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, C = tokens.shape  # noqa: N806  # as such code is written
        q = self.q(tokens).reshape(B, N, self.num_heads, C // self.num_heads).transpose(1, 2)
        v = self.v(tokens).view(B, N, self.num_heads, C // self.num_heads).transpose(1, 2)
        k = self.k(tokens)
        k = (
            k[:, None]
            if self.shared_key
            else k.view(B, N, self.num_heads, C // self.num_heads).transpose(1, 2)
        )
        scores = (q * self.width_of_head) @ k.transpose(-1, -2) * self.scales
        if mask is not None:
            scores = scores + mask
        mixed = self.drop(scores.softmax(-1)) @ v
        return self.proj(mixed.transpose(1, 2).reshape(B, N, C))


class _WithMask(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention
        self.register_buffer("mask", torch.randn(5, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.attn(tokens, mask=self.mask) + self.attn(tokens)


@pytest.mark.parametrize("shared_key", [False, True])
def test_attention_whose_code_takes_its_width_from_its_input(shared_key: bool) -> None:
    stage, tokens = _WithMask(_SplitAttention(shared_key=shared_key)), torch.randn(2, 5, 12)
    coupling = find_coupling(stage, tokens)
    assert layers(coupling) == {"attn.q": 3}
    dims = {(part.tensor, part.dim) for part in coupling.groups[0].slices}
    assert (("attn.k.weight", 0) in dims) == (not shared_key)
    assert ("attn.scales", 0) in dims and ("attn.width_of_head", 0) not in dims
    narrow = without_units(coupling, stage, keep=1)
    assert (narrow.attn.num_heads, stage.attn.num_heads) == (1, 3)
    with torch.no_grad():
        stage.attn.proj.weight[:, :8] = 0
        assert torch.allclose(narrow(tokens), stage(tokens), atol=1e-6)
    assert isinstance(narrow.attn, _SplitAttention)
    for again in (copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
        assert torch.equal(again(tokens), narrow(tokens))
    two = narrowed(stage, kept_indices(coupling.groups, [torch.tensor([True, True, False])]))
    one = narrowed(two, kept_indices(find_coupling(two, tokens).groups, [torch.tensor([False, True])]))
    assert one(tokens).shape == tokens.shape  # narrowed twice


def test_dropout_of_such_an_attention_still_acts_in_train_mode() -> None:
    stage, tokens = _SplitAttention(drop=0.5), torch.randn(2, 5, 12)
    narrow = without_units(find_coupling(stage, tokens), stage, keep=2).train()
    assert not torch.equal(narrow(tokens), narrow(tokens))
    narrow.eval()
    assert torch.equal(narrow(tokens), narrow(tokens))


class _ChannelAttention(nn.Module):
    """Attention between the channels of each head, and an MLP between tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.tokens = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        B, N, C = tokens.shape  # noqa: N806
        q, k, v = self.qkv(tokens).reshape(B, N, 3, self.num_heads, 4).permute(2, 0, 3, 4, 1)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        tokens = tokens + self.proj(mixed.permute(0, 3, 1, 2).reshape(B, N, C))
        return tokens + self.tokens(tokens.transpose(1, 2)).transpose(1, 2)


def test_attention_between_channels_and_an_mlp_between_tokens() -> None:
    coupling = find_coupling(_ChannelAttention(), torch.randn(2, 5, 12))
    assert layers(coupling) == {"qkv": 3, "tokens.0": 7}


class _Res2(nn.Module):
    """The output of a layer in pieces, each of which passes through a convolution with the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.first, self.last = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, features: Tensor) -> Tensor:
        one, two, three = self.first(features).split(self.width, 1)
        two = self.convs[0](two)
        return self.last(torch.cat([one, two, self.convs[1](two + three)], 1))


def test_pieces_of_a_layer_keep_equal_widths() -> None:
    stage = _Res2()
    coupling = find_coupling(stage, FEATURES)
    narrow = without_units(coupling, stage, keep=2)
    assert (narrow.width, narrow.first.out_channels) == (2, 6)
    assert narrow(FEATURES).shape == FEATURES.shape


def test_norms_of_ones_own_are_over_the_channels_of_a_path() -> None:
    class ResponseNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(1, 12, 1, 1))

        def forward(self, features: Tensor) -> Tensor:
            return features * self.weight / features.norm(dim=1, keepdim=True)

    (group,) = find_coupling(Normed(ResponseNorm()), FEATURES).groups
    assert group.units == 12
    assert ("1.weight", 1) in {(part.tensor, part.dim) for part in group.slices}


class _TalkingHeads(nn.Module):
    """Attention whose scores are mixed between heads, and biased by a part that stores its shape."""

    def __init__(self, heads: int = 6) -> None:
        super().__init__()
        self.num_heads, self.width = heads, 4
        self.qkv, self.proj = nn.Linear(8, 3 * heads * 4), nn.Linear(heads * 4, 8)
        self.bias = _Bias(heads)
        self.before, self.after = nn.Conv2d(heads, heads, 1), nn.Conv2d(heads, heads, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, number, _ = tokens.shape
        q, k, v = self.qkv(tokens).reshape(batch, number, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = self.before(self.bias(q @ k.transpose(-1, -2))).softmax(-1)
        mixed = self.after(scores) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, number, -1))


class _Bias(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.bias_shape = (5, 5, heads)
        self.table = nn.Parameter(torch.randn(9, heads))
        self.register_buffer("index", torch.arange(25) % 9, persistent=False)

    def forward(self, scores: Tensor) -> Tensor:
        return scores + self.table[self.index].view(self.bias_shape).permute(2, 0, 1)


def test_heads_that_talk_to_one_another_are_one_group() -> None:
    stage, tokens = _TalkingHeads(), torch.randn(2, 5, 8)
    coupling = find_coupling(stage, tokens)
    assert layers(coupling) == {"qkv": 6}
    dims = {(part.tensor, part.dim) for part in coupling.groups[0].slices}
    assert {("before.weight", 0), ("before.weight", 1), ("after.weight", 0), ("bias.table", 1)} <= dims
    narrow = without_units(coupling, stage, keep=2)
    assert (narrow.num_heads, narrow.bias.bias_shape) == (2, (5, 5, 2))
    assert narrow(tokens).shape == tokens.shape


class _Halved(nn.Module):
    """Two layers whose outputs are put together, and taken apart in equal pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.last, self.other = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 1)

    def forward(self, features: Tensor) -> Tensor:
        first, second = torch.cat([self.one(features), self.two(features)], 1).chunk(2, 1)
        return self.last(first) + self.other(second)


def test_groups_that_code_takes_for_equally_wide_stay_whole() -> None:
    # Each path may get more of one than of the other: half of both at once would fit.
    assert find_coupling(_Halved(), FEATURES).groups == ()


class _InPieces(nn.Module):
    """A layer whose output is taken apart in equal pieces, of which a grouped convolution reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.first, self.last = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)

    def forward(self, features: Tensor) -> Tensor:
        one, other = self.first(features).split(self.width, 1)
        return self.last(torch.cat([self.grouped(one), other], 1))


def test_pieces_of_a_layer_with_larger_and_smaller_units_are_one_group() -> None:
    stage = _InPieces()
    coupling = find_coupling(stage, FEATURES)
    assert layers(coupling) == {"first": 4}
    narrow = without_units(coupling, stage, keep=3)
    assert (narrow.width, narrow.grouped.groups) == (6, 3)
    with torch.no_grad():
        stage.last.weight[:, [0, 1, 8, 9]] = 0
        assert torch.allclose(narrow(FEATURES), stage(FEATURES), atol=1e-6)


def test_they_are_also_beside_a_layer_that_stays_whole() -> None:
    stage = nn.Sequential(_InPieces(), _CutUp(lambda u, v: [v, u]))
    assert layers(find_coupling(stage, FEATURES)) == {"0.first": 4, "1.plain.0": 12}


class _AddedToOne(nn.Module):
    """Equal pieces of a layer's output, to one of which another adds, that stands before it in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.added, self.first = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 1)
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, features: Tensor) -> Tensor:
        one, other = self.first(features).chunk(2, 1)
        return self.last(torch.cat([one + self.added(features), other], 1))


def test_a_piece_to_which_another_layer_adds_stays_as_wide_as_the_others() -> None:
    coupling = find_coupling(_AddedToOne(), FEATURES)
    assert layers(coupling) == {"added": 8}
    units = {part.tensor: part.units.tolist() for part in coupling.groups[0].slices}
    assert units["first.weight"] == list(range(8)) * 2 and units["added.weight"] == list(range(8))


class _Rotated(nn.Module):
    """Attention over windows of padded tokens, with a constant for each position and channel of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 36), nn.Linear(12, 8)
        self.register_buffer("table", torch.randn(4, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        batch, number, _ = tokens.shape
        windows = self.norm(F.pad(tokens, (0, 0, 0, 8 - number)).reshape(batch * 2, 4, 8))
        q, k, v = self.qkv(windows).reshape(batch * 2, 4, 3, self.num_heads, 4).permute(2, 0, 3, 1, 4)
        q = torch.cat([q[:, :, :0], q * self.table], 2)  # no token of a class comes first
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, 8, -1)[:, :number])


def test_heads_of_padded_windows_with_positions() -> None:
    stage, tokens = _Rotated(), torch.randn(2, 7, 8)
    coupling = find_coupling(stage, tokens)
    assert layers(coupling) == {"qkv": 3}
    assert "table" not in {part.tensor for part in coupling.groups[0].slices}
    narrow = without_units(coupling, stage, keep=1)
    with torch.no_grad():
        stage.proj.weight[:, :8] = 0
        assert torch.allclose(narrow(tokens), stage(tokens), atol=1e-6)


class _ConvAttention(nn.Module):
    """Attention by convolutions whose number of heads is in the code; then an MLP."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        self.mlp = nn.Sequential(nn.Conv2d(channels, 12, 1), nn.ReLU(), nn.Conv2d(12, channels, 1))

    def forward(self, features: Tensor) -> Tensor:
        batch, channels, height, width = features.shape
        parts = self.qkv(features).reshape(batch, 3, 2, channels // 2, height * width).permute(1, 0, 2, 4, 3)
        query, key, value = parts.unbind(0)
        mixed = (query @ key.transpose(-2, -1)).softmax(-1) @ value
        mixed = mixed.permute(0, 1, 3, 2).reshape(batch, -1, height, width)
        features = features + self.proj(mixed)
        return features + self.mlp(features)


def test_code_that_allows_no_fewer_heads_keeps_its_attention_whole() -> None:
    coupling = find_coupling(_ConvAttention(), FEATURES)
    assert layers(coupling) == {"mlp.0": 12}
    assert coupling.undivided["qkv.weight"] == MIXED


def test_sums_over_units() -> None:
    stage = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(4, 8, 1, bias=False))
    (group,) = find_coupling(stage, FEATURES).groups
    tensors = {
        "0.weight": torch.ones(4, 8, 1, 1),
        "1.weight": torch.arange(4.0).view(1, 4, 1, 1).expand(8, 4, 1, 1),
    }
    assert group.sums(tensors).tolist() == [8.0, 16.0, 24.0, 32.0]
    inside = group.within("stages.3.")
    assert inside.layer == "stages.3.0"
    assert inside.sums({f"stages.3.{name}": value for name, value in tensors.items()}).tolist() == [
        8,
        16,
        24,
        32,
    ]


class _IdentityBlock(nn.Module):
    """A block of RepVGG: two convolutions, and a batch norm of the input where the width stays."""

    def __init__(self, inputs: int, outputs: int, groups: int = 1) -> None:
        super().__init__()
        self.identity = nn.BatchNorm2d(outputs) if inputs == outputs else None
        self.wide = nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1, groups=groups), nn.BatchNorm2d(outputs))
        self.small = nn.Sequential(nn.Conv2d(inputs, outputs, 1, groups=groups), nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        identity = 0 if self.identity is None else self.identity(features)
        return (self.wide(features) + self.small(features) + identity).relu()


@pytest.mark.parametrize(
    ("last_groups", "scattered", "units"), [(1, "2", 12), (3, "1", 12)], ids=["dense", "grouped"]
)
def test_the_last_identity_branch_that_frees_channels_is_scattered(
    last_groups: int, scattered: str, units: int
) -> None:
    stage = nn.Sequential(
        _IdentityBlock(8, 12), _IdentityBlock(12, 12), _IdentityBlock(12, 12, last_groups)
    ).eval()
    for tensor in stage.parameters():
        nn.init.normal_(tensor, std=0.3)
    coupling = find_coupling(stage, FEATURES)
    assert layers(coupling) == {"0.wide.0": units}
    assert scattered_norms(coupling.groups) == {f"{scattered}.identity"}
    kept = kept_indices(coupling.groups, [torch.arange(units) % 3 == 1])
    path = narrowed(stage, kept, scattered_norms(coupling.groups))
    assert path[0].wide[0].weight.shape[0] == units // 3
    dropped = torch.arange(12) % 3 != 1
    identity = stage[int(scattered)].identity
    with torch.no_grad():
        for block in stage[1 : int(scattered) + 1]:
            block.wide[0].weight[:, dropped] = block.small[0].weight[:, dropped] = 0
        identity.weight[dropped] = identity.bias[dropped] = 0
        torch.testing.assert_close(path(FEATURES), stage(FEATURES))


def test_a_stage_that_is_divided_without_it_keeps_its_identity_branches() -> None:
    stage = nn.Sequential(_IdentityBlock(8, 12), _IdentityBlock(12, 12), _IdentityBlock(12, 8))
    coupling = find_coupling(stage, FEATURES)
    assert layers(coupling) == {"0.wide.0": 12}
    assert not scattered_norms(coupling.groups)


class _NormOfSum(nn.Module):
    """A block of RepViT, whose batch norm no layer stands beside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.mlp = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1))

    def forward(self, features: Tensor) -> Tensor:
        features = self.norm(features + self.conv(features))
        return features + self.mlp(features)


def test_a_batch_norm_on_the_main_path_is_no_identity_branch() -> None:
    coupling = find_coupling(nn.Sequential(nn.Conv2d(8, 8, 1), _NormOfSum()), FEATURES)
    assert layers(coupling) == {"1.mlp.0": 12}


def test_a_fault_of_the_rules_is_not_taken_for_an_operation_that_is_not_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers, images = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), torch.zeros(1, 3, 4, 4)

    def fail(*_arguments: object) -> None:
        raise failure

    monkeypatch.setattr(channel_flow._Follow, "_results", fail)
    failure: Exception = IndexError()
    channel_flow.follow(layers, images)
    failure = NameError("a name that does not exist")
    with pytest.raises(NameError, match="a name that"):
        channel_flow.follow(layers, images)


class WithMask(nn.Module):
    """Passes a mask of tokens on beside features."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        features, mask = inputs
        hidden = self.inner(features).masked_fill(~mask.unsqueeze(-1), 0.0)
        return features + self.outer(hidden), mask


def test_a_mask_that_a_stage_passes_on_stays_a_mask() -> None:
    mask = torch.tensor([[True, True, False]])
    coupling = find_coupling(WithMask(), (torch.randn(1, 3, 4), mask))
    assert [(group.layer, group.units) for group in coupling.groups] == [("inner", 6)]


def test_values_without_a_label_are_tied_to_none() -> None:
    flow = Flow()
    flow.tie(torch.tensor([-1, 1, 3]), torch.tensor([2, 2, -1]))
    assert torch.cat(flow.pairs, 1).tolist() == [[1], [2]]
