"""Layers of a path, solved by least squares."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, ScaledStdConv2d, StdConv2d
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

import netfission as nf
from netfission import algorithm
from netfission.models import create_model
from netfission.surgery import reconstruction
from netfission.surgery.narrowing import ScatteredNorm, narrowed
from netfission.surgery.reconstruction import in_batches, reconstruct

HALF = torch.tensor([0, 2, 3, 5])  # of eight channels
IMAGES = 150  # several batches, the last of which is smaller


@pytest.fixture(autouse=True)
def _plain_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "RIDGE", 1e-7)


def redundant(*shape: int) -> Tensor:
    """Return features of eight channels of which any three determine the others."""
    return torch.randn(*shape, 3) @ torch.randn(3, 8)


def error(path: nn.Module, whole: nn.Module, features: Tensor) -> float:
    """Return the mean squared error of a path over the variance of what it should return."""
    with torch.no_grad():
        wanted = whole.eval()(features)
        return float((path.eval()(features) - wanted).pow(2).mean() / wanted.var())


def convolutions(second: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), second)


OF_CONVOLUTIONS = {"0.weight": {0: HALF}, "1.weight": {1: HALF}}


@pytest.mark.parametrize(
    "second",
    [
        nn.Conv2d(8, 6, 1),
        nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(8, 6, 3, padding="same", dilation=2, padding_mode="reflect"),
        Conv2dSame(8, 6, 3, stride=2),
    ],
    ids=["1×1", "stride", "reflected", "same"],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_of_redundant_channels_is_recovered(
    second: nn.Module, layout: torch.memory_format
) -> None:
    whole = convolutions(copy.deepcopy(second)).to(memory_format=layout)
    features = redundant(IMAGES, 7, 7).movedim(-1, 1).contiguous(memory_format=layout)
    path = narrowed(whole, OF_CONVOLUTIONS)
    assert error(path, whole, features) > 0.05
    reconstruct(path, whole, OF_CONVOLUTIONS, features, features)
    assert error(path, whole, features) < 1e-4
    held_out = torch.einsum("nchw,dc->ndhw", features[:9].flip(0), torch.eye(8))
    assert error(path, whole, held_out) < 1e-4


def test_a_linear_layer_is_recovered_with_its_bias() -> None:
    whole = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    with torch.no_grad():
        whole[0].bias.fill_(5.0)  # features with a mean
    kept = {"0.weight": {0: HALF}, "0.bias": {0: HALF}, "1.weight": {1: HALF}}
    features = redundant(IMAGES, 4)
    path = narrowed(whole, kept)
    reconstruct(path, whole, kept, features, features)
    assert error(path, whole, features) < 1e-3


@pytest.mark.parametrize("torch_attention", [False, True])
def test_the_output_projection_of_an_attention_is_solved(torch_attention: bool) -> None:
    class OfTorch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 4, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            output: Tensor = self.inner(tokens, tokens, tokens, need_weights=False)[0]
            return output

    whole: nn.Module = OfTorch() if torch_attention else Attention(8, num_heads=4, qkv_bias=True)
    first, last = ("inner.in_proj_", "inner.out_proj.weight") if torch_attention else ("qkv.", "proj.weight")
    heads = torch.arange(4)  # the channels of two heads of four
    of_all = torch.cat([heads, 8 + heads, 16 + heads])
    kept = {f"{first}weight": {0: of_all}, f"{first}bias": {0: of_all}, last: {1: heads}}
    features = torch.randn(IMAGES, 5, 8)
    path = narrowed(whole.eval(), kept)
    before, weight = error(path, whole, features), path.get_parameter(last).clone()
    reconstruct(path, whole, kept, features, features)
    assert error(path, whole, features) < 0.95 * before
    assert not torch.equal(path.get_parameter(last), weight)


def test_each_layer_makes_up_for_what_those_before_it_miss() -> None:
    def block() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    torch.manual_seed(0)
    whole = nn.Sequential(block(), block())
    kept = {
        f"{index}.{name}": dims
        for index in (0, 1)
        for name, dims in {
            "0.weight": {0: HALF},
            "0.bias": {0: HALF},
            **{f"1.{part}": {0: HALF} for part in ("weight", "bias", "running_mean", "running_var")},
            "3.weight": {1: HALF},
        }.items()
    }
    features = torch.randn(IMAGES, 8, 6, 6)
    whole.train()(features)
    path = narrowed(whole, kept)
    before = error(path, whole, features)
    reconstruct(path, whole, kept, features, features)
    after = error(path, whole, features)
    assert after < 0.5 * before
    alone = narrowed(whole, kept)  # each layer by what the whole stage computes
    for index in (0, 1):
        part = {name[2:]: dims for name, dims in kept.items() if name[0] == str(index)}
        inputs = whole[:index](features)
        reconstruct(alone[index], whole[index], part, inputs, inputs)
    assert after < error(alone, whole, features)


def test_what_a_path_reads_may_differ_from_what_the_whole_stage_reads() -> None:
    whole = convolutions(nn.Conv2d(8, 6, 1))
    features = redundant(IMAGES, 4, 4).movedim(-1, 1)
    path = narrowed(whole, OF_CONVOLUTIONS)
    reconstruct(path, whole, OF_CONVOLUTIONS, 2 * features, features)
    with torch.no_grad():
        assert torch.allclose(path(2 * features), whole(features), atol=1e-2)


def test_each_channel_after_a_batch_norm_keeps_its_mean_and_variance() -> None:
    """Least squares lowers the variance of what it predicts."""
    whole = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Dropout(0.9), nn.BatchNorm2d(8))
    whole[3].num_batches_tracked += 7
    whole[3].running_mean += 0.5
    whole[3].running_var *= 2
    names = ("weight", "bias", "running_mean", "running_var")
    kept = {"0.weight": {0: HALF}, "0.bias": {0: HALF}, "1.weight": {0: HALF, 1: HALF}, "1.bias": {0: HALF}}
    kept |= {f"3.{name}": {0: HALF} for name in names}
    features = 3 + torch.randn(IMAGES, 8, 4, 4)
    path = narrowed(whole.train(), kept)
    reconstruct(path, whole, kept, features, features)
    assert path.training and path[3].training
    assert (path[3].momentum, int(path[3].num_batches_tracked)) == (0.1, 7)
    assert float(whole[3].running_mean.sum()) == 4
    outputs = [module.eval()(features) for module in (path, whole)]
    for moment in (torch.mean, torch.std):
        of_path, of_whole = (moment(output, (0, 2, 3)) for output in outputs)
        assert torch.allclose(of_path, of_whole[HALF], atol=1e-3)


@pytest.mark.parametrize("features", [torch.ones(5, 8, 2, 2), torch.rand(5, 8, 2, 2)], ids=["both", "one"])
def test_a_batch_norm_of_constant_features_stays(features: Tensor) -> None:
    whole = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval()
    kept = {"0.weight": {1: HALF}}
    path = narrowed(whole, kept)
    reconstruct(path, whole, kept, torch.ones(5, 4, 2, 2), features)
    assert path[1].running_var.tolist() == whole[1].running_var.tolist()


@pytest.mark.parametrize(
    "second",
    [
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 1)),
        ScaledStdConv2d(8, 6, 3),
        nn.Conv2d(8, 8, 3, groups=8),
    ],
    ids=["parametrised", "standardised", "depthwise"],
)
def test_layers_whose_output_is_not_linear_in_their_weight_stay(second: nn.Module) -> None:
    whole = convolutions(second)
    path = copy.deepcopy(whole)
    features = torch.randn(9, 8, 5, 5)
    reconstruct(path, whole, {"1.weight": {1: torch.arange(8)}}, features, features)
    assert all(map(torch.equal, path.state_dict().values(), whole.state_dict().values()))


def test_features_that_are_all_zero_leave_the_weights() -> None:
    whole = convolutions(nn.Conv2d(8, 6, 1, bias=False))
    path = narrowed(whole, OF_CONVOLUTIONS)
    features = torch.zeros(3, 8, 2, 2)
    reconstruct(path, whole, OF_CONVOLUTIONS, features, features)
    assert torch.equal(path[1].weight, whole[1].weight[:, HALF])


def test_features_may_be_several_tensors() -> None:
    class Sum(nn.Module):
        def forward(self, features: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return features[0] + features[1], features[1]

    first, second = in_batches(Sum(), (torch.ones(100, 2), torch.ones(100, 2)))
    assert first.shape == second.shape == (100, 2) and float(first.sum()) == 400


# --- in a network -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    network = create_model("wrn-10-2", 10)
    network.train()(torch.randn(64, 3, 8, 8))
    return network.eval()


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(50, 3, 8, 8, generator=generator), torch.zeros(50).long()) for _ in range(count)]


def test_each_exit_of_a_network_comes_closer_to_the_model(model: nn.Module) -> None:
    (images, _), *training = batches(9)
    logits = {}
    for is_solved in (False, True):
        net = nf.fission(
            model, grouping="channels", batches=training, assignment="random", reconstruct=is_solved
        )
        logits[is_solved] = net.eval()(images)
    wanted = model(images)[:, None].softmax(-1)
    errors = {key: F.mse_loss(value.softmax(-1), wanted.expand_as(value)) for key, value in logits.items()}
    for exit_ in range(3):
        before, after = ((logits[key][:, exit_] - model(images)).pow(2).mean() for key in (False, True))
        assert after < 0.6 * before, exit_
    assert errors[True] < errors[False]


def test_a_pruned_network_of_one_exit_is_reconstructed(model: nn.Module) -> None:
    (images, _), *training = batches(9)
    error_of = {}
    for is_solved in (False, True):
        net = nf.fission(
            model,
            1,
            grouping="channels",
            sparsity=0.4,
            criterion="magnitude",
            batches=training,
            reconstruct=is_solved,
        )
        error_of[is_solved] = (net.eval()(images)[:, 0] - model(images)).pow(2).mean()
    assert error_of[True] < 0.6 * error_of[False]


def test_what_follows_the_choice_of_stages_divides_the_model_no_second_time(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    divided, divide = [], algorithm._divide
    monkeypatch.setattr(algorithm, "_divide", lambda *args: divided.append(args) or divide(*args))
    nf.fission(model, grouping="channels", batches=batches(), reconstruct=True, linear_exits=[2])
    assert len(divided) == 1


def test_one_exit_keeps_the_bits_of_the_model(model: nn.Module) -> None:
    net = nf.fission(model, 1, grouping="channels", batches=batches(), reconstruct=True)
    images = batches(1)[0][0]
    assert torch.equal(net.eval()(images)[:, 0], model(images))


def test_the_same_images_give_the_same_bits_and_no_mode_changes(model: nn.Module) -> None:
    first, second = (
        nf.fission(model, 2, grouping="channels", batches=batches(), reconstruct=True) for _ in range(2)
    )
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert not any(part.training for part in first.modules())


def test_identity_branches_are_reconstructed() -> None:
    blocks = tuple(ByoBlockCfg("rep", d=2, c=channels, s=2, gs=0) for channels in (16, 24, 32, 48))
    model = ByobNet(ByoModelCfg(blocks, stem_type="rep", stem_chs=16), num_classes=10).eval()
    training = [(torch.randn(8, 3, 32, 32), torch.zeros(8).long())]
    net = nf.fission(model, 2, grouping="channels", batches=training, reconstruct=True)
    assert any(isinstance(part, ScatteredNorm) for part in net.modules())
    assert net(training[0][0]).isfinite().all()


class SideBySide(nn.Module):
    """Two stages that pass on features of two sizes, as HRNets do."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large = nn.Sequential(nn.Conv2d(8, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 8, 1))
            self.small = nn.Sequential(nn.Conv2d(8, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 8, 1))

        def forward(self, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
            return self.large(large), self.small(small) + F.avg_pool2d(large, 2)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = self.Part(), self.Part()
        self.classifier = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        large, small = self.first(features, F.avg_pool2d(features, 2))
        large, small = self.second(large, small)
        logits: Tensor = self.classifier(torch.cat([large.mean((2, 3)), small.mean((2, 3))], 1))
        return logits


def test_stages_that_pass_on_several_tensors_are_reconstructed() -> None:
    torch.manual_seed(0)
    model = SideBySide().eval()
    (images, _), *training = batches(9)
    errors = {}
    for is_solved in (False, True):
        net = nf.fission(
            model,
            2,
            grouping="channels",
            stages=["first", "second"],
            batches=training,
            reconstruct=is_solved,
        )
        errors[is_solved] = (net.eval()(images) - model(images)[:, None]).pow(2).mean((0, 2))
    assert (errors[True] < 0.5 * errors[False]).all(), errors


def test_reconstruction_needs_images_and_channels(model: nn.Module) -> None:
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(
        ValueError, match=r"batches must be of float images \(3, 8, 8\) with reconstruct=True, got none"
    ):
        nf.fission(model, 2, grouping="channels", example_input=images, reconstruct=True)
    with pytest.raises(ValueError, match="reconstruct must be False unless grouping='channels', got True"):
        nf.fission(model, 2, batches=batches(), reconstruct=True)


def test_batches_that_cannot_be_read_are_refused_in_one_line(model: nn.Module) -> None:
    def refusal(made: Any, **settings: Any) -> str:
        options = {"grouping": "channels", "example_input": torch.zeros(2, 3, 8, 8), **settings}
        with pytest.raises(ValueError, match=r"^batches must be .*") as caught:
            nf.fission(model, 2, batches=made, **options)
        return str(caught.value)

    images, labels = batches(1)[0]
    one_by_one = refusal((batch for batch in batches()), reconstruct=True)
    assert "got generator; pass a list, such as list(itertools.islice(loader, 4))" in one_by_one
    assert refusal([images], reconstruct=True).endswith(
        "a list of pairs (images, labels), got a list with Tensor"
    )
    assert refusal([(images, [1])]).endswith("got a list with tuple")
    found = "got uint8 of shape (50, 3, 8, 8)"
    assert refusal([(images.byte(), labels)], reconstruct=True).endswith(found)
    assert refusal([(images.byte(), labels)], sparsity=0.5, criterion="snip").endswith(found)
    unequal = [(images, labels), (torch.zeros(50, 3, 9, 9), labels)]
    assert refusal(unequal, reconstruct=True).endswith("got float32 of shape (50, 3, 9, 9)")


def test_batches_may_be_of_unequal_sizes_and_of_another_type_than_the_model(model: nn.Module) -> None:
    (images, labels), *_ = batches(1)
    together = [(images.double(), labels)]
    unequal = [(images[:37], labels[:37]), (images[37:], labels[37:])]
    first, second = (
        nf.fission(model, 2, grouping="channels", batches=made, reconstruct=True)
        for made in (together, unequal)
    )
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_few_values_are_held_at_once_whatever_the_size_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "RIDGE", 0.03)
    whole, features = convolutions(nn.Conv2d(8, 6, 3, padding=1)), torch.randn(IMAGES, 8, 7, 7)
    of_image = 8 * 9 * 7 * 7
    solved, largest = {}, {}
    rows_of = reconstruction._rows
    for values in (10 * of_image, of_image // 2, reconstruction._VALUES):
        sizes = []
        monkeypatch.setattr(
            reconstruction,
            "_rows",
            lambda *args, sizes=sizes: (sizes.append(args[0].numel()), rows_of(*args))[1],
        )
        monkeypatch.setattr(reconstruction, "_VALUES", values)
        path = narrowed(whole, OF_CONVOLUTIONS)
        reconstruct(path, whole, OF_CONVOLUTIONS, features, features)
        solved[values], largest[values] = path[1].weight, max(sizes)
    by_ten, by_one, at_once = solved.values()
    assert torch.allclose(by_ten, at_once, atol=1e-4) and torch.allclose(by_one, at_once, atol=1e-4)
    half = of_image // 2  # the path holds half of the channels
    assert list(largest.values()) == [20 * half, half, 64 * half]


def test_few_large_features_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "_VALUES", 100)
    for width, expected in ((30, [3, 3, 1]), (101, [1] * 7), (1, [7])):
        sizes: list[int] = []
        part = nn.Identity()
        part.register_forward_hook(lambda _, __, output, sizes=sizes: sizes.append(len(output)))
        features = torch.arange(7.0 * width).view(7, width)
        assert torch.equal(in_batches(part, features), features)
        assert sizes == expected


