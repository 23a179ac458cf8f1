"""The invariant: a removed weight is exactly 0, whatever is done to the network."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune as _prune  # noqa: F401  # else `nn.utils.prune` is not there
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import netfission as nf
from netfission.grouping import GROUPINGS
from netfission.models import create_model
from netfission.surgery.masks import (
    apply_masks,
    dense_gradients,
    discard_masks,
    kept_masks,
    prunable_weights,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import processes

FEW = settings(deadline=None, max_examples=80)
CLASSES = 10


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- what is prunable -------------------------------------------------------------------------------


def test_prunable_are_the_weights_of_convolutions_linear_layers_and_attention() -> None:
    net = nn.ModuleDict(
        {
            "conv1": nn.Conv1d(2, 2, 1),
            "conv2": nn.Conv2d(2, 2, 1),
            "conv3": nn.Conv3d(2, 2, 1),
            "norm": nn.BatchNorm2d(2),
            "layer_norm": nn.LayerNorm(2),
            "embedding": nn.Embedding(3, 2),
            "attention": nn.MultiheadAttention(4, 2),
            "linear": nn.Linear(2, 2),
        }
    )
    net["twin"] = nn.Linear(2, 2)
    net["twin"].weight = net["linear"].weight
    expected = ["conv1", "conv2", "conv3", "attention", "attention.out_proj", "linear"]
    found = prunable_weights(net)
    assert [name.rpartition(".")[0] for name in found] == expected
    assert all(weight is net.get_parameter(name) for name, weight in found.items())
    assert list(prunable_weights(nn.Linear(2, 2))) == ["weight"]


def test_remove_zeroes_and_remembers() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = net[0].weight.detach().clone()
    mask = torch.rand(4, 3, generator=seeded()) > 0.5
    apply_masks(net, {"0.weight": mask})
    assert torch.equal(net[0].weight, before * mask)
    assert torch.equal(net[0].get_buffer("weight_removed"), ~mask)
    kept = kept_masks(net)
    assert torch.equal(kept["0.weight"], mask) and kept["1.weight"].all()
    assert "0.weight_removed" in net.state_dict()


def test_remove_of_an_unknown_parameter_is_a_key_error() -> None:
    with pytest.raises(AttributeError, match="wieght"):
        apply_masks(nn.Linear(2, 2), {"wieght": torch.ones(2, 2, dtype=torch.bool)})


# --- the zero invariant -----------------------------------------------------------------------------

IMAGES = torch.randn(8, 3, 8, 8, generator=seeded())
LABELS = torch.arange(8)


def build(seed: int = 0) -> nf.FissionNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = create_model("wrn-10-1", CLASSES)
    return nf.fission(model, 3, sparsity=0.3, criterion="random", example_input=IMAGES, seed=seed)


def masks_of(net: nn.Module) -> dict[str, Tensor]:
    """Where the weights are removed, in copies that nothing done to the network can change."""
    return {name: ~mask for name, mask in kept_masks(net).items() if not mask.all()}


class Watch:
    """What was removed when the watch began, and whether it is still exactly 0 while the rest moves."""

    def __init__(self, net: nn.Module) -> None:
        self.removed = masks_of(net)
        self.before = {name: net.get_parameter(name).detach().clone() for name in self.removed}
        assert len(self.removed) > 10
        self.zero(net)

    def zero(self, net: nn.Module) -> None:
        for name, removed in self.removed.items():
            weight = net.get_parameter(name).detach()
            assert torch.equal(weight[removed], torch.zeros_like(weight[removed])), name

    def trained(self, net: nn.Module) -> None:
        self.zero(net)
        now = masks_of(net)
        assert now.keys() == self.removed.keys()
        assert all(torch.equal(now[name], removed) for name, removed in self.removed.items())
        for name, removed in self.removed.items():
            weight = net.get_parameter(name).detach()
            assert weight.isfinite().all(), name
            assert not torch.equal(weight[~removed].float(), self.before[name][~removed].float()), name


@pytest.fixture
def net() -> nf.FissionNetwork:
    return build()


def loss_of(net: Callable[[Tensor], Any], images: Tensor = IMAGES, labels: Tensor = LABELS) -> Tensor:
    logits = net(images)
    labels = labels[: len(images)].repeat_interleave(logits.shape[1])
    return F.cross_entropy(logits.flatten(0, 1).float(), labels)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, watch: Watch, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        watch.zero(net)
    watch.trained(net)


def dense(net: nn.Module, loss: Callable[[nn.Module], Tensor] = loss_of) -> tuple[Tensor, ...]:
    """The gradients of all parameters, those of removed weights as well."""
    with dense_gradients(net):
        return torch.autograd.grad(loss(net), list(net.parameters()))


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


OPTIMISERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers(net: nf.FissionNetwork, name: str) -> None:
    train(net, OPTIMISERS[name](net.parameters()), Watch(net))


def test_momentum_from_before_the_weights_were_removed() -> None:
    """An optimiser that has momentum at removed positions must not move them."""
    layer = nn.Linear(6, 5, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    mask = torch.rand(5, 6, generator=seeded()) > 0.5
    apply_masks(layer, {"weight": mask})
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        assert not layer.weight[~mask].any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_an_optimiser_that_mixes_the_elements_of_a_tensor() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stages = [nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh()) for _ in range(6)]
        backbone = nf.Backbone(
            nn.Sequential(nn.Flatten(), nn.Linear(192, 16, bias=False)),
            stages,
            nn.Linear(16, CLASSES, bias=False),
            list("abcdef"),
        )
    net = nf.fission(backbone, 3, branch_after=[1, 2], sparsity=0.3, criterion="erk", example_input=IMAGES)
    train(net, torch.optim.Muon(net.parameters(), lr=0.02, weight_decay=0.1), Watch(net))


def test_lbfgs(net: nf.FissionNetwork) -> None:
    net.eval()  # running statistics must not move between the closure's calls
    watch = Watch(net)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        watch.zero(net)
        loss = loss_of(net)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        watch.zero(net)
    watch.trained(net)


def test_gradients_of_removed_weights_are_zero_and_would_not_be(net: nf.FissionNetwork) -> None:
    watch = Watch(net)
    raw = dense(net)
    loss_of(net).backward()
    for (name, parameter), gradient in zip(net.named_parameters(), raw, strict=True):
        assert parameter.grad is not None
        if name in watch.removed:
            removed = watch.removed[name]
            assert gradient[removed].any()  # else this test proves nothing
            assert not parameter.grad[removed].any()
            torch.testing.assert_close(parameter.grad[~removed], gradient[~removed])
        else:
            torch.testing.assert_close(parameter.grad, gradient)


def test_gradients_of_removed_weights_can_be_looked_at(net: nf.FissionNetwork) -> None:
    watch = Watch(net)
    raw = dict(zip(dict(net.named_parameters()), dense(net), strict=True))
    with dense_gradients(net):
        for _ in range(2):  # they are added up
            loss_of(net).backward()
        for name, removed in watch.removed.items():
            gradient = net.get_parameter(name).grad
            assert gradient is not None
            assert gradient[removed].any()
            torch.testing.assert_close(gradient, 2 * raw[name])
    for after in range(2):  # once the gradients are those left behind, once new ones
        for name, removed in watch.removed.items():
            gradient = net.get_parameter(name).grad
            assert gradient is not None
            assert not gradient[removed].any()
            torch.testing.assert_close(gradient[~removed], (2 + after) * raw[name][~removed])
        loss_of(net).backward()
    train(net, sgd(net), watch)


def test_only_the_network_asked_for_shows_its_gradients(net: nf.FissionNetwork) -> None:
    other = copy.deepcopy(net)
    with dense_gradients(other):
        loss_of(net).backward()
    assert not any(
        net.get_parameter(name).grad[removed].any() for name, removed in Watch(net).removed.items()
    )


def test_gradient_accumulation(net: nf.FissionNetwork) -> None:
    watch, optimizer = Watch(net), sgd(net)
    for _ in range(3):
        optimizer.zero_grad()
        for images in IMAGES.split(4):
            (loss_of(net, images) / 2).backward()
            assert not any(net.get_parameter(n).grad[removed].any() for n, removed in watch.removed.items())
        optimizer.step()
        watch.zero(net)
    watch.trained(net)


def test_clipping_sees_the_kept_weights_only(net: nf.FissionNetwork) -> None:
    watch, optimizer = Watch(net), sgd(net)
    raw = dense(net)
    squares = 0.0
    everything = 0.0
    for (name, _), gradient in zip(net.named_parameters(), raw, strict=True):
        everything += float(gradient.double().square().sum())
        gradient = gradient[~watch.removed[name]] if name in watch.removed else gradient
        squares += float(gradient.double().square().sum())
    loss_of(net).backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    assert float(norm) == pytest.approx(squares**0.5, rel=1e-4)
    assert float(norm) < 0.95 * everything**0.5
    optimizer.step()
    watch.trained(net)


def test_mixed_precision(net: nf.FissionNetwork) -> None:
    watch, optimizer = Watch(net), sgd(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net)
        before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        scaler.scale(loss * torch.inf if step == 2 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        watch.zero(net)
        stayed = all(torch.equal(p, before[name]) for name, p in net.named_parameters())
        assert stayed == (step == 2)  # the step of infinite gradients is skipped
    assert scaler.get_scale() < 1024.0
    watch.trained(net)


def test_infinite_gradients_of_removed_weights_do_no_harm(net: nf.FissionNetwork) -> None:
    """Multiplied by a mask they would turn into NaN and, under AMP, skip every step."""
    watch, optimizer = Watch(net), sgd(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for name, removed in watch.removed.items():
        net.get_parameter(name).register_hook(lambda g, r=removed: g.masked_fill(r, torch.inf))
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(loss_of(net)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0
    watch.trained(net)


AVERAGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)},
    "ema with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.5), "use_buffers": True},
    "ema one by one": {"avg_fn": get_ema_avg_fn(0.5), "use_buffers": True},
    "plain with buffers": {"use_buffers": True},
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_of_the_weights(net: nf.FissionNetwork, kind: str) -> None:
    watch, optimizer = Watch(net), sgd(net)
    average = AveragedModel(net, **AVERAGES[kind])
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        average.update_parameters(net)
        watch.zero(average.module)
    watch.trained(average.module)
    train(average.module, sgd(average.module), watch)  # and go on from the average


def frozen(net: nf.FissionNetwork) -> nf.FissionNetwork:
    thawed = copy.deepcopy(copy.deepcopy(net).requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in thawed.parameters())
    return thawed.requires_grad_(True)


def saved(net: nf.FissionNetwork) -> nf.FissionNetwork:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded: nf.FissionNetwork = torch.load(file, weights_only=False)
    return loaded


def state_saved(net: nf.FissionNetwork) -> nf.FissionNetwork:
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = build(seed=1)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return other


def assigned(net: nf.FissionNetwork) -> nf.FissionNetwork:
    other = build(seed=1)
    other.load_state_dict(copy.deepcopy(net.state_dict()), strict=True, assign=True)
    return other


def through_meta(net: nf.FissionNetwork) -> nf.FissionNetwork:
    other = build(seed=1).to("meta")
    other.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    return other


def emptied(net: nf.FissionNetwork) -> nf.FissionNetwork:
    other = build(seed=1).to("meta").to_empty(device="cpu")
    other.load_state_dict(net.state_dict())
    return other


def in_ensemble(net: nf.FissionNetwork) -> nf.FissionNetwork:
    loaded = pickle.loads(pickle.dumps(copy.deepcopy(net.ensemble())))
    assert isinstance(loaded, nf.Ensemble)
    return loaded.network


COPIES: dict[str, Callable[[nf.FissionNetwork], nf.FissionNetwork]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy twice": lambda net: copy.deepcopy(copy.deepcopy(net)),
    "deepcopy while frozen": frozen,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": saved,
    "state dict into another seed": state_saved,
    "state dict, assigned": assigned,
    "meta device, assigned": through_meta,
    "meta device, emptied": emptied,
    "inside an ensemble": in_ensemble,
    "there and back": lambda net: copy.deepcopy(net).double().float(),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_keep_the_zeros_in_training(net: nf.FissionNetwork, kind: str) -> None:
    train(net, sgd(net), Watch(net), steps=1)
    other = COPIES[kind](net)
    watch = Watch(net)
    state = net.state_dict()
    assert list(other.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    assert torch.equal(other.eval()(IMAGES), net.eval()(IMAGES))
    train(other.train(), sgd(other), watch)
    train(other, torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.1), watch)


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_independent(net: nf.FissionNetwork, kind: str) -> None:
    other = COPIES[kind](net)
    state = copy.deepcopy(net.state_dict())
    train(other, sgd(other), Watch(other))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    state = copy.deepcopy(other.state_dict())
    train(net, sgd(net), Watch(net))
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    buffers = {buffer.data_ptr() for buffer in net.buffers()}
    assert buffers.isdisjoint(buffer.data_ptr() for buffer in other.buffers())


def test_the_copy_outlives_the_original() -> None:
    net = build()
    watch, other = Watch(net), copy.deepcopy(net)
    del net
    train(other, sgd(other), watch)


def test_a_frozen_network_keeps_its_zeros_once_it_thaws() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("wrn-10-1", CLASSES).requires_grad_(False)
    net = nf.fission(model, 3, sparsity=0.3, criterion="random", example_input=IMAGES)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    net.requires_grad_(True)
    watch = Watch(net)
    loss_of(net).backward()
    assert not any(net.get_parameter(n).grad[removed].any() for n, removed in watch.removed.items())
    train(net, sgd(net), watch)


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_that_fills_removed_places_is_cleared(net: nf.FissionNetwork, strict: bool) -> None:
    watch = Watch(net)
    state = {
        name: torch.ones_like(value) for name, value in net.state_dict().items() if "_removed" not in name
    }
    if strict:
        state |= {name: value for name, value in net.state_dict().items() if "_removed" in name}
    net.load_state_dict(state, strict=strict)
    watch.zero(net)
    for name, removed in watch.removed.items():
        assert (net.get_parameter(name)[~removed] == 1).all()


def test_a_plain_state_of_another_shape_of_network_is_refused(net: nf.FissionNetwork) -> None:
    plain = {name: value for name, value in net.state_dict().items() if "_removed" not in name}
    with pytest.raises(RuntimeError, match="weight_removed"):
        net.load_state_dict(plain)


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda net: net.half().float(),
    "bfloat16": lambda net: net.bfloat16(),
    "double": lambda net: net.double(),
    "to": lambda net: net.to("cpu", torch.float64),
    "channels_last": lambda net: net.to(memory_format=torch.channels_last),
    "share_memory": lambda net: net.share_memory(),
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_conversions(net: nf.FissionNetwork, kind: str) -> None:
    watch = Watch(net)
    assert CONVERSIONS[kind](net) is net
    assert all(buffer.dtype is torch.bool for name, buffer in net.named_buffers() if "_removed" in name)
    optimizer = sgd(net)
    images = IMAGES.to(next(net.parameters()).dtype)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(net, images).backward()
        optimizer.step()
        watch.zero(net)
    watch.trained(net)


@pytest.fixture(params=["overwrite", "swap"])
def new_parameters(request: pytest.FixtureRequest) -> Iterator[str]:
    """PyTorch's two settings under which a conversion does not change a parameter's data in place."""
    turn = getattr(torch.__future__, f"set_{request.param}_module_params_on_conversion")
    turn(True)
    yield request.param
    turn(False)


def test_conversions_that_make_new_parameters(net: nf.FissionNetwork, new_parameters: str) -> None:
    watch, before = Watch(net), next(net.parameters())
    net.double()
    assert (next(net.parameters()) is before) == (new_parameters == "swap")
    loss_of(net, IMAGES.double()).backward()
    zero_gradients(net)
    net.zero_grad()
    train(net.float(), sgd(net), watch)
    net.load_state_dict(copy.deepcopy(net.state_dict()))  # swaps parameters as well
    train(net, sgd(net), watch)


# --- the forward pass, whatever changed a weight -----------------------------------------------------


def zero_gradients(net: nn.Module) -> None:
    """Assert that gradients of removed weights are 0 and those of others are not."""
    for name, removed in masks_of(net).items():
        gradient = net.get_parameter(name).grad
        assert gradient is not None and gradient.any(), name
        assert not gradient[removed].any(), name


def plain(net: nf.FissionNetwork) -> nn.Module:
    """A copy without masks, its removed weights set to 0 by multiplication."""
    stored = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    other = copy.deepcopy(net)
    discard_masks(other)
    kept = kept_masks(net)
    for name, parameter in other.named_parameters():
        parameter.data.copy_(stored[name] * kept.get(name, 1))
    return other.requires_grad_(True)


def gradient_steps(net: nn.Module) -> None:
    parameters = list(net.parameters())
    for _ in range(2):
        gradients = torch.autograd.grad(loss_of(net), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.1 * gradient


def noise(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=seeded()))


def noise_on_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data.add_(torch.rand(parameter.shape, generator=seeded()))


def other_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data = torch.rand(parameter.shape, generator=seeded())


def vector(net: nn.Module) -> None:
    size = sum(parameter.numel() for parameter in net.parameters())
    nn.utils.vector_to_parameters(torch.rand(size, generator=seeded()), net.parameters())


def initialised(net: nn.Module) -> None:
    for name in masks_of(net):
        nn.init.kaiming_normal_(net.get_parameter(name), generator=seeded())


def other_parameters(net: nn.Module) -> None:
    for name in masks_of(net):
        path, _, attribute = name.rpartition(".")
        weight = net.get_parameter(name)
        setattr(net.get_submodule(path), attribute, nn.Parameter(torch.rand_like(weight)))


def stage_loaded(net: nn.Module) -> None:
    stage = net.get_submodule("paths.1.stages.0")
    full = {
        name: value if "_removed" in name else torch.ones_like(value)
        for name, value in stage.state_dict().items()
    }
    stage.load_state_dict(full)


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "steps by autograd.grad": gradient_steps,
    "noise": noise,
    "noise on .data": noise_on_data,
    "another .data": other_data,
    "vector_to_parameters": vector,
    "nn.init": initialised,
    "other parameters": other_parameters,
    "load_state_dict of a stage": stage_loaded,
}


@pytest.mark.parametrize("kind", CHANGES)
def test_the_forward_pass_uses_zeros_whatever_changed_a_weight(net: nf.FissionNetwork, kind: str) -> None:
    watch = Watch(net)
    CHANGES[kind](net)
    expected = plain(net).eval()(IMAGES)
    assert torch.equal(net.eval()(IMAGES), expected)
    watch.zero(net)  # the stored weights are 0 again
    loss_of(net.train()).backward()
    zero_gradients(net)
    train(net, sgd(net), watch)


@pytest.mark.parametrize("kind", CHANGES)
def test_a_state_dict_holds_zeros_whatever_changed_a_weight(net: nf.FissionNetwork, kind: str) -> None:
    CHANGES[kind](net)
    state = net.state_dict()
    assert all(not state[name][removed].any() for name, removed in masks_of(net).items())


def test_weights_that_change_while_the_network_is_frozen(net: nf.FissionNetwork) -> None:
    net.requires_grad_(False)
    noise_on_data(net)
    assert torch.equal(net.eval()(IMAGES), plain(net).eval()(IMAGES))


def test_weights_that_are_made_in_inference_mode(net: nf.FissionNetwork) -> None:
    with torch.inference_mode():
        other = copy.deepcopy(net).eval()
        noise_on_data(other)
        expected = other(IMAGES)
    with torch.no_grad():
        assert torch.equal(other(IMAGES), expected)
        noise_on_data(net)
        assert torch.equal(net.eval()(IMAGES), expected)


def test_a_stage_alone(net: nf.FissionNetwork) -> None:
    stage = copy.deepcopy(net.exit_paths[0].stages[0])
    noise_on_data(stage)
    stage(torch.rand(2, 16, 8, 8, generator=seeded())).square().sum().backward()
    zero_gradients(stage)
    Watch.zero(watch_of(stage), stage)


def watch_of(module: nn.Module) -> Watch:
    watch = Watch.__new__(Watch)
    watch.removed = masks_of(module)
    return watch


def test_a_forward_pass_that_a_checkpoint_repeats(net: nf.FissionNetwork) -> None:
    reference = copy.deepcopy(net)
    noise_on_data(net)
    noise_on_data(reference)
    loss_of(lambda images: checkpoint(net, images, use_reentrant=False)).backward()  # type: ignore[arg-type]
    loss_of(reference).backward()
    zero_gradients(net)
    for one, other in zip(net.parameters(), reference.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


def test_gradients_of_gradients(net: nf.FissionNetwork) -> None:
    gradients = torch.autograd.grad(loss_of(net), list(net.parameters()), create_graph=True)
    torch.stack([gradient.square().sum() for gradient in gradients]).sum().backward()
    zero_gradients(net)


def test_hooks_that_change_gradients(net: nf.FissionNetwork) -> None:
    net(IMAGES)
    for parameter in net.parameters():
        parameter.register_hook(lambda gradient: gradient + 1)
    loss_of(net).backward()
    zero_gradients(net)


def test_functional_calls(net: nf.FissionNetwork) -> None:
    net.eval()
    given = {name: torch.rand_like(p) for name, p in net.named_parameters()}
    before = {name: value.clone() for name, value in given.items()}
    gradients = torch.func.grad(lambda values: loss_of(partial(functional_call, net, values)))(given)
    for name, removed in masks_of(net).items():
        assert gradients[name].any() and not gradients[name][removed].any()
    assert all(torch.equal(value, before[name]) for name, value in given.items())  # pure
    zeros = {name: value * kept_masks(net).get(name, 1) for name, value in given.items()}
    assert torch.equal(functional_call(net, given, IMAGES), functional_call(net, zeros, IMAGES))


def test_a_functional_call_leaves_the_parameters_of_others_alone(net: nf.FissionNetwork) -> None:
    others = [plain(build(seed=1)), build(seed=1)]
    for other in others:
        noise_on_data(other)
        state = copy.deepcopy(dict(other.named_parameters()))
        loss_of(partial(functional_call, net, dict(other.named_parameters()))).backward()
        for name, parameter in other.named_parameters():
            assert torch.equal(parameter, state[name]), name
    gradient = next(iter(others[0].parameters())).grad
    assert gradient is not None
    others[0](IMAGES).sum().backward()
    assert all(p.grad is not None and p.grad.all() for n, p in others[0].named_parameters() if "conv" in n)


def test_several_networks_by_vmap() -> None:
    nets = [build(seed).eval() for seed in range(2)]
    states = torch.func.stack_module_state(nets)
    for value in states[0].values():
        value.data.add_(1.0)
    outputs = torch.func.vmap(lambda p, b: functional_call(nets[0], (p, b), IMAGES))(*states)
    for output, one in zip(outputs, nets, strict=True):
        for parameter in one.parameters():
            parameter.data.add_(1.0)
        torch.testing.assert_close(output, plain(one).eval()(IMAGES), rtol=1e-4, atol=1e-3)


def test_gradients_by_example(net: nf.FissionNetwork) -> None:
    net.eval()
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, values, image[None])[:, 2], label[None])

    by_example = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, IMAGES, LABELS)
    for name, removed in masks_of(net).items():
        assert not by_example[name][:, removed].any()


def masked_linear() -> nn.Linear:
    layer = nn.Linear(3, 2, bias=False)
    apply_masks(layer, {"weight": torch.tensor([[True, False, True], [False, True, True]])})
    return layer


def test_parametrizations_are_refused() -> None:
    layer = masked_linear()
    weight = layer.weight
    for parametrization in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        with pytest.raises(
            ValueError, match=r"^weight must be a plain parameter of Linear while some of its"
        ):
            parametrization(layer)
        assert layer.weight is weight and list(layer.state_dict()) == ["weight", "weight_removed"]


def pruned(layer: nn.Module) -> nn.Module:
    return nn.utils.prune.random_unstructured(layer, "weight", amount=1)


def normed(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [(pruned, nn.utils.prune.remove), (normed, nn.utils.remove_weight_norm)],
)
def test_hooks_that_compute_the_weight(
    wrap: Callable[[nn.Module], nn.Module], unwrap: Callable[..., nn.Module]
) -> None:
    layer = masked_linear()
    removed = layer.get_buffer("weight_removed")
    wrap(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(torch.rand(4, 3, generator=seeded())) + 1).square().sum().backward()
        optimizer.step()
        for parameter in layer.parameters():
            parameter.data.add_(0.1)
        outputs = layer(torch.eye(3)).T  # the weight that the layer uses
        assert not outputs[removed].any() and outputs[~removed].any()
    unwrap(layer, "weight")
    nn.init.ones_(layer.weight)
    assert torch.equal(layer(torch.eye(3)).T, 1 - removed.float())
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad is not None and not layer.weight.grad[removed].any()


def test_weights_that_another_module_reads() -> None:
    """Attention reads the weight of its output projection without a call of that layer."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    kept = {n: torch.rand(w.shape, generator=seeded()) > 0.5 for n, w in prunable_weights(attention).items()}
    apply_masks(attention, kept)
    noise_on_data(attention)
    reference = nn.MultiheadAttention(8, 2, batch_first=True)
    reference.load_state_dict(
        {name: p.detach() * kept.get(name, 1) for name, p in attention.named_parameters()}
    )
    tokens = torch.rand(2, 5, 8, generator=seeded())
    output, expected = (module(tokens, tokens, tokens)[0] for module in (attention, reference))
    assert torch.equal(output, expected)
    output.sum().backward()
    zero_gradients(attention)


