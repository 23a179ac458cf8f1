"""What is given in place of a network is refused in one line that names the cause and what to pass."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import netfission as nf
from netfission.models import create_model
from netfission.surgery.backbone import cut

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(classes: int = 10) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model("wrn-10-1", classes)


def divided() -> nf.FissionNetwork:
    return nf.fission(network(), 2, example_input=IMAGES)


def hooked(put: Callable[[nn.Module], object], make: Callable[[], Any] = network) -> nn.Module:
    model: nn.Module = make()
    put(model.get_submodule("block1.0.conv1" if make is network else "stem.conv1"))
    return model


class ModelOutput(OrderedDict[str, Tensor]):
    """As Hugging Face's: a dictionary whose entries are attributes, too."""

    def __getattr__(self, name: str) -> Tensor:
        if name in self:
            return self[name]
        raise AttributeError(name)


@dataclass
class DataOutput:
    logits: Tensor
    loss: Tensor | None = None


class Returns(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = network()
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        return self.answer(self.inner(images))


class _Fsdp(nn.Module):
    """Stands for torch.distributed.fsdp.FullyShardedDataParallel, which needs several processes."""


_Fsdp.__name__ = "FullyShardedDataParallel"


def quantised() -> nn.Module:
    kind = type("Linear", (nn.Module,), {"__module__": "torch.ao.nn.quantized.dynamic.modules.linear"})
    model = network()
    model.fc = kind()
    return model


def lazy() -> nn.Module:
    model = network()
    model.fc = nn.LazyLinear(10)
    return model


WRAPPED = {
    "compiled": (lambda module: torch.compile(module, backend="eager"), "OptimizedModule", "_orig_mod"),
    "data parallel": (nn.DataParallel, "DataParallel", "module"),
    "averaged": (torch.optim.swa_utils.AveragedModel, "AveragedModel", "module"),
    "sharded": (lambda module: _Fsdp(), "FullyShardedDataParallel", "module"),
}
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    name: (
        lambda wrap=wrap: wrap(network()),
        rf"^model must be a plain network, got {kind}, which wraps it; pass model\.{attribute}$",
    )
    for name, (wrap, kind, attribute) in WRAPPED.items()
} | {
    "scripted": (
        lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1))),
        r"^model must be a plain network, got RecursiveScriptModule, compiled by torch\.jit; pass the modu",
    ),
    "exported": (
        lambda: torch.export.export(network().eval(), (IMAGES,)).module(),
        r"^model must be a plain network, got GraphModule of functions .*; pass the module that it was ",
    ),
    "quantised": (
        quantised,
        r"^model must be a plain network, got quantised layer 'fc'; pass the network be",
    ),
    "pruned": (
        lambda: hooked(lambda layer: prune.l1_unstructured(layer, "weight", 0.3)),
        r"^model must be made of plain layers, got layer 'block1\.0\.conv1', whose weight a hook computes; "
        r"call torch\.nn\.utils\.prune\.remove\(layer, 'weight'\) first$",
    ),
    "spectral norm": (
        lambda: hooked(nn.utils.spectral_norm),
        r"'block1\.0\.conv1', .*; call torch\.nn\.utils\.remove_spectral_norm\(layer, 'weight'\) ",
    ),
    "lazy": (
        lazy,
        r"^model must be a network with values, got 'fc\.weight' without a shape; run it on images",
    ),
    "meta": (
        lambda: network().to("meta"),
        r"^model must be a network with values, got 'conv1\.weight' on the meta device; give it values on",
    ),
    "a name": (
        lambda: "resnet18",
        r"^model must be a network \(an instance of nn\.Module\), got 'resnet18'$",
    ),
    "a class": (lambda: nn.Linear, r"^model must be a network \(an .*\), got <class 'torch\..*Linear'>$"),
    "a function": (lambda: network, r"^model must be a network \(an .*\), got function$"),
    "one logit": (
        lambda: network(1),
        r"^model must be a classifier of two classes or more, got WideResNet with one logit per image; give",
    ),
    "tuple": (
        lambda: Returns(lambda logits: (logits, logits)),
        r"^model must be a classifier .*, got Returns with output tuple in eval mode; wrap it .* alone$",
    ),
    "dict": (
        lambda: Returns(lambda logits: {"logits": logits}),
        r" got Returns with output dict in eval mode; wrap it .* logits alone \(output\['logits'\]\)$",
    ),
    "model output": (
        lambda: Returns(lambda logits: ModelOutput(logits=logits)),
        r" got Returns with output ModelOutput in eval mode; wrap it .* logits alone \(output\.logits\)$",
    ),
    "data class": (
        lambda: Returns(DataOutput),
        r" got Returns with output DataOutput in eval mode; wrap it .* logits alone \(output\.logits\)$",
    ),
}


@pytest.mark.parametrize("divide", [lambda model: nf.fission(model, 2, example_input=IMAGES), None])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*(torch.jit.script|spectral_norm)")
def test_what_is_not_the_plain_network_is_refused(name: str, divide: Any) -> None:
    make, message = CASES[name]
    model = make()
    with pytest.raises(ValueError, match=message) as raised:
        (divide or (lambda model: cut(model, IMAGES)))(model)
    assert "\n" not in str(raised.value)


def test_what_a_refusal_asks_for_is_accepted() -> None:
    compiled = torch.compile(network(), backend="eager")
    model = hooked(lambda layer: prune.l1_unstructured(layer, "weight", 0.3))
    prune.remove(model.get_submodule("block1.0.conv1"), "weight")
    inner = Returns(lambda logits: ModelOutput(logits=logits))

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.inner(images).logits
            return logits

    for accepted in (compiled._orig_mod, model, Logits()):
        assert nf.fission(accepted, 2, example_input=IMAGES)(IMAGES).shape == (2, 2, 10)


USES: dict[str, Callable[[Any], object]] = {
    "deploy": lambda net: nf.deploy(net, IMAGES),
    "from_network": lambda net: nf.Classifier.from_network(
        net, model=None, classes=list("abcdefghij"), shape=(3, 8, 8), mean=[0.5] * 3, std=[0.2] * 3
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_network_is_refused_where_its_parts_are_used(use: str, name: str) -> None:
    wrap, kind, attribute = WRAPPED[name]
    message = rf"^network must be a plain network, got {kind}, which wraps it; pass network\.{attribute}$"
    with pytest.raises(ValueError, match=message):
        USES[use](wrap(divided()))


def test_a_cascade_names_the_network_within_a_wrapper() -> None:
    with pytest.raises(ValueError, match=r"^network must be a plain network, .*; pass network\.module$"):
        nf.Cascade(nn.DataParallel(divided()), [0.5], order=[1, 0])  # type: ignore[arg-type]


@pytest.mark.parametrize("use", USES)
def test_a_network_of_another_kind_is_refused(use: str) -> None:
    with pytest.raises(
        ValueError, match=r"^network must be a FissionNetwork, got WideResNet; make one with "
    ):
        USES[use](network())


@pytest.mark.parametrize("name", ["network", "reference"])
def test_the_cost_of_a_network_that_cannot_be_copied_is_refused(name: str) -> None:
    pruned = hooked(lambda layer: prune.l1_unstructured(layer, "weight", 0.3), divided)
    networks = {"network": network(), "reference": network()} | {name: pruned}
    with pytest.raises(ValueError, match=rf"^{name} must be made of plain layers, .*prune\.remove\("):
        nf.cost(networks["network"], IMAGES, networks["reference"], batch_sizes=[1], rounds=1)
