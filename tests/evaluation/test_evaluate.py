import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor, nn

from netfission.evaluation import (
    Evaluation,
    classification_metrics,
    collect_logits,
    evaluate_logits,
)
from netfission.inference import (
    Average,
    disagreement,
    ensemble_log_probabilities,
    mutual_information,
)


def random_case(n: int = 40, exits: int = 3, classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, exits, classes, generator=generator)
    return logits, torch.randint(classes, (n,), generator=generator)


class Exits(nn.Module):
    """Batch norm and dropout, so that train mode would show; several exits over one trunk."""

    def __init__(self, exits: int = 2) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.heads = nn.ModuleList(nn.Linear(6, 4) for _ in range(exits))

    def forward(self, images: Tensor) -> Tensor:
        features = self.dropout(self.norm(images))
        return torch.stack([head(features) for head in self.heads], dim=1)


def batches_of(images: Tensor, labels: Tensor, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(10, 6, generator=torch.Generator().manual_seed(1))


def test_collects_in_order_and_in_eval_mode(images: Tensor) -> None:
    network, labels = Exits(), torch.arange(10) % 4
    logits, collected = collect_logits(network, batches_of(images, labels))
    network.eval()
    torch.testing.assert_close(logits, network(images))
    assert torch.equal(collected, labels)
    assert logits.shape == (10, 2, 4)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad


def test_network_is_left_as_it_was(images: Tensor) -> None:
    network = Exits()
    network.norm.eval()
    modes = [module.training for module in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    collect_logits(network, batches_of(images, torch.zeros(10).long()))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_modes_come_back_after_an_error(images: Tensor) -> None:
    network = Exits()
    with pytest.raises(RuntimeError):
        collect_logits(network, [(images[:, :3], torch.zeros(10).long())])
    assert all(module.training for module in network.modules())


def test_what_the_network_caches_can_still_be_trained_with(images: Tensor) -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 4)
            self.cached: Tensor | None = None

        def forward(self, images: Tensor) -> Tensor:
            if self.cached is None:
                self.cached = torch.ones(6).double().float()
            return self.head(images * self.cached)

    network = Caching()
    collect_logits(network, [(images, torch.zeros(10).long())])
    scale = torch.ones(6, requires_grad=True)
    network(images * scale).sum().backward()
    assert scale.grad is not None


def test_plain_model_is_one_exit(images: Tensor) -> None:
    model = nn.Linear(6, 4)
    logits, _ = collect_logits(model, batches_of(images, torch.zeros(10).long()))
    assert logits.shape == (10, 1, 4)
    torch.testing.assert_close(logits[:, 0], model(images).detach())


def test_half_precision_network(images: Tensor) -> None:
    logits, _ = collect_logits(Exits().bfloat16(), batches_of(images.bfloat16(), torch.zeros(10).long()))
    assert logits.dtype == torch.float32


def test_collect_refuses(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^batches must be at least one batch, got none$"):
        collect_logits(Exits(), [])
    with pytest.raises(
        ValueError, match=r"^the network's output must be of shape .*, got float32 of shape \(10, 2, 3, 1\)$"
    ):
        collect_logits(nn.Unflatten(1, (2, 3, 1)), [(images, torch.zeros(10).long())])


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("exits", [1, 3])
def test_every_figure_is_where_it_belongs(average: Average, exits: int) -> None:
    logits, labels = random_case(exits=exits)
    evaluation = evaluate_logits(logits, labels, average=average)
    assert evaluation.n == 40
    assert evaluation.average == average
    assert evaluation.exits == [
        classification_metrics(logits[:, i].log_softmax(1), labels) for i in range(exits)
    ]
    assert evaluation.ensemble == classification_metrics(ensemble_log_probabilities(logits, average), labels)
    assert evaluation.disagreement == pytest.approx(disagreement(logits).mean().item())
    other = "probabilities" if average == "logits" else "logits"
    assert evaluation.other_average == classification_metrics(
        ensemble_log_probabilities(logits, other), labels
    )
    information = mutual_information(logits).mean().item()
    assert evaluation.mutual_information == pytest.approx(information, abs=1e-7)
    # Both belong to the mean of probabilities: the rest of the entropy is that of the exits.
    exit_entropies = torch.special.entr(logits.softmax(dim=2)).sum(dim=2).mean().item()
    assert evaluation.predictive_entropy == pytest.approx(information + exit_entropies)


def test_cannot_be_changed() -> None:
    evaluation = evaluate_logits(*random_case(), average="logits")
    with pytest.raises(dataclasses.FrozenInstanceError):
        evaluation.n = 0  # type: ignore[misc]


def test_json_round_trip_is_exact() -> None:
    evaluation = evaluate_logits(*random_case(), average="logits")
    text = evaluation.to_json()
    assert Evaluation.from_json(text) == evaluation
    assert json.loads(text)["exits"][2]["top5"] == evaluation.exits[2]["top5"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "Expecting value"),
        ("[]", r"the file must be an object, got \[\]"),
        ('{"n": 3}', "average must be given, got nothing"),
        ('{"extra": 1}', "entry must be one of .*, got 'extra'"),
    ],
)
def test_json_of_something_else(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        Evaluation.from_json(text)
    assert "\n" not in str(caught.value)


def test_table() -> None:
    evaluation = Evaluation(
        n=200,
        average="logits",
        exits=[
            {"top1": 0.5, "nll": 12.34567, "ece": 0.0123, "brier": 0.6},
            {"top1": 1.0, "nll": 0.5, "ece": 0.0, "brier": 0.25},
        ],
        ensemble={"top1": 0.75, "nll": 0.4, "ece": 0.1, "brier": 0.2},
        disagreement=0.125,
        predictive_entropy=1.5,
        mutual_information=0.25,
        other_average={"top1": 0.8, "nll": 0.45, "ece": 0.05, "brier": 0.3},
    )
    assert evaluation.table().splitlines() == [
        "                            top1 %       nll     ece %     brier",
        "exit 0                       50.00   12.3457      1.23    0.6000",
        "exit 1                      100.00    0.5000      0.00    0.2500",
        "ensemble                     75.00    0.4000     10.00    0.2000",
        "by mean of probabilities     80.00    0.4500      5.00    0.3000",
        "200 examples, ensemble by mean of logits: disagreement 12.50 %, mutual information 0.2500 of 1.5000 "
        "nats (by mean of probabilities)",
    ]


def test_no_metric_is_printed_with_more_digits_than_its_column_has() -> None:
    huge = Evaluation(1, "logits", [{"nll": 5.7e27}], {"nll": 12345.6}, 0.0, 0.0)
    assert huge.table().splitlines()[:3] == [
        "               nll",
        "exit 0    5.70e+27",
        "ensemble  1.23e+04",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    logits, labels = random_case()
    logits[3, 0, 0] = logits[3, 2, 1] = logits[7, 1, 1] = value
    with pytest.raises(ValueError, match=r"^logits must be finite, got NaN or infinity in 2 of 40 examples$"):
        evaluate_logits(logits, labels, average="logits")


def test_refuses_other_layouts() -> None:
    logits, labels = random_case()
    with pytest.raises(ValueError, match=r"^logits must be floats of shape \(batch, exits"):
        evaluate_logits(logits[:, 0], labels, average="logits")
    with pytest.raises(ValueError, match=r"^logits must be of shape \(n, exits, classes\), got "):
        evaluate_logits(logits.unsqueeze(3), labels, average="logits")
    with pytest.raises(
        ValueError, match=r"^labels must be class indices in \[0, \d+\), got 1 of 40 outside, first 7$"
    ):
        evaluate_logits(logits, labels.index_fill(0, torch.tensor([5]), 7), average="logits")
    with pytest.raises(ValueError, match=r"^average must be one of logits, probabilities, got 'votes'"):
        evaluate_logits(logits, labels, average="votes")  # type: ignore[arg-type]