def test_layers_that_cannot_be_solved_are_named() -> None:
    model = ResNetV2(
        (1, 1, 1), (32, 64, 96), num_classes=10, stem_chs=32, conv_layer=StdConv2d, norm_layer=BatchNormAct2d
    ).eval()
    training = [(torch.randn(4, 3, 32, 32), torch.zeros(4).long())]
    message = r"^reconstruct leaves \d+ layers as before, .*: stages\.1\.blocks\.0\.conv2, "
    with pytest.warns(UserWarning, match=message):
        nf.fission(model, 2, grouping="channels", batches=training, reconstruct=True)


@pytest.mark.parametrize("count", [1, 128])
def test_images_that_are_all_alike_do_not_blow_weights_up(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the ridge as it is
    whole = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    half = torch.arange(32)
    kept = {"0.weight": {0: half}, "0.bias": {0: half}, "2.weight": {1: half}}
    features = torch.randn(1, 8).expand(count, 8)
    path = narrowed(whole, kept)
    reconstruct(path, whole, kept, features, features)
    assert path[2].weight.abs().max() < 1
    assert torch.allclose(path(features), whole(features), atol=1e-2)


def test_the_norms_of_a_copied_head_are_matched() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            blocks = (nn.Sequential(nn.Conv2d(8, 24, 1), nn.ReLU(), nn.Conv2d(24, 8, 1)) for _ in range(2))
            self.first, self.second = blocks
            self.norm = nn.BatchNorm2d(8)
            self.classifier = nn.Linear(8, 10)

        def forward(self, images: Tensor) -> Tensor:
            features = self.norm(self.second(self.first(self.stem(images))))
            logits: Tensor = self.classifier(features.mean((2, 3)))
            return logits

    model = Normed()
    for images, _ in batches():
        model(images)
    net = nf.fission(
        model.eval(), 2, grouping="channels", stages=["first", "second"], batches=batches(), reconstruct=True
    )
    assert not torch.equal(net.exit_paths[1].head.norm.running_var, model.norm.running_var)
