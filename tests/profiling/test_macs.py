"""MACs by hand, beside PyTorch's own counter, and what becomes of removed weights and unknown operations."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.swin_transformer import ShiftedWindowAttentionV2

import netfission as nf
from netfission.models import create_model
from netfission.profiling.macs import count_macs, count_training_macs, list_calls, macs_by_weight, run_counted
from netfission.surgery.masks import apply_masks, discard_masks, prunable_weights


def contract() -> ModuleType:
    """The module of the backbones' contract test: what it cuts must be countable too."""
    spec = importlib.util.spec_from_file_location(
        "contract_of_backbones", Path(__file__).parents[1] / "surgery/test_backbone.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def half_the_flops(module: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(images)
    return counter.get_total_flops() // 2


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# --- dense ------------------------------------------------------------------------------------------


def counts_attention() -> bool:
    """Whether PyTorch's counter knows the operation that attention is on a CPU; that of 2.11 does not."""
    return half_the_flops(LAYERS["attention"], X) > 0


@pytest.mark.parametrize("case", contract().CASES, ids=lambda case: case.model)
def test_contract_models_agree_with_pytorchs_counter(case, small_model):
    if "vit" in case.model and not counts_attention():
        pytest.skip("PyTorch does not count attention")
    model = small_model(case.model, 7).eval()
    images = torch.randn(1, 3, case.side, case.side)
    counter = run_counted(model, images)
    with torch.no_grad():
        expected = half_the_flops(model, images)
    assert counter.total.dense == pytest.approx(expected, rel=0.01)
    assert counter.total.effective == counter.total.dense
    assert not counter.uncounted


X = torch.randn(2, 6, 8, 8)
LAYERS = {
    "linear": nn.Linear(8, 5),
    "linear without bias": nn.Linear(8, 5, bias=False),
    "grouped convolution": nn.Conv2d(6, 9, 3, stride=2, padding=1, groups=3),
    "dilated convolution": nn.Conv2d(6, 4, 3, dilation=2),
    "transposed convolution": nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2),
    "einsum": Function(lambda x: torch.einsum("bhqd,bhkd->bhqk", x, x)),
    "attention": Function(lambda x: F.scaled_dot_product_attention(x, x, x[..., :8])),
    "attention in steps": Function(lambda x: F.scaled_dot_product_attention(x[..., :4], x[..., :4], x)),
    "baddbmm": Function(lambda x: torch.baddbmm(x[0], x[0], x[0])),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_agree_with_pytorchs_counter(name):
    if "attention" in name and not counts_attention():
        pytest.skip("PyTorch does not count attention")
    counter = run_counted(LAYERS[name], X)
    assert counter.total.dense == half_the_flops(LAYERS[name], X) > 0
    assert not counter.uncounted


def efficient_attention(x: Tensor, values: Tensor) -> Tensor:
    """A GPU's, whose values may be narrower than its keys."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(x, x, values, None, False)[0]


def lstm_of_cells(x: Tensor) -> Tensor:
    cell = nn.LSTMCell(8, 5)
    state = None
    for token in x[0].unbind():
        state = cell(token[None], state)
    return state[0]


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (lambda x: torch.mv(x[0, 0], x[0, 0, 0]), 64),
        (lambda x: x @ x[0, 0, 0], 2 * 6 * 8 * 8),
        (lambda x: torch.dot(x[0, 0, 0], x[0, 0, 0]), 8),
        (lambda x: torch.addmv(x[0, 0, 0], x[0, 0], x[0, 0, 0]), 64),
        (lambda x: torch.addbmm(x[0, 0], x[0], x[0]), 6 * 8**3),
        (lambda x: torch.zeros(8, 8).addmm_(x[0, 0], x[0, 0]), 8**3),
        (lambda x: efficient_attention(x.to("meta"), x[..., :5].to("meta")), 2 * 6 * 8 * 8 * (8 + 5)),
        (lambda x: nn.LSTM(8, 5, batch_first=True)(x[0])[0], 6 * 8 * (4 * 5) * (8 + 5)),
        (lambda x: lstm_of_cells(x[:, 0]), 8 * (4 * 5) * (8 + 5)),
    ],
)
def test_products_that_pytorchs_counter_leaves_out(function, macs):
    counter = run_counted(Function(function), X)
    assert counter.total.dense == macs
    assert not counter.uncounted


class SelfAttention(nn.MultiheadAttention):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens, tokens, tokens)[0]


@pytest.mark.parametrize(
    "module",
    [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), SelfAttention(8, 2, batch_first=True)],
    ids=lambda module: type(module).__name__,
)
def test_fused_transformer_layers_are_counted_as_their_products(module):
    if not counts_attention():
        pytest.skip("PyTorch does not count attention")
    tokens = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert half_the_flops(module.eval(), tokens) == 0  # the fused operation, of which it knows nothing
    counter = run_counted(module, tokens)
    assert counter.total.dense == half_the_flops(module, tokens) > 0  # with gradients it is not fused
    assert not counter.uncounted
    assert torch.backends.mha.get_fastpath_enabled()


def test_inference_mode_counts_the_same():
    network = nn.Sequential(nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    expected = count_macs(network, X)
    with torch.inference_mode():
        assert count_macs(network, X) == expected


# --- without removed weights ------------------------------------------------------------------------


def test_a_small_network_by_hand():
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 7))
    dense = 25 * 2 * 4 * 9 + 700
    assert count_macs(network, torch.randn(1, 2, 5, 5)) == (dense, dense)
    conv = torch.ones(4, 2, 3, 3, dtype=torch.bool)
    conv.view(-1)[:10] = False
    linear = torch.ones(7, 100, dtype=torch.bool)
    linear[0] = False
    apply_masks(network, {"0.weight": conv, "3.weight": linear})
    assert count_macs(network, torch.randn(1, 2, 5, 5)) == (dense, dense - 10 * 25 - 100)


MASKABLE = [
    lambda: (nn.Linear(6, 5), (3, 4, 6)),
    lambda: (nn.Linear(6, 5, bias=False), (2, 6)),
    lambda: (nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 7, 7)),
    lambda: (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6)),
    lambda: (nn.Conv1d(3, 4, 2, dilation=2), (2, 3, 9)),
    lambda: (nn.Conv2d(4, 6, (3, 1)).to(memory_format=torch.channels_last), (2, 4, 5, 5)),
]


@settings(max_examples=60, deadline=None)
@given(make=st.sampled_from(MASKABLE), density=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_effective_macs_are_the_products_with_kept_weights(make, density, seed):
    layer, shape = make()
    kept = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) < density
    apply_masks(layer, {"weight": kept})
    counted = count_macs(layer, torch.randn(shape))
    discard_masks(layer)  # else all weights cannot be ones
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    for expected, weight in zip(counted, (torch.ones_like(layer.weight), kept), strict=True):
        with torch.no_grad():  # each product of a one with a one adds 1
            layer.weight.copy_(weight)
            assert layer(torch.ones(shape)).sum() == expected


def test_removed_weights_of_attention():
    class Attention(nn.MultiheadAttention):
        def forward(self, tokens):
            return super().forward(tokens, tokens[:, :3], tokens[:, :3])[0]

    network = Attention(8, 2, batch_first=True)
    tokens = torch.randn(1, 5, 8)
    dense, _ = count_macs(network, tokens)
    projections = torch.ones(24, 8, dtype=torch.bool)
    projections[:2] = False  # of queries, of which there are 5
    projections[23] = False  # of values, of which there are 3
    output = torch.ones(8, 8, dtype=torch.bool)
    output[0, :4] = False
    apply_masks(network, {"in_proj_weight": projections, "out_proj.weight": output})
    assert count_macs(network, tokens) == (dense, dense - 5 * 16 - 3 * 8 - 5 * 4)


def test_removed_weights_are_found_wherever_they_are_used():
    class Borrows(nn.Module):
        """As torchvision's Swin does, it takes weights from a layer that it does not call."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 6)

        def forward(self, tokens):
            first, second = self.layer.weight.chunk(2)
            return F.linear(tokens, first) + tokens @ second.T

    network = Borrows()
    kept = torch.ones(6, 8, dtype=torch.bool)
    kept[0] = kept[5, 0] = False
    apply_masks(network, {"layer.weight": kept})
    assert count_macs(network, torch.randn(4, 8)) == (4 * 48, 4 * (48 - 9))


def test_weight_groups_cost_the_single_networks_effective_macs():
    model = create_model("wrn-10-1", 10)
    images = torch.randn(2, 3, 16, 16)
    network = nf.fission(model, 3, example_input=images)
    dense, effective = count_macs(network, images[:1])
    single, _ = count_macs(model, images[:1])
    assert effective == single + 2 * 64 * 10  # two heads more
    assert dense > 1.5 * single


# --- what cannot be counted -------------------------------------------------------------------------


@torch.library.custom_op("netfission_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


def matmul(x: Tensor) -> tuple[Tensor]:
    return (x @ x,)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: torch.fft.irfft2(torch.fft.rfft2(x)), ["aten._fft_c2r", "aten._fft_r2c"]),
        (lambda x: F.bilinear(x, x, torch.ones(3, 8, 8)), ["aten._trilinear"]),
        (twice, ["netfission_test.twice"]),
        (lambda x: torch.cdist(x, x), ["aten._cdist_forward"]),
        (lambda x: torch.linalg.inv(x[0, 0]), ["aten.linalg_inv_ex", "aten._linalg_check_errors"]),
        (lambda x: torch.ops.higher_order.cond(x.sum() > 0, matmul, matmul, (x,)), ["cond"]),
    ],
    ids=["fft", "bilinear", "custom", "distances", "inverse", "branch"],
)
def test_operations_without_a_formula_are_listed_and_warned_of(function, names):
    counter = run_counted(Function(function), X)
    assert dict(counter.uncounted) == dict.fromkeys(names, 1)
    assert counter.total == (0, 0)
    with pytest.warns(UserWarning, match=f"MACs leave out .*{names[0]} ×1"):
        count_macs(Function(function), X)


