"""Networks of several inputs: classifiers of text from transformers, by a dictionary or by position."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import netfission as nf
from netfission.surgery.backbone import cut
from netfission.surgery.one_input import with_one_input

transformers = pytest.importorskip("transformers")

WORDS = ["[pad]", "the", "film", "plot", "was", "never", "good", "great", "bad", "dull"]
POSITIONS = 12


def classifier(kind: str) -> nn.Module:
    """A classifier of two classes; its weights are random, as none can be had without a network."""
    settings = {"vocab_size": len(WORDS), "num_labels": 2, "max_position_embeddings": POSITIONS}
    if kind == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 16}
        config = transformers.BertConfig(**settings, **sizes)
    else:
        config = transformers.DistilBertConfig(**settings, dim=16, n_layers=3, n_heads=4, hidden_dim=16)
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForSequenceClassification.from_config(config)
    return model


def sentences(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Sentences such as "the film was never dull", with padding, and whether they praise."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.zeros(count, 8, dtype=torch.int64), []
    for row in range(count):
        thing, never, praises, which = (int(torch.randint(2, (), generator=generator)) for _ in range(4))
        words = ["the", ["film", "plot"][thing], "was", *["never"] * never]
        words.append([["bad", "dull"], ["good", "great"]][praises][which])
        ids[row, : len(words)] = torch.tensor([WORDS.index(word) for word in words])
        labels.append(praises != never)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}, torch.tensor(labels).long()


def longer(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(1, len(WORDS), (rows, POSITIONS), generator=torch.Generator().manual_seed(1))
    ids[0, 3:] = 0
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def test_a_classifier_of_text_learns_as_an_ensemble() -> None:
    batch, labels = sentences(96, seed=0)
    test, expected = sentences(64, seed=1)
    model = classifier("distilbert")
    net = nf.fission(model, 3, grouping="channels", example_input=batch)
    assert net.branch_after == (1, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for _ in range(20):
        loss = nf.ensemble_distillation_loss(net(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        logits = net(test)
        answers = net.ensemble()(test).argmax(dim=1)
        assert (answers == expected).double().mean() > 0.9
        assert nf.disagreement(logits).shape == nf.mutual_information(logits).shape == (64,)
        assert torch.equal(nf.deploy(net, test, joined=False)(test).argmax(dim=2), logits.argmax(dim=2))
        cascade = nf.Cascade(net, [0.9, 0.9], example_input=test).eval()
        assert (cascade(test).argmax(dim=1) == answers).double().mean() > 0.9


def test_it_is_restored_from_its_state_and_copies() -> None:
    batch, _ = sentences(4, seed=0)
    model = classifier("bert")
    net = nf.fission(model, 3, example_input=batch, seed=1).eval()  # with masks on weights
    logits = net(batch)
    other = nf.fission(model, 3, example_input=batch).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(net.state_dict())
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for again in (other, copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert torch.equal(again(batch), logits)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_with_one_exit_it_is_the_model_for_sentences_of_any_length(kind: str) -> None:
    batch, _ = sentences(3, seed=0)
    model = classifier(kind).eval()
    net = nf.fission(model, 1, example_input=transformers.BatchEncoding(batch)).eval()
    for inputs in (batch, longer(5)):
        assert torch.equal(net(inputs).squeeze(1), model(**inputs).logits)
    assert "inputs" not in type(model).forward.__code__.co_varnames  # the model itself is as before


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, features: Tensor, weights: Tensor) -> Tensor:
        result: Tensor = features + self.layers(features) * weights
        return result


class Masked(nn.Module):
    """Blocks that all read a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            features = block(features, mask.unsqueeze(-1).float())
        return features.mean(1)


class Within(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Identity()

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = self.last(self.inner(features, mask))
        return result


def test_a_mask_that_all_blocks_read_hides_none_however_deep_they_are() -> None:
    inputs = torch.rand(2, 5, 8), torch.rand(2, 5) > 0.5
    names = cut(Within(Within(Within(Masked()))), inputs).stage_names
    assert names == tuple(f"inner.inner.inner.blocks.{number}" for number in range(3))


def test_a_dictionary_of_all_arguments_gives_them_by_name() -> None:
    model = nn.Bilinear(2, 3, 4)
    inputs = {"input2": torch.rand(5, 3), "input1": torch.rand(5, 2)}
    assert torch.equal(with_one_input(model, inputs)(inputs), model(**inputs))


def test_inputs_by_position_and_without_a_mask() -> None:
    batch, _ = sentences(3, seed=0)
    model = classifier("bert").eval()
    pair = tuple(batch.values())
    assert torch.equal(nf.fission(model, 1, example_input=pair).eval()(pair)[:, 0], model(*pair).logits)
    ids = batch["input_ids"]
    net = nf.fission(model, 2, example_input=ids, linear_exits=[1]).eval()
    assert net(ids).shape == (3, 3, 2)


def test_criteria_read_batches_of_dictionaries() -> None:
    batch, labels = sentences(4, seed=0)
    net = nf.fission(classifier("bert"), 2, sparsity=0.1, batches=[(batch, labels)])
    assert net(batch).shape == (4, 2, 2)


def test_cost_calls_the_model_with_its_arguments_and_the_network_with_one() -> None:
    batch, _ = sentences(2, seed=0)
    model = classifier("distilbert")
    net = nf.fission(model, 3, grouping="channels", example_input=batch)
    report = nf.cost(net, batch, reference=model, batch_sizes=[2], rounds=1)
    assert report.reference is not None
    assert report.network.size.macs_dense <= 1.1 * report.reference.size.macs_dense


class OfDictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.layer(batch["rows"])


def test_a_model_of_one_dictionary_is_called_with_it() -> None:
    model = OfDictionary()
    assert with_one_input(model, {"rows": torch.zeros(1, 2)}) is model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: {"ids": batch["input_ids"]}, r"accepted by the network, got {'ids': int64 of shape"),
        (
            lambda batch: batch | {"labels": torch.zeros(2).long()},
            r"\(inputs must be without labels, got labels",
        ),
        (
            lambda batch: batch | {"attention_mask": torch.ones(1, 8)},
            "tensors of equally many rows, got 2 and 1",
        ),
        (lambda batch: batch | {"attention_mask": None}, "with a row per example, got one of them NoneType"),
        (lambda batch: {"input_ids": batch["input_ids"].float()}, r"accepted by the network, got .*float32"),
    ],
)
def test_what_the_model_cannot_read_is_refused_in_one_line(change: Any, message: str) -> None:
    batch, _ = sentences(2, seed=0)
    with pytest.raises(ValueError, match=f"^example_input must be .*{message}") as raised:
        nf.fission(classifier("bert"), 3, example_input=change(batch))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"reconstruct": True, "grouping": "channels"},
            "^reconstruct must be False for a network of several",
        ),
        ({"sparsity": 0.5, "criterion": "synflow"}, r"^criterion must be one that reads no images of ones"),
        ({"linear_exits": [1]}, r"^model must be one whose stages give .* got stages that give 2 tensors"),
    ],
)
def test_what_does_not_go_with_several_inputs_is_refused(settings: dict[str, Any], message: str) -> None:
    batch, _ = sentences(2, seed=0)
    with pytest.raises(ValueError, match=message):
        nf.fission(classifier("bert"), 2, example_input=batch, **settings)