def test_replicas_of_data_parallel() -> None:
    """Replicas hold the copies of parameters as plain attributes."""
    layer = masked_linear()
    replica = layer._replicate_for_data_parallel()
    weight = torch.rand(2, 3, requires_grad=True)
    replica.weight, replica.bias = weight * 1, None
    assert torch.equal(replica(torch.eye(3)).T, weight * ~layer.get_buffer("weight_removed"))
    assert isinstance(layer.weight, nn.Parameter)


def test_masked_layers_look_like_their_class() -> None:
    layer = masked_linear()
    assert isinstance(layer, nn.Linear)
    assert repr(layer) == repr(nn.Linear(3, 2, bias=False))
    apply_masks(layer, {"weight": torch.ones(2, 3, dtype=torch.bool)})  # once more
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer)), layer):
        assert type(other) is type(layer) is not nn.Linear
    discard_masks(layer)
    assert type(layer) is nn.Linear


def test_compiled_network_whose_weights_change(net: nf.FissionNetwork) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        torch._dynamo.reset()
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            noise_on_data(net)
            expected = plain(net)(IMAGES)
            output = compiled(IMAGES)
            torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
        output.square().sum().backward()
        zero_gradients(net)
        with dense_gradients(net):
            raw = torch.autograd.grad(loss_of(compiled), list(net.parameters()))
        torch._dynamo.reset()
    for gradient, expected in zip(raw, dense(net), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_network_whose_weights_changed(net: nf.FissionNetwork, strict: bool) -> None:
    noise_on_data(net.eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.export.export(net, (IMAGES,), strict=strict)
    assert torch.equal(program.module()(IMAGES), plain(net).eval()(IMAGES))


def test_compiled_training(net: nf.FissionNetwork) -> None:
    watch = Watch(net)
    reference = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        torch._dynamo.reset()
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        optimizer, of_reference = sgd(net), sgd(reference)
        for _ in range(2):
            for module, chosen in ((compiled, optimizer), (reference, of_reference)):
                chosen.zero_grad()
                loss_of(module).backward()
                chosen.step()
            watch.zero(net)
        torch._dynamo.reset()
    watch.trained(net)
    for one, other in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_exported(net: nf.FissionNetwork) -> None:
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(net, (IMAGES,), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(IMAGES), net(IMAGES))
    assert program.module()(IMAGES[:3]).shape == (3, 3, CLASSES)


def test_other_networks_in_the_process_are_left_alone(net: nf.FissionNetwork) -> None:
    plain = nn.Linear(4, 4)
    optimizer = torch.optim.SGD([*plain.parameters(), *net.parameters()], lr=0.1)
    before = plain.weight.detach().clone()
    (plain(torch.ones(2, 4)).sum() + loss_of(net)).backward()
    optimizer.step()
    torch.testing.assert_close(plain.weight, before - 0.1 * 2)


# --- two processes ----------------------------------------------------------------------------------

BATCHES = [(IMAGES.double() + step, LABELS) for step in range(3)]
PARALLEL = ["ddp", "fsdp2_network", "fsdp2_parts", "fsdp2_layers"]


def test_distributed_training(in_two_processes: Callable[[str], list[dict[str, Tensor]]]) -> None:
    states = in_two_processes("ddp")
    parameters = [name for name, _ in build().named_parameters()]
    assert all(torch.equal(states[0][name], states[1][name]) for name in parameters)
    net = build()
    watch = Watch(net)
    net.load_state_dict(states[0])
    for name, removed in watch.removed.items():
        assert not states[0][name][removed].any()
    watch.trained(net)


@pytest.mark.parametrize("sharding", PARALLEL[1:])
def test_fully_sharded_training_equals_one_process(
    sharding: str, in_two_processes: Callable[[str], list[dict[str, Tensor]]]
) -> None:
    states = in_two_processes(sharding)
    net = build().eval()  # running statistics would be each process's own
    optimizer = sgd(net)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(net, IMAGES + step).backward()
        optimizer.step()
    for state in states:
        assert state.keys() == net.state_dict().keys()
        for name, value in net.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_two_processes_on_half_of_each_batch_equal_one(
    grouping: str, in_two_processes: Callable[[str], list[dict[str, Any]]]
) -> None:
    trial = processes.compare("plain", grouping, in_two_processes(grouping), BATCHES, BATCHES[0])
    assert trial["good"], trial
    assert trial["largest_difference"] < 1e-14
    assert (trial["removed_weights"] > 0) == (grouping != "channels")


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """Train in every way in the same two processes; return what each has at the end by the way."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("parallel")
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    return lambda kind: [torch.load(folder / f"{kind}{rank}.pt", weights_only=True) for rank in range(2)]


def _one_process(rank: int, folder: Path) -> None:
    """Train on this rank's share of the images; every rank's removed weights must stay 0."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for kind in PARALLEL:
        train_parallel = _ddp if kind == "ddp" else _fsdp2
        torch.save(train_parallel(build(), rank, kind), folder / f"{kind}{rank}.pt")
    for grouping in GROUPINGS:
        net = processes.make_network("plain", grouping)
        torch.save(processes.train(net, BATCHES, rank, 2), folder / f"{grouping}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _ddp(net: nf.FissionNetwork, rank: int, _: str) -> dict[str, Tensor]:
    watch, optimizer = Watch(net), sgd(net)
    parallel = nn.parallel.DistributedDataParallel(net)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(parallel, IMAGES[rank::2] + step).backward()
        for name, removed in watch.removed.items():
            gradient = net.get_parameter(name).grad
            assert gradient is not None and not gradient[removed].any(), name
        optimizer.step()
        watch.zero(net)
    watch.trained(net)
    return net.state_dict()


def _fsdp2(net: nf.FissionNetwork, rank: int, kind: str) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    removed = masks_of(net)
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    parts = {"network": [], "parts": [net.stem, *net.exit_paths], "layers": layers}
    for part in (*parts[kind.removeprefix("fsdp2_")], net):
        fully_shard(part)
    optimizer = sgd(net.eval())
    for step in range(3):
        optimizer.zero_grad()
        loss_of(net, IMAGES[rank::2] + step, LABELS[rank::2]).backward()
        optimizer.step()
        if step == 1:  # other changes do no harm
            for name in removed:
                weight = net.get_parameter(name)
                assert isinstance(weight, DTensor)
                noise = distribute_tensor(1.0 * removed[name], weight.device_mesh, weight.placements)
                weight.data.add_(noise)
    whole = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(net, options=whole)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1)
    set_model_state_dict(net, dict(state), options=whole)  # which replaces what is in it
    for name, value in net.state_dict().items():
        assert torch.equal(value.full_tensor() if isinstance(value, DTensor) else value, state[name]), name
    return state


if __name__ == "__main__":
    _one_process(int(sys.argv[1]), Path(sys.argv[2]))
