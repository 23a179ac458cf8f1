import math
from typing import Any, get_args

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from netfission import losses
from netfission.ensemble import Average
from netfission.inference import ensemble_log_probabilities
from netfission.losses import EnsembleDistillationLoss, Teacher, ensemble_distillation_loss


def reference(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    weight: float,
    cross_entropy: bool,
    teacher: Teacher = "logits",
) -> float:
    """The formula for `(batch, exits, classes)`, one number at a time."""
    total = 0.0
    for exits, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for number, z in enumerate(exits):
            q = teach(exits, number, temperature, teacher)
            p = softmax([value / temperature for value in z])
            kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(q, p, strict=True))
            total += weight * temperature**2 * kl
            if cross_entropy:
                total -= math.log(softmax(z)[label])
    return total / len(logits)


def teach(exits: list[list[float]], number: int, temperature: float, teacher: Teacher) -> list[float]:
    softened = [[value / temperature for value in z] for z in exits]
    if teacher == "probabilities":
        return mean([softmax(z) for z in softened])
    if teacher == "others" and len(exits) > 1:
        del softened[number]
    return softmax(mean(softened))


def mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def softmax(z: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in z]
    return [e / sum(exponentials) for e in exponentials]


def random_case(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch, _, classes, *trailing = shape
    logits = 3 * torch.randn(shape, generator=generator, dtype=dtype)
    return logits, torch.randint(classes, (batch, *trailing), generator=generator)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(2, 6)),
    temperature=st.floats(0.5, 10),
    weight=st.floats(0.1, 5),
    cross_entropy=st.booleans(),
    teacher=st.sampled_from(get_args(Teacher)),
)
def test_is_the_formula(
    seed: int,
    shape: tuple[int, int, int],
    temperature: float,
    weight: float,
    cross_entropy: bool,
    teacher: Teacher,
) -> None:
    logits, labels = random_case(seed, shape)
    loss = EnsembleDistillationLoss(temperature, weight, cross_entropy, teacher)(logits, labels)
    expected = reference(logits, labels, temperature, weight, cross_entropy, teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_defaults_are_the_papers() -> None:
    logits, labels = random_case(0, (5, 3, 7))
    expected = reference(logits, labels, temperature=3.0, weight=1.0, cross_entropy=True)
    assert ensemble_distillation_loss(logits, labels).item() == pytest.approx(expected, rel=1e-9)
    assert EnsembleDistillationLoss()(logits, labels).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("exits", [1, 3])
def test_the_mean_over_exits_is_their_sum_over_their_number(exits: int) -> None:
    logits, labels = random_case(0, (5, exits, 7))
    whole = ensemble_distillation_loss(logits, labels)
    torch.testing.assert_close(EnsembleDistillationLoss(reduction="mean")(logits, labels), whole / exits)


def test_gradient_is_the_formulas_with_a_constant_teacher() -> None:
    logits, labels = random_case(1, (4, 3, 5))
    logits.requires_grad_()
    temperature, weight = 2.5, 0.7
    loss = ensemble_distillation_loss(logits, labels, temperature=temperature, weight=weight)
    (gradient,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        teacher = (logits.mean(1, keepdim=True) / temperature).softmax(2)
        towards_teacher = (logits / temperature).softmax(2) - teacher
        towards_labels = logits.softmax(2) - F.one_hot(labels, 5).unsqueeze(1)
        expected = (towards_labels + weight * temperature * towards_teacher) / len(logits)
    torch.testing.assert_close(gradient, expected)


def test_no_gradient_is_computed_for_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    # With this teacher it would be zero, so the gradient's value cannot tell.
    logits, labels = random_case(12, (4, 3, 5))
    asked_for = []

    def watched(softened: Tensor, average: Average) -> Tensor:
        asked_for.append(softened.requires_grad)
        return ensemble_log_probabilities(softened, average)

    monkeypatch.setattr(losses, "ensemble_log_probabilities", watched)
    ensemble_distillation_loss(logits.requires_grad_(), labels)
    assert asked_for == [False]


def test_weight_zero_is_cross_entropy_alone() -> None:
    logits, labels = random_case(2, (6, 3, 4))
    expected = sum(F.cross_entropy(logits[:, i], labels) for i in range(3))
    torch.testing.assert_close(ensemble_distillation_loss(logits, labels, weight=0.0), expected)


@pytest.mark.parametrize("shape", [(8, 1, 10), (8, 4, 10)])
def test_exits_that_agree_have_nothing_to_distil(shape: tuple[int, ...]) -> None:
    logits, labels = random_case(3, shape)
    logits = logits[:, :1].repeat(1, shape[1], 1).requires_grad_()
    loss = ensemble_distillation_loss(logits, labels, cross_entropy=False)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(loss.item()) < 1e-14
    assert gradient.abs().max() < 1e-14


def test_order_of_exits_does_not_matter() -> None:
    logits, labels = random_case(4, (6, 4, 5))
    loss = ensemble_distillation_loss(logits, labels)
    torch.testing.assert_close(ensemble_distillation_loss(logits[:, [2, 0, 3, 1]], labels), loss)


@pytest.mark.parametrize("shape", [(6, 3, 5), (2, 3, 5, 4, 3)])
def test_soft_labels_of_one_class_are_hard_labels(shape: tuple[int, ...]) -> None:
    logits, labels = random_case(5, shape)
    soft = F.one_hot(labels, 5).movedim(-1, 1).double()
    expected = ensemble_distillation_loss(logits, labels)
    torch.testing.assert_close(ensemble_distillation_loss(logits, soft), expected)


def test_soft_labels_mix_linearly() -> None:
    logits, labels = random_case(6, (6, 3, 5))
    others = labels.flip(0)
    soft = 0.3 * F.one_hot(labels, 5) + 0.7 * F.one_hot(others, 5)
    expected = 0.3 * ensemble_distillation_loss(logits, labels) + 0.7 * ensemble_distillation_loss(
        logits, others
    )
    torch.testing.assert_close(ensemble_distillation_loss(logits, soft.double()), expected)


def test_trailing_dimensions_count_as_examples() -> None:
    logits, labels = random_case(7, (2, 3, 5, 4, 6))
    as_batch = logits.movedim((3, 4), (1, 2)).flatten(0, 2)
    torch.testing.assert_close(
        ensemble_distillation_loss(logits, labels),
        ensemble_distillation_loss(as_batch, labels.flatten()),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, labels = random_case(8, (6, 3, 5), dtype=torch.float32)
    narrow = (20 * logits).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ensemble_distillation_loss(narrow, labels)
    expected = ensemble_distillation_loss(narrow.detach().float(), labels)
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()
    loss.backward()
    assert narrow.grad is not None
    assert narrow.grad.isfinite().all()


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]]], requires_grad=True)
    loss = ensemble_distillation_loss(logits, torch.tensor([2]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_never_waits_for_the_device() -> None:
    # Meta tensors have no values, so whatever would read one back raises.
    logits, labels = random_case(9, (6, 3, 5))
    assert ensemble_distillation_loss(logits.to("meta"), labels.to("meta")).shape == ()


def test_tensors_without_values_are_not_checked() -> None:
    with FakeTensorMode():
        logits, labels = torch.zeros(6, 3, 5), torch.zeros(6, dtype=torch.int64)
        assert ensemble_distillation_loss(logits, labels).shape == ()


@pytest.mark.parametrize(
    "options", [{}, {"teacher": "others"}, {"teacher": "probabilities"}, {"reduction": "mean"}], ids=str
)
@pytest.mark.parametrize("soft", [False, True])
def test_loss_and_gradient_per_example_under_vmap(options: dict[str, Any], soft: bool) -> None:
    logits, labels = random_case(13, (6, 3, 5))
    if soft:
        labels = (F.one_hot(labels, 5) * 0.8 + 0.04).double()

    def loss_of(one: Tensor, label: Tensor) -> Tensor:
        return ensemble_distillation_loss(one[None], label[None], **options)

    whole = ensemble_distillation_loss(logits.requires_grad_(), labels, **options)
    (gradient,) = torch.autograd.grad(whole, logits)
    logits = logits.detach()
    torch.testing.assert_close(torch.func.vmap(loss_of)(logits, labels).mean(), whole.detach())
    singly = torch.func.vmap(torch.func.grad(loss_of))(logits, labels)
    torch.testing.assert_close(singly / 6, gradient)


@pytest.mark.parametrize("transform", [lambda loss_of: loss_of, torch.func.grad])
def test_labels_out_of_range_are_found_under_vmap(transform: Any) -> None:
    def loss_of(logits: Tensor, label: Tensor) -> Tensor:
        return ensemble_distillation_loss(logits[None], label[None])

    message = r"^labels must be class indices from 0 to 4, got 7 \(2 of 3 labels out of range\)$"
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(transform(loss_of))(torch.zeros(3, 2, 5), torch.tensor([4, 7, 5]))


def test_compiles_in_one_graph() -> None:
    compiled = torch.compile(EnsembleDistillationLoss(), backend="eager", fullgraph=True)
    logits, labels = random_case(10, (6, 3, 5))
    torch.testing.assert_close(compiled(logits, labels), ensemble_distillation_loss(logits, labels))


@pytest.mark.parametrize(
    ("settings_given", "message"),
    [
        ({"temperature": 0.0}, "^temperature must be a positive number, got 0.0$"),
        ({"temperature": -1.0}, "^temperature must be a positive number, got -1.0$"),
        ({"temperature": math.nan}, "^temperature must be a positive number, got nan$"),
        ({"temperature": math.inf}, "^temperature must be a positive number, got inf$"),
        ({"weight": -0.5}, "^weight must be a finite number of at least 0, got -0.5$"),
        ({"weight": math.nan}, "^weight must be a finite number of at least 0, got nan$"),
        (
            {"weight": 0.0, "cross_entropy": False},
            "^weight must be above 0 if cross_entropy is False, got 0.0$",
        ),
        ({"reduction": "none"}, "^reduction must be one of sum, mean, got 'none'"),
        ({"teacher": "mean"}, "^teacher must be one of logits, probabilities, others, got 'mean'"),
    ],
)
def test_settings_out_of_range(settings_given: dict[str, Any], message: str) -> None:
    logits, labels = random_case(0, (2, 2, 3))
    with pytest.raises(ValueError, match=message):
        ensemble_distillation_loss(logits, labels, **settings_given)
    with pytest.raises(ValueError, match=message):
        EnsembleDistillationLoss(**settings_given)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            r"^logits must be floats of shape .*, got float32 of shape \(2, 3\)$",
        ),
        (torch.zeros(2, 1, 3).int(), torch.zeros(2).long(), "^logits must be floats .*, got int32"),
        (
            torch.zeros(2, 3, 1),
            torch.zeros(2).long(),
            r"^logits must be of two classes or more, got float32 of shape \(2, 3, 1\); give a binary",
        ),
        (torch.zeros(2, 1, 3), torch.zeros(3).long(), r"^labels must be .*, got int64 of shape \(3,\)$"),
        (torch.zeros(2, 1, 3), torch.zeros(2).int(), "^labels must be .*, got int32"),
        (torch.zeros(2, 1, 3), torch.zeros(2, 3).long(), r"^labels must be .*, got int64 of shape \(2, 3\)$"),
        (
            torch.zeros(2, 1, 3),
            torch.zeros(2),
            r"^labels must be int64 of shape \(2,\) or floats of shape \(2, 3\), got float32",
        ),
        (
            torch.zeros(2, 1, 3),
            torch.tensor([0, 3]),
            r"^labels must be class indices from 0 to 2, got 3 \(1 of 2 labels out of range\)$",
        ),
        (
            torch.zeros(2, 1, 3),
            torch.tensor([-100, -1]),
            r"^labels must be class indices from 0 to 2, got -100 \(2 of 2 labels",
        ),
    ],
)
def test_tensors_of_another_layout(logits: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ensemble_distillation_loss(logits, labels)
    assert "\n" not in str(caught.value)


def test_module_passes_its_settings_on_and_shows_them() -> None:
    module = EnsembleDistillationLoss(temperature=2.0, weight=0.5, cross_entropy=False)
    logits, labels = random_case(11, (4, 3, 5))
    expected = reference(logits, labels, temperature=2.0, weight=0.5, cross_entropy=False)
    assert module(logits, labels).item() == pytest.approx(expected, rel=1e-9)
    assert "temperature=2.0, weight=0.5, cross_entropy=False" in repr(module)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_void_pixels_count_in_neither_term(weight):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, generator=generator)
    labels = torch.randint(4, (2, 5, 6), generator=generator)
    void = torch.rand(labels.shape, generator=generator) < 0.3
    marked = labels.masked_fill(void, 255)
    kept = logits.movedim((3, 4), (1, 2))[~void]  # (pixels, exits, classes)
    loss = EnsembleDistillationLoss(weight=weight, ignore_index=255)
    expected = ensemble_distillation_loss(kept, labels[~void], weight=weight)
    assert loss(logits, marked).item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss(logits, torch.full_like(labels, 255)).item() == 0
    assert "ignore_index=255" in repr(loss)
    with pytest.raises(ValueError, match=r"labels must be class indices from 0 to 3, got 255"):
        ensemble_distillation_loss(logits, marked)
    logits[0, 0, 0].masked_fill_(void[0], math.inf)  # counts in neither term, so that it need not be finite
    assert loss(logits, marked).item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"^ignore_index must be None with probabilities as labels, got 255"):
        loss(logits, torch.full_like(logits[:, 0], 0.25))
    marked[0, 0, 0] = 7
    with pytest.raises(ValueError, match=r"got 7 \(1 of 60 labels out of range\)"):
        loss(logits, marked)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32), weight=st.floats(0, 3))
