"""LoRA-Ensemble: what is shared, what is not, and its use as one of the methods."""

import copy
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

import netfission as nf
from netfission.classifier import folder
from netfission.config import FissionConfig, MethodConfig, RunConfig
from netfission.export import export
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.lora_ensemble import GAIN, LowRank, LowRankAttention, LowRankLinear
from netfission.methods.member_layers import MemberLinear
from netfission.methods.registry import check_settings, find_method
from netfission.models import create_model
from netfission.runs import setup
from netfission.runs.folder import RunFolder
from netfission.runs.train import train

CONFIG = MethodConfig("lora-ensemble", rank=2)
IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def small_vit(*_: object, **__: object) -> nn.Module:
    """A vision transformer for grey images of 8×8 pixels."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=24, depth=2, in_chans=1, num_classes=10
    )


class Encoder(nn.Module):
    """A classifier with `nn.MultiheadAttention`, of batches first or tokens first."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=batch_first)
        self.batch_first = batch_first
        self.head = nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images[:, 0])
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.head(attended.mean(dim=1 if self.batch_first else 0))


class TokensFirst(nn.Module):
    """A classifier whose attention, of code of its own, reads `(tokens, batch, channels)`."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 2
            self.qkv = nn.Linear(8, 24)

        def forward(self, tokens: Tensor) -> Tensor:
            queries, keys, values = self.qkv(tokens).transpose(0, 1).chunk(3, dim=-1)
            return nn.functional.scaled_dot_product_attention(queries, keys, values)

    def __init__(self) -> None:
        super().__init__()
        self.attention = self.Attention()
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.attention(images[:, 0].transpose(0, 1)).mean(dim=1))


def plan(create=small_vit, **settings) -> BuildPlan:
    return BuildPlan(partial(call_with_seed, create), FissionConfig(**settings), torch.zeros(2, 1, 8, 8))


def build(create=small_vit, config: MethodConfig = CONFIG, **settings) -> nn.Module:
    return find_method(config).build(plan(create, **settings))


@torch.no_grad()
def moved(network: nn.Module) -> nn.Module:
    """A copy whose members differ, as after some training."""
    result = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(1)
    for module in result.modules():
        if isinstance(module, LowRank):
            module.b.normal_(std=0.1, generator=generator)
    return result


@pytest.mark.parametrize("create", [small_vit, Encoder])
def test_at_the_start_each_member_is_the_network_with_a_classifier_of_its_own_seed(create):
    network = build(create, exits=3, seed=2).eval()
    model = plan(create).create(6).eval()
    logits = network(IMAGES)
    for member, seed in enumerate((6, 7, 8)):
        model.head = plan(create).create(seed).head
        torch.testing.assert_close(logits[:, member], model(IMAGES), rtol=1e-5, atol=1e-6)


def merged(create, network: nn.Module, member: int) -> nn.Module:
    """The single network that a member is: `W + B A` in place of each projection's weight."""
    model = plan(create).create(0).eval()

    def product(change: LowRank) -> Tensor:
        return (change.b[member] @ change.a[member]).flatten(0, 1)

    for name, module in network.network.named_modules():
        if isinstance(module, LowRankLinear):
            model.get_submodule(name).weight.data += product(module.change)
        elif isinstance(module, LowRankAttention):
            model.get_submodule(name).in_proj_weight.data += torch.cat([product(c) for c in module.changes])
    model.head.weight.data = network.network.head.weight[member].detach()
    model.head.bias.data = network.network.head.bias[member].detach()
    return model


@pytest.mark.parametrize("create", [small_vit, Encoder, partial(Encoder, batch_first=False)])
def test_each_member_is_the_network_with_low_rank_products_added_to_its_projections(create):
    network = moved(build(create)).eval()
    logits = network(IMAGES)
    for member in range(3):
        torch.testing.assert_close(logits[:, member], merged(create, network, member)(IMAGES))
    assert not torch.allclose(logits[:, 0], logits[:, 1])


