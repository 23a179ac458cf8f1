"""The invariant: a removed weight is exactly 0, whatever is done to the network."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import netfission as nf
from netfission.models import create_model
from netfission.surgery.masks import apply_masks, dense_gradients, kept_masks, prunable_weights

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


def loss_of(net: nn.Module, images: Tensor = IMAGES) -> Tensor:
    logits = net(images)
    labels = LABELS[: len(images)].repeat_interleave(logits.shape[1])
    return F.cross_entropy(logits.flatten(0, 1).float(), labels)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, watch: Watch, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        watch.zero(net)
    watch.trained(net)


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
    raw = torch.autograd.grad(loss_of(net), list(net.parameters()))
    net.zero_grad()
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
    raw = dict(
        zip(
            dict(net.named_parameters()),
            torch.autograd.grad(loss_of(net), list(net.parameters())),
            strict=True,
        )
    )
    net.zero_grad()
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
    raw = torch.autograd.grad(loss_of(net), list(net.parameters()))
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


BOOL = pytest.mark.xfail(
    raises=NotImplementedError,
    strict=True,
    reason="torch's plain average subtracts buffers; bool has no minus",
)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=BOOL if kind == "plain with buffers" else ()) for kind in AVERAGES]
)
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


def test_conversions_that_make_new_parameters(net: nf.FissionNetwork) -> None:
    watch, before = Watch(net), next(net.parameters())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        net.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert next(net.parameters()) is not before
    loss_of(net).backward()
    assert not any(net.get_parameter(n).grad[removed].any() for n, removed in watch.removed.items())
    train(net, sgd(net), watch)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_training(net: nf.FissionNetwork, backend: str) -> None:
    watch = Watch(net)
    reference = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        torch._dynamo.reset()
        compiled = torch.compile(net, backend=backend, fullgraph=True)
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


def test_distributed_training(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    parameters = [name for name, _ in build().named_parameters()]
    assert all(torch.equal(states[0][name], states[1][name]) for name in parameters)
    net = build()
    watch = Watch(net)
    net.load_state_dict(states[0])
    for name, removed in watch.removed.items():
        assert not states[0][name][removed].any()
    watch.trained(net)


def _one_process(rank: int, folder: Path) -> None:
    """Train on this rank's share of the images; every rank's removed weights must stay 0."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net = build()
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
    torch.save(net.state_dict(), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _one_process(int(sys.argv[1]), Path(sys.argv[2]))
