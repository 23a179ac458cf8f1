"""Singular Value Ensemble: what members share, what they learn, and its use as one of the methods."""

from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

import netfission as nf
from netfission.classifier import folder
from netfission.config import FissionConfig, MethodConfig, RunConfig
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.member_layers import find_classifiers
from netfission.methods.registry import check_settings, find_method
from netfission.methods.singular_value_ensemble import (
    NOISE,
    SingularValueAttention,
    SingularValueLinear,
)
from netfission.models import create_model
from netfission.runs import setup
from netfission.runs.train import train

METHOD = "singular-value-ensemble"
IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def small_vit(*_: object, **__: object) -> nn.Module:
    """A vision transformer of width 10, the number of its classes, for grey images of 8×8 pixels."""
    settings = {"embed_dim": 10, "num_heads": 2, "depth": 1, "in_chans": 1, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, **settings)


class Encoder(nn.Module):
    """A classifier with `nn.MultiheadAttention` in an encoder layer, and a layer that reads no images."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Linear(8, 12)
        self.encoder = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = nn.functional.pad(images[:, 0], (0, 4)) + self.positions(torch.eye(8))
        return self.head(self.encoder(tokens).mean(dim=1))


class TokensBeforeImages(Encoder):
    """The same with the tokens first, as encoder layers have them by default."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(12, 3, 24)

    def forward(self, images: Tensor) -> Tensor:
        tokens = nn.functional.pad(images[:, 0], (0, 4)) + self.positions(torch.eye(8))
        return self.head(self.encoder(tokens.transpose(0, 1)).mean(dim=0))