def test_products_of_an_attention_count_with_its_projection_not_with_an_mlp_beside_it():
    attention = ShiftedWindowAttentionV2(8, [2, 2], [0, 0], 2)
    macs = macs_by_weight(attention, torch.randn(1, 4, 4, 8))
    layers, products = 4 * 16 * 8 * 8, 2 * 16 * 4 * 8
    assert macs["qkv.weight"] + macs["proj.weight"] == layers + products
    assert macs["cpb_mlp.2.weight"] == 9 * 512 * 2


def test_calls_of_an_uncounted_operation_add_up():
    counter = run_counted(Function(lambda x: twice(twice(x)) + torch.fft.fft(x).real), X)
    assert list_calls(counter.uncounted) == "aten._fft_r2c ×1, netfission_test.twice ×2"


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.BatchNorm2d(6), nn.ReLU6(inplace=True), nn.MaxPool2d(2), nn.Hardswish(inplace=True)),
        nn.Sequential(nn.GroupNorm(2, 6), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.LayerNorm([6, 2, 2])),
        nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bicubic"), nn.PReLU(), nn.LPPool2d(2, 2), nn.Softmax(1)
        ),
        nn.Sequential(nn.ReflectionPad2d(1), nn.PixelShuffle(1), nn.ChannelShuffle(2), nn.Mish(inplace=True)),
        Function(
            lambda x: torch.roll(x, 1, 2).masked_fill_(x > 0, 0).unfold(2, 3, 1).cumsum(1).topk(2).values
        ),
        Function(lambda x: F.one_hot(torch.arange(4)).float().tril_().std() * F.glu(x).copy_(x[:, :, :, :4])),
        Function(lambda x: F.dropout(x) + torch.rand_like(x).bernoulli_().exp_() * torch.eye(8)),
    ],
)
def test_work_that_holds_no_product_is_not_uncounted(module):
    counter = run_counted(module, X)
    assert not counter.uncounted
    assert counter.total == (0, 0)


