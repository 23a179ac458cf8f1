"""Which methods keep the weights of a trained network, and what makes their members differ."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netfission as nf
from netfission.config import FissionConfig, MethodConfig, ModelConfig, RunConfig
from netfission.data import load_data
from netfission.methods.base import BuildPlan, call_with_seed
from netfission.methods.registry import METHODS, check_keeps_weights, check_settings, find_method
from netfission.models import create_model
from netfission.network import FissionNetwork
from netfission.runs import setup
from netfission.runs.train import train

EXAMPLE = torch.zeros(2, 1, 8, 8)


def digits() -> tuple[Tensor, Tensor]:
    """Normalised images of digits, and their labels."""
    data = load_data("digits", validation=0.0, seed=0)
    pixels, labels = next(iter(setup.make_batches(data.train, data, len(data.train))))
    return pixels, labels


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A network that knows the digits."""
    images, labels = digits()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = create_model("wrn-10-2", 10, in_channels=1)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
        for _ in range(4):
            for rows in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
    return model.eval()


def plan(model: nn.Module, **settings) -> BuildPlan:
    """A plan whose single networks all have the weights of this one."""
    return BuildPlan(lambda seed: copy.deepcopy(model), FissionConfig(**settings), EXAMPLE)


def with_new_head(model: nn.Module, seed: int) -> nn.Module:
    """The network with a classifier drawn from a seed, as for other classes."""
    result = copy.deepcopy(model)
    result.fc = call_with_seed(partial(nn.Linear, model.fc.in_features, 10), seed)
    return result


def settings_of(name: str) -> dict[str, object]:
    """The settings by which a method can be built."""
    sparse = {"sparsity": 0.8, "criterion": "erk"} if "regrow" in METHODS[name].settings else {}
    return {"exits": 1 if name == "born-again" else 3, **sparse}


@pytest.mark.filterwarnings("ignore:stage")
@pytest.mark.parametrize(
    "name", sorted(METHODS.keys() - {"lora-ensemble", "packed", "singular-value-ensemble"})
)
def test_a_method_says_that_it_loses_trained_weights_if_its_members_know_little_at_the_start(name, trained):
    method = find_method(MethodConfig(name, one_by_one=name == "deep-ensemble"))
    network = method.build(plan(trained, **settings_of(name))).train()
    images, labels = digits()
    with torch.no_grad():
        _, logits, shown = method.step(network, images, labels, lambda logits, _: logits.sum())
    right = (logits.argmax(dim=2) == shown[:, None]).float().mean(dim=0)
    assert (right.max() < 0.8) == bool(METHODS[name].loses_weights), right


@pytest.mark.parametrize("name", sorted(name for name in METHODS if METHODS[name].loses_weights))
def test_a_method_that_loses_trained_weights_refuses_them_before_anything_is_built(name):
    settings = {"method": name, **settings_of(name)}
    check_settings(RunConfig.from_dict(settings))
    with pytest.raises(
        ValueError, match=rf"^pretrained must be left out with method={name}, got True; .*\w$"
    ) as caught:
        check_settings(RunConfig.from_dict(settings | {"pretrained": True}))
    assert str(caught.value).endswith(METHODS[name].loses_weights)


@pytest.mark.parametrize("name", sorted(name for name in METHODS if not METHODS[name].loses_weights))
def test_other_methods_accept_trained_weights(name):
    check_settings(RunConfig.from_dict({"method": name, "pretrained": True, **settings_of(name)}))


def test_a_single_network_with_itself_as_teacher_starts_each_generation_from_trained_weights(trained):
    network = find_method(MethodConfig("born-again")).build(plan(trained, exits=1)).eval()
    images, _ = digits()
    for generation in network.generations:
        assert torch.equal(generation(images)[:, 0], trained(images))


def test_late_exits_of_the_undivided_network_differ_by_their_classifiers_alone(trained):
    network = find_method(MethodConfig("multi-exit")).build(plan(trained, branch_after=[2, 2])).eval()
    images, _ = digits()
    logits = network(images)
    assert torch.equal(logits[:, 0], trained(images))
    assert not torch.equal(logits[:, 1], logits[:, 2])
    assert [sum(p.numel() for p in exit_.parameters()) for exit_ in network.exit_paths[1:]] == [
        64 * 10 + 10
    ] * 2


