"""Gradients by autograd against differences, in float64, and bfloat16 against float32."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

import netfission as nf
from netfission import losses
from netfission.losses import Teacher
from netfission.surgery.masks import apply_masks
from netfission.surgery.narrowing import ScatteredNorm
from netfission.tasks import regression
from netfission.tasks.multilabel import MultilabelDistillationLoss
from netfission.tasks.regression import GaussianDistillationLoss


def outputs(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def check_with_fixed_teacher(
    loss: Callable[[Tensor], Tensor],
    logits: Tensor,
    owner: Any,
    teacher: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check the gradient of a loss whose teacher is a constant, and that it is that of the loss itself."""
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    teach, taught = getattr(owner, teacher), []

    def teach_once(*arguments: Any) -> Any:
        if not taught:
            taught.append(teach(*arguments))
        return taught[0]

    monkeypatch.setattr(owner, teacher, teach_once)
    (of_fixed,) = torch.autograd.grad(loss(logits), logits)
    assert gradcheck(loss, logits)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, of_fixed, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("labels", ["classes", "probabilities", "void"])
@pytest.mark.parametrize("teacher", get_args(Teacher))
def test_the_softmax_form(teacher: Teacher, labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = outputs(2, 3, 4, 2)
    targets = torch.tensor([[0, 3], [255 if labels == "void" else 1, 2]])
    if labels == "probabilities":
        targets = outputs(2, 4, 2).detach().softmax(dim=1)
    criterion = nf.EnsembleDistillationLoss(
        2.0, 0.7, teacher=teacher, ignore_index=255 if labels == "void" else None
    )
    check_with_fixed_teacher(
        lambda z: criterion(z, targets), logits, losses, "_teacher_log_probabilities", monkeypatch
    )


@pytest.mark.parametrize("teacher", get_args(Teacher))
def test_the_sigmoid_form(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.tensor([[0.0, 1.0, 0.3], [1.0, 1.0, 0.0]], dtype=torch.float64)
    criterion = MultilabelDistillationLoss(2.0, 0.7, teacher=teacher, reduction="mean")
    check_with_fixed_teacher(
        lambda z: criterion(z, labels), outputs(2, 3, 3), losses, "_teacher_log_probabilities", monkeypatch
    )


def test_the_gaussian_form(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = torch.tensor([[0.5, -20.0], [1.5, 10.0]], dtype=torch.float64)
    criterion = GaussianDistillationLoss(["a", "b"], {"mean": [0.1, -3.0], "std": [0.9, 12.0]}, weight=0.7)
    check_with_fixed_teacher(
        lambda z: criterion(z, targets), outputs(2, 3, 4), regression, "mixture", monkeypatch
    )


LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), "weight", (2, 3)),
    "convolution": (lambda: nn.Conv2d(2, 4, 2, groups=2), "weight", (1, 2, 3, 3)),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), "in_proj_weight", (1, 3, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_masked_layer(name: str) -> None:
    make, attribute, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    weight = layer.get_parameter(attribute)
    kept = torch.rand(weight.shape) > 0.4
    apply_masks(layer, {attribute: kept})
    features = outputs(*shape)

    def run(features: Tensor, weight: Tensor | None = None) -> Tensor:
        inputs = (features,) * (3 if name == "attention" else 1)
        result = layer(*inputs) if weight is None else functional_call(layer, {attribute: weight}, inputs)
        return result[0] if name == "attention" else result

    free = torch.randn(weight.shape, dtype=torch.float64).requires_grad_()
    assert gradcheck(run, (features, free))
    (of_weight,) = torch.autograd.grad(run(features, free).square().sum(), free)
    assert of_weight[~kept].eq(0).all() and of_weight[kept].ne(0).all()
    run(features).square().sum().backward()
    (of_free,) = torch.autograd.grad(run(features, weight.detach().requires_grad_()).square().sum(), features)
    assert weight.grad is not None
    assert weight.grad[~kept].eq(0).all() and weight.grad[kept].ne(0).all()
    torch.testing.assert_close(features.grad, of_free)


def test_a_scattered_norm() -> None:
    norm = ScatteredNorm.at(nn.BatchNorm2d(2).double(), torch.tensor([0, 2]), 4)
    assert gradcheck(norm, outputs(3, 2, 2, 1))


class Tokens(nn.Module):
    """Encoder layers, a stage each, whose heads are divided."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 4, 8, dropout=0.0, batch_first=True) for _ in range(3)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.stem(tokens)
        for layer in self.layers:
            features = layer(features)
        return self.head(features.mean(dim=1))


def convolutional() -> nn.Sequential:
    stages = [
        nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1, stride=2)
        )
        for _ in range(3)
    ]
    return nn.Sequential(nn.Conv2d(2, 4, 1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


NETWORKS = {"tokens": (Tokens, (2, 2, 3)), "images": (convolutional, (2, 2, 8, 8))}


def divided(name: str, grouping: str) -> tuple[nf.FissionNetwork, Tensor]:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    features = outputs(*shape)
    net = nf.fission(make(), 2, grouping=grouping, example_input=features.detach().float())
    return net, features


@pytest.mark.parametrize("grouping", ["channels", "weights"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_divided_network_and_its_loss(name: str, grouping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, features = divided(name, grouping)
    net.double().train()
    names = [key for key, weight in net.named_parameters() if key.startswith("paths.1") and weight.ndim > 1][
        :2
    ]
    weights = [net.get_parameter(key).detach().clone().requires_grad_() for key in names]
    labels = torch.tensor([0, 2])
    taught = losses._teacher_log_probabilities(net(features).detach() / 3, "logits")
    monkeypatch.setattr(losses, "_teacher_log_probabilities", lambda *_: taught)

    def loss(features: Tensor, *weights: Tensor) -> Tensor:
        logits = functional_call(net, dict(zip(names, weights, strict=True)), (features,))
        return nf.ensemble_distillation_loss(logits, labels)

    assert gradcheck(loss, (features, *weights), fast_mode=True)


LOGITS = 2.0**-5  # of the largest logit: eight steps of bfloat16, which has eight bits
LOSS = 2.0**-6  # of the loss


@pytest.mark.parametrize("grouping", ["channels", "weights"])
@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_differs_little_from_float32(name: str, grouping: str) -> None:
    net, features = divided(name, grouping)
    net.eval()
    inputs, labels = features.detach().float(), torch.tensor([0, 2])
    with torch.no_grad():
        exact = net(inputs)
        expected = nf.ensemble_distillation_loss(exact, labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = net(inputs)
            results = [(rounded, nf.ensemble_distillation_loss(rounded, labels))]
        rounded = net.bfloat16()(inputs.bfloat16())
        results.append((rounded, nf.ensemble_distillation_loss(rounded, labels)))
    for logits, loss in results:
        assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
        assert 0 < (logits.float() - exact).abs().max() <= LOGITS * exact.abs().max()
        assert abs(loss - expected) <= LOSS * expected
        assert torch.equal(loss, nf.ensemble_distillation_loss(logits.float(), labels))