def test_class_weights_are_those_of_pytorch_on_the_cross_entropy_alone(seed: int, weight: float) -> None:
    logits, labels = random_case(seed, (2, 3, 4, 5))
    weights = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels[0, 0] = 255
    arguments = {"weight": weight, "ignore_index": 255}
    found = ensemble_distillation_loss(logits, labels, class_weights=weights, **arguments)
    plain = ensemble_distillation_loss(logits, labels, **arguments)
    change = sum(
        F.cross_entropy(exit_, labels, weight=weights, ignore_index=255)
        - F.cross_entropy(exit_, labels, ignore_index=255)
        for exit_ in logits.unbind(dim=1)
    )
    assert found.item() == pytest.approx((plain + change).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"^class_weights must be floats of shape \(4,\), got float32 of shape \(3,\)"),
        (torch.ones(4, dtype=torch.int64), r"^class_weights must be floats of shape \(4,\), got int64"),
        (torch.tensor([1.0, 1.0, -2.0, 1.0]), "^class_weights must be finite and at least 0, got -2 to 1"),
    ],
)
def test_class_weights_that_cannot_be(weights: Tensor, message: str) -> None:
    logits, labels = random_case(0, (2, 3, 4))
    with pytest.raises(ValueError, match=message):
        EnsembleDistillationLoss(class_weights=weights)(logits, labels)
    if weights.shape == (4,):
        with pytest.raises(ValueError, match="class_weights must be None with probabilities as labels"):
            EnsembleDistillationLoss(class_weights=weights)(logits, F.one_hot(labels, 4).to(logits))


def test_class_weights_of_void_pixels_alone_give_no_cross_entropy() -> None:
    logits = torch.randn(2, 3, 4, 5)
    loss = EnsembleDistillationLoss(class_weights=torch.ones(4), ignore_index=255)
    assert loss(logits, torch.full((2, 5), 255)).item() == 0
    assert "class_weights=[1.0, 1.0, 1.0, 1.0]" in repr(loss)
