"""Networks of vectors: MLPs of numbers and of categories, plain and residual, in a loop of one's own."""

import pytest
import torch
from torch import Tensor, nn

import netfission as nf
from netfission.network import LinearExit

FEATURES, WIDTH, CLASSES = 6, 12, 3


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.outer, self.dropout = nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.dropout(self.outer(self.inner(self.norm(features)).relu()))


def plain(hidden: int = 3) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(hidden):
        layers += [
            nn.Linear(WIDTH if index else FEATURES, WIDTH),
            nn.BatchNorm1d(WIDTH),
            nn.ReLU(),
            nn.Dropout(0.1),
        ]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


def residual() -> nn.Sequential:
    blocks = [ResidualBlock() for _ in range(3)]
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)
    )


class WithCategories(nn.Module):
    """The last two columns are the codes of categories."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(4, 2) for _ in range(2))
        self.mlp = plain()

    def forward(self, rows: Tensor) -> Tensor:
        codes = rows[:, -2:].long()
        embedded = [embedding(codes[:, index]) for index, embedding in enumerate(self.embeddings)]
        return self.mlp(torch.cat([rows[:, :-2], *embedded], dim=1))


class OfCodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mlp = nn.EmbeddingBag(4, FEATURES), plain()

    def forward(self, codes: Tensor) -> Tensor:
        return self.mlp(self.embedding(codes))


def rows_for(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, OfCodes):
        return torch.randint(4, (8, 5), generator=generator)
    rows = torch.randn(8, FEATURES, generator=generator)
    if isinstance(model, WithCategories):
        rows[:, 4:] = torch.randint(4, (8, 2), generator=generator).float()
        return torch.cat([rows[:, :2], rows[:, 4:]], dim=1)
    return rows


MODELS = {
    "plain": plain,
    "two hidden layers": lambda: plain(2),
    "residual": residual,
    "categories": WithCategories,
    "codes": OfCodes,
}


@pytest.mark.parametrize(
    ("name", "grouping"),
    [
        *((name, "channels") for name in MODELS if name != "two hidden layers"),
        ("two hidden layers", "weights"),
        ("plain", "weights"),
        ("categories", "copies"),
    ],
)
def test_an_mlp_is_divided_trained_deployed_and_restored(name: str, grouping: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    rows, labels = rows_for(model), torch.arange(8) % CLASSES
    net = nf.fission(model, 3, grouping=grouping, example_input=rows)
    assert min(net.branch_after) > 0 and len(net.stage_names) > 1
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for _ in range(2):
        loss = nf.ensemble_distillation_loss(net(rows), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = net.eval()(rows)
    assert logits.shape == (8, 3, CLASSES)
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-3
    assert torch.equal(net.ensemble()(rows), logits.mean(dim=1))
    torch.testing.assert_close(nf.deploy(net, rows, joined=False)(rows), logits, atol=1e-5, rtol=1e-5)
    again = nf.fission(model, 3, grouping=grouping, example_input=rows).eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(rows), logits)


@pytest.mark.parametrize(("exits", "sparsity"), [(3, 0.0), (1, 0.5)])
@pytest.mark.parametrize("name", [*MODELS, "four hidden layers", "six hidden layers"])
def test_every_head_holds_the_whole_classifier(name: str, exits: int, sparsity: float) -> None:
    deep = {"four hidden layers": 4, "six hidden layers": 6}
    model = plain(deep[name]) if name in deep else MODELS[name]()
    *_, classifier = (part for part in model.modules() if isinstance(part, nn.Linear))
    net = nf.fission(
        model,
        exits,
        grouping="weights",
        criterion="magnitude",
        sparsity=sparsity,
        example_input=rows_for(model),
    )
    assert len(net.exit_paths) == exits
    for path in net.exit_paths:
        held = list(path.head.parameters())
        for wanted in classifier.parameters():
            assert sum(torch.equal(wanted, parameter) for parameter in held) == 1


def test_channels_of_the_layer_before_the_classifier_are_whole() -> None:
    model = plain(2)
    with pytest.raises(ValueError, match=r"^stages must be divisible by channels, got a stage with 4.weight"):
        nf.fission(model, 3, grouping="channels", example_input=rows_for(model))


@pytest.mark.parametrize("name", MODELS)
def test_with_one_exit_the_output_is_the_same_bit_for_bit(name: str) -> None:
    model = MODELS[name]()
    rows = rows_for(model)
    net = nf.fission(model, 1, example_input=rows)
    for training in (True, False):
        outputs = []
        for network in (model, net):
            torch.manual_seed(0)
            outputs.append(network.train(training)(rows))
        assert torch.equal(outputs[0], outputs[1].squeeze(1))


def test_paths_of_channels_cost_what_the_mlp_and_two_more_classifiers_cost() -> None:
    model = plain(4)
    rows = rows_for(model)
    net = nf.fission(model, 3, grouping="channels", example_input=rows)
    report = nf.cost(net, rows, reference=model, batch_sizes=[2], rounds=1)
    assert report.reference is not None
    expected = report.reference.size.macs_dense + 2 * WIDTH * CLASSES
    assert report.network.size.macs_dense <= 1.05 * expected


def test_linear_exits_read_vectors_as_they_are() -> None:
    model = plain(4)
    rows = rows_for(model)
    net = nf.fission(model, 1, linear_exits=[1], example_input=rows).eval()
    features = net.exit_paths[0].stages[0](net.stem(rows))
    exit_ = net.exit_paths[1].head
    assert isinstance(exit_, LinearExit)
    assert torch.equal(net(rows)[:, 1], exit_.linear(features))


def test_criteria_read_codes() -> None:
    model = OfCodes()
    codes = rows_for(model)
    batches = [(codes, torch.arange(8) % CLASSES)]
    net = nf.fission(model, 2, sparsity=0.5, criterion="snip", batches=batches)
    assert net(codes).shape == (8, 2, CLASSES)


def test_criteria_read_no_codes_for_a_network_of_numbers() -> None:
    model = plain()
    batches = [(torch.ones(8, FEATURES, dtype=torch.int64), torch.arange(8) % CLASSES)]
    with pytest.raises(ValueError, match=r"^batches must be of float images .*, got int64 of shape"):
        nf.fission(model, 2, sparsity=0.5, batches=batches, example_input=rows_for(model))


def test_a_regression_is_told_of_two_outputs() -> None:
    model = nn.Sequential(*plain()[:-1], nn.Linear(WIDTH, 1))
    with pytest.raises(ValueError, match=r"a regression a mean and the logarithm of a variance$"):
        nf.fission(model, 2, example_input=rows_for(model))


def test_one_hidden_layer_is_refused_in_one_line() -> None:
    model = plain(1)
    with pytest.raises(
        ValueError, match=r"^model must be a network in which stages are found, .* own parts$"
    ):
        nf.fission(model, 3, grouping="channels", example_input=rows_for(model))