def test_only_low_rank_matrices_and_classifiers_are_trained():
    network = build()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trained if "head" not in name} == {"a", "b"}
    per_projection = 2 * 2 * 24  # A and B of rank 2
    projections = 2 * (3 + 1)  # of two blocks: query, key and value; output
    classifiers = 24 * 10 + 10
    assert sum(p.numel() for p in trained.values()) == 3 * (projections * per_projection + classifiers)
    frozen = {name: p.clone() for name, p in network.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(network.parameters(), 0.01)
    before = {name: p.clone() for name, p in trained.items()}
    for _ in range(2):
        nf.EnsembleDistillationLoss(weight=0.0)(network(IMAGES), torch.arange(4)).backward()
        optimizer.step()
    after = dict(network.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in frozen.items())
    assert not any(torch.equal(after[name], p) for name, p in before.items())


class TwoClassifiers(Encoder):
    """As LeViT and distilled DeiT: the mean of two classifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.distilled = nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images[:, 0])
        features = self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(dim=1)
        return (self.head(features) + self.distilled(features)) / 2


def test_each_of_several_classifiers_is_trained_for_each_member():
    network = build(TwoClassifiers).network
    assert all(isinstance(layer, MemberLinear) for layer in (network.head, network.distilled))
    assert isinstance(network.embed, nn.Linear)


def test_matrices_are_drawn_as_the_authors_draw_them():
    change = LowRank(100, 100, 3, 4, 8, torch.zeros(1), torch.Generator().manual_seed(0))
    bound = GAIN * (6 / 108) ** 0.5
    assert 0.99 * bound < change.a.abs().max() <= bound
    assert change.a.mean().abs() < 0.05 * bound
    assert not change.b.any()
    assert not torch.equal(change.a[0], change.a[1])


def test_queries_keys_and_values_of_one_layer_have_a_rank_each():
    network = moved(build())
    change = network.network.blocks[0].attn.qkv.change
    products = change.b[0] @ change.a[0]
    assert torch.linalg.matrix_rank(products).tolist() == [2, 2, 2]
    assert torch.linalg.matrix_rank(products.flatten(0, 1)) == 6


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (
            partial(create_model, "wrn-10-1", 10, in_channels=1),
            "a network with attention of linear layers, got WideResNet without it",
        ),
        (
            TokensFirst,
            "a network whose attention reads batches with the images first, got one that orders them "
            "otherwise",
        ),
    ],
)
def test_models_without_suitable_attention_are_refused(create, message):
    with pytest.raises(ValueError, match=f"^model with method=lora-ensemble must be {message}$"):
        build(create, exits=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0, "pretrained": True}, "rank must be a positive integer, got 0"),
        ({}, "pretrained must be True, or weights a file, with method=lora-ensemble, got False; all but"),
        ({"exits": 1, "pretrained": True}, "exits must be at least 2 with method=lora-ensemble, got 1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        check_settings(RunConfig.from_dict({"method": "lora-ensemble", **settings}))


def test_it_is_trained_evaluated_saved_loaded_and_exported(monkeypatch, tmp_path):
    for module in (setup, folder):
        monkeypatch.setattr(module, "create_model", small_vit)
    config = RunConfig.from_dict(
        {
            "method": "lora-ensemble", "rank": 2, "exits": 2, "pretrained": True, "limit_per_class": 10,
            "epochs": 2, "batch_size": 25, "optimizer": "adamw", "learning_rate": 0.01, "accelerator": "cpu",
        }
    )  # fmt: skip
    evaluation = train(config, tmp_path / "run", progress=False)
    assert evaluation.average == "probabilities"
    assert len(evaluation.exits) == 2
    assert RunFolder(tmp_path / "run").weights.is_file()
    classifier = nf.Classifier.from_pretrained(tmp_path / "run")
    pixels = setup.load_run_data(config.data, 0).test.images[:5]
    logits = classifier.logits(pixels)
    assert not torch.allclose(logits[:, 0], logits[:, 1])
    export(classifier, tmp_path / "model.onnx", pixels[:3])
    report = nf.cost(classifier.network, IMAGES[:1], reference=small_vit())
    assert report.network.size.macs_dense > 2 * report.reference.size.macs_dense


def test_its_network_can_be_pickled_and_its_batches_have_any_size(tmp_path):
    network = moved(build(Encoder)).eval()
    torch.save(network, tmp_path / "network.pt")
    again = torch.load(tmp_path / "network.pt", weights_only=False)
    images = torch.rand(7, 1, 8, 8)
    assert torch.equal(again(images), network(images))
    torch.testing.assert_close(network(images[2:3]), network(images)[2:3])