# --- what is left of it -----------------------------------------------------------------------------


def test_parts_are_kept_apart():
    inner = nn.Linear(8, 5)
    network = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), inner), nn.Linear(5, 2))
    counter = run_counted(network, torch.randn(1, 8), [network[1], network[2]])
    assert dict(counter.dense) == {None: 64, network[1]: 40, network[2]: 10}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_a_part_inside_another_is_counted_for_itself():
    first, inner, last = nn.Linear(8, 8), nn.Linear(8, 5), nn.Linear(5, 2)
    network = nn.Sequential(first, nn.Sequential(inner), last)
    counter = run_counted(network, torch.randn(1, 8), [network, inner])
    assert dict(counter.dense) == {network: 64 + 10, inner: 40}


def test_counting_does_not_change_the_network():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Dropout())
    network[2].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    count_macs(network, torch.randn(1, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [module.training for module in network] == [True, True, False]


@pytest.mark.parametrize("training", [True, False])
def test_all_is_put_back_after_an_error(training):
    network = nn.Sequential(nn.Conv2d(3, 4, 3)).train(training)
    with pytest.raises(RuntimeError):
        run_counted(network, torch.zeros(1, 5, 8, 8), [network[0]])
    assert network.training is training
    assert torch.backends.mha.get_fastpath_enabled()
    assert not network[0]._forward_hooks


def test_every_masked_weight_is_known():
    network = nf.fission(create_model("wrn-10-1", 4), 2, example_input=torch.randn(2, 3, 16, 16))
    weights = prunable_weights(network)
    apply_masks(
        network, {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    )
    assert count_macs(network, torch.randn(1, 3, 16, 16)).effective == 0


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_training_step_takes_three_times_the_products_of_inference(kind, groups):
    layer, images = kind(8, 16, 3, groups=groups), torch.randn(2, 8, 6, 6, requires_grad=True)
    assert count_training_macs(lambda: layer(images).sum().backward()) == 3 * count_macs(layer, images).dense
    images = images.detach()  # no gradient is taken of the first layer's images
    assert count_training_macs(lambda: layer(images).sum().backward()) == 2 * count_macs(layer, images).dense