def test_members_of_a_deep_ensemble_share_trained_weights_and_differ_by_new_classifiers(trained):
    create = partial(with_new_head, trained)
    network = find_method(MethodConfig("deep-ensemble")).build(
        BuildPlan(create, FissionConfig(exits=3), EXAMPLE)
    )
    first, *others = (dict(member.named_parameters()) for member in network.members)
    for other in others:
        differing = {name for name in first if not torch.equal(first[name], other[name])}
        assert differing == {"paths.0.head.fc.weight", "paths.0.head.fc.bias"}


def test_equal_members_of_a_deep_ensemble_need_an_order_of_images_of_their_own(
    trained, monkeypatch, tmp_path
):
    with pytest.raises(
        ValueError, match=r"^one_by_one must be True for members that start equal, got False; no weight is"
    ):
        find_method(MethodConfig("deep-ensemble")).build(plan(trained))

    monkeypatch.setattr(setup, "create_model", lambda *_, **__: copy.deepcopy(trained).train())
    settings = {"method": "deep-ensemble", "exits": 2, "epochs": 1, "limit_per_class": 20, "batch_size": 50}
    config = RunConfig.from_dict(
        settings | {"one_by_one": True, "learning_rate": 0.01, "accelerator": "cpu", "model": "wrn-10-2"}
    )
    evaluation = train(config, tmp_path / "run", progress=False)
    first, second = (metrics["nll"] for metrics in evaluation.exits)
    assert first != second
    assert evaluation.ensemble["top1"] > 0.9


def test_dropout_leaves_trained_weights_as_they_are(trained):
    network = find_method(MethodConfig("mc-dropout")).build(plan(trained))
    pairs = zip(network.parameters(), trained.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_exit_0_of_whole_copies_keeps_all_trained_weights(trained):
    network = find_method(MethodConfig("treenet")).build(plan(trained, branch_after=[2, 2])).eval()
    assert isinstance(network, FissionNetwork)
    images, _ = digits()
    assert torch.equal(network(images)[:, 0], trained(images))


@pytest.mark.parametrize("method", ["treenet", "fission"])
def test_whole_copies_of_trained_weights_know_nearly_what_the_network_does_and_differ(method, trained):
    settings = {"branch_after": [2, 2], **({"grouping": "copies"} if method == "fission" else {})}
    images, labels = digits()

    def accuracies(knows: bool) -> list[float]:
        network = find_method(MethodConfig(method)).build(replace(plan(trained, **settings), trained=knows))
        logits = network.eval()(images)
        assert not torch.allclose(logits[:, 1], logits[:, 2], atol=0.1)
        accuracies: list[float] = (logits.argmax(2) == labels[:, None]).double().mean(0).tolist()
        return accuracies

    whole, *copies = accuracies(True)
    assert whole > 0.9 and min(copies) > whole - 0.05
    assert max(accuracies(False)[1:]) < 0.6


@pytest.mark.parametrize("exits", [1, 2])
def test_linear_exits_start_with_what_the_trained_network_knows(exits, trained):
    images, labels = digits()
    batches = list(zip(images.split(100), labels.split(100), strict=True))

    def accuracies(**settings) -> tuple[nn.Module, list[float]]:
        network = nf.fission(trained, exits, grouping="channels", linear_exits=[2, 2], **settings).eval()
        right: Tensor = (network(images).argmax(2) == labels[:, None]).double().mean(0)
        return network, right.tolist()[exits:]

    network, fitted = accuracies(reconstruct=True, batches=batches)
    assert min(fitted) > 0.75
    first, second = (path.head.linear.weight for path in network.exit_paths[exits:])
    assert not torch.allclose(first, second, atol=1e-2)
    assert max(accuracies(example_input=images[:2])[1]) < 0.4


@pytest.mark.parametrize("method", ["fission", "treenet", "multi-exit"])
def test_branch_points_are_chosen_by_whether_the_weights_are_trained(method, trained):
    def points(branch_after, knows: bool) -> tuple[int, ...]:
        built = replace(plan(trained, branch_after=branch_after), trained=knows)
        return find_method(MethodConfig(method)).build(built).branch_after

    assert points("auto", True) == points("late", True) == (2, 2)
    assert points("auto", False) == points(None, False) != (2, 2)


def test_a_file_of_weights_is_refused_as_published_ones_are():
    model = ModelConfig(weights="x.pt")
    with pytest.raises(ValueError, match=r"^weights must be left out with method=mimo, got 'x\.pt'; the"):
        check_keeps_weights(model, "mimo")
    check_keeps_weights(model, "multi-exit")