class TokensFirst(nn.Module):
    """A classifier whose last layers read an image's rows in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 6)
        self.head = nn.Linear(6, 10)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.embed(images[:, 0].transpose(0, 1).flatten(0, 1))
        return self.head(rows.unflatten(0, (8, -1)).mean(dim=0))


def plan(create, **settings) -> BuildPlan:
    return BuildPlan(partial(call_with_seed, create), FissionConfig(**settings), torch.zeros(2, 1, 8, 8))


def build(create, **settings) -> nn.Module:
    return find_method(MethodConfig(METHOD)).build(plan(create, **settings))


def merged(create, network: nn.Module, member: int) -> nn.Module:
    """The single network that a member is."""
    model = plan(create).create(0).eval()
    for name, module in network.network.named_modules():
        if isinstance(module, SingularValueAttention):
            layers = list(module.projections)
            attention = model.get_submodule(name)
            attention.in_proj_weight.data = torch.cat([layer.weight()[member] for layer in layers])
            attention.in_proj_bias.data = torch.cat([layer.bias[member] for layer in layers])
        elif isinstance(module, SingularValueLinear) and "projections" not in name:
            model.get_submodule(name).weight.data = module.weight()[member].detach()
            model.get_submodule(name).bias.data = module.bias[member].detach()
    model.head.weight.data = network.network.head.weight[member].detach()
    model.head.bias.data = network.network.head.bias[member].detach()
    return model


@pytest.mark.parametrize(("create", "decomposed"), [(small_vit, 4), (Encoder, 6)])
def test_each_member_is_the_network_with_other_singular_values(create, decomposed):
    network = build(create, exits=3).eval()
    layers = [module for module in network.modules() if isinstance(module, SingularValueLinear)]
    assert len(layers) == decomposed  # of the attention 2 or 4, of the MLP 2
    with torch.no_grad():
        for layer in layers:
            layer.values *= torch.rand_like(layer.values) + 0.5
    logits = network(IMAGES)
    for member in range(3):
        torch.testing.assert_close(
            logits[:, member], merged(create, network, member)(IMAGES), rtol=1e-4, atol=1e-5
        )
    assert not torch.allclose(logits[:, 0], logits[:, 1], atol=1e-3)


@pytest.mark.parametrize("create", [small_vit, Encoder])
def test_factors_and_weights_give_the_same_and_copies_work(create, tmp_path):
    network = build(create, exits=3).eval()
    layer = next(module for module in network.modules() if isinstance(module, SingularValueLinear))
    rows = torch.rand(6, 5, layer.right.shape[1])
    torch.testing.assert_close(layer(rows), layer.train()(rows))
    layer.eval()
    torch.save(network, tmp_path / "network.pt")
    again = torch.load(tmp_path / "network.pt", weights_only=False)
    images = torch.rand(5, 1, 8, 8)
    assert torch.equal(again(images), network(images))
    torch.testing.assert_close(network(images[2:3]), network(images)[2:3])


def test_members_start_near_the_weight():
    layer = nn.Linear(40, 60)
    found = SingularValueLinear(layer, 5, torch.Generator().manual_seed(0))
    ratio = found.values / torch.linalg.svdvals(layer.weight)
    assert ratio.mean().item() == pytest.approx(1, abs=0.005)
    assert ratio.std().item() == pytest.approx(NOISE, rel=0.2)
    assert (found.bias - layer.bias).std().item() == pytest.approx(NOISE, rel=0.2)
    torch.testing.assert_close(found.weight()[0], layer.weight, atol=NOISE, rtol=0)
    assert not torch.equal(found.values[0], found.values[1])


def test_a_negative_singular_value_counts_as_0():
    layer = SingularValueLinear(nn.Linear(3, 3), 1, torch.Generator())
    layer.values.data[:] = torch.tensor([1.0, -1.0, -2.0])
    assert torch.linalg.matrix_rank(layer.weight()[0]) == 1


def test_only_singular_values_biases_and_classifiers_are_trained():
    network = build(small_vit)
    trained = {name: p.numel() for name, p in network.named_parameters() if p.requires_grad}
    of_one = (10 + 30) + (10 + 10) + (10 + 40) + (10 + 10) + (100 + 10)  # qkv, proj, fc1, fc2, head
    assert sum(trained.values()) == 3 * of_one
    frozen = {name: p.clone() for name, p in network.named_parameters() if not p.requires_grad}
    before = {name: p.clone() for name, p in network.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(network.parameters(), 0.01)
    nf.EnsembleDistillationLoss(weight=0.0)(network(IMAGES), torch.arange(4)).backward()
    optimizer.step()
    after = dict(network.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in frozen.items())
    assert not any(torch.equal(after[name], p) for name, p in before.items())


def test_the_last_layer_of_an_mlp_as_wide_as_the_classes_is_no_classifier():
    assert find_classifiers(small_vit(), plan(small_vit), METHOD) == {"head"}


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (
            partial(create_model, "wrn-10-1", 10, in_channels=1),
            "a network with linear layers beside its classifier, got WideResNet without them",
        ),
        (
            TokensBeforeImages,
            "a network whose layers read batches with the images first, got one whose layer "
            "'encoder.linear1' reads them otherwise",
        ),
        (
            TokensFirst,
            "a network whose attention reads batches with the images first, got one that orders them "
            "otherwise",
        ),
    ],
)
def test_unsuitable_models_are_refused(create, message):
    with pytest.raises(ValueError, match=f"^model with method={METHOD} must be {message}$"):
        build(create, exits=2)


def test_it_needs_trained_weights():
    with pytest.raises(
        ValueError, match=rf"^pretrained must be True, .*{METHOD}, got False; all but singular"
    ):
        check_settings(RunConfig.from_dict({"method": METHOD}))


def test_it_is_trained_evaluated_saved_and_loaded(monkeypatch, tmp_path):
    for module in (setup, folder):
        monkeypatch.setattr(module, "create_model", small_vit)
    config = RunConfig.from_dict(
        {
            "method": METHOD, "exits": 2, "pretrained": True, "limit_per_class": 10, "epochs": 1,
            "batch_size": 25, "optimizer": "adamw", "learning_rate": 0.01, "accelerator": "cpu",
        }
    )  # fmt: skip
    evaluation = train(config, tmp_path / "run", progress=False)
    assert evaluation.average == "logits"
    classifier = nf.Classifier.from_pretrained(tmp_path / "run")
    logits = classifier.logits(setup.load_run_data(config.data, 0).test.images[:5])
    assert not torch.allclose(logits[:, 0], logits[:, 1])
